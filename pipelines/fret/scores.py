"""The step `scores`: the LLM judges each query's nearest candidates twice, in one prompt."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import pyarrow as pa
from pydantic import Field

from actors.engine import EngineConfig, LlmConfig
from actors.language_model import LanguageModel
from actors.pair_scores import ScoringPrompt
from actors.score_check import check_scores
from cluster.artifacts import Artifact, Json
from cluster.config import Config
from cluster.stages import Limit, Stage, StageFunction, StageOutput, run_stage
from cluster.steps import Step, StepContext
from pipelines.fingerprints import NotFingerprinted, fingerprinted
from pipelines.fret.prompts import PairPrompts, load_prompts, require_plain
from pipelines.records import PAIRS, SCORES

if TYPE_CHECKING:
    from pipelines.recipe.recipe import Recipe

TITLE = "the LLM scores each candidate"


class ScoresConfig(Config):
    """What is scored."""

    num_scored: int = Field(
        default=20, ge=2, description="nearest candidates that are scored, the seed among them"
    )
    max_passage_tokens: int = Field(default=160, ge=16)
    relevance: str = Field(
        default="yes-no", description="how the LLM is asked: yes-no (the paper) or graded (0 to 4)"
    )
    separate_prompts: bool = Field(
        default=False,
        description="two prompts a pair, nothing cached: the slow reference for the fast way",
    )
    max_unusable_share: Annotated[float, NotFingerprinted] = Field(
        default=0.1, ge=0, le=1, description="the step fails when more pairs cannot be scored"
    )


def step(recipe: Recipe) -> Step:
    """Returns the step."""
    return Step(
        name="scores",
        config=scoring_config(recipe),
        inputs=("pairs",),
        work=lambda context: score_pairs(recipe, context.input("pairs"), context),
    )


def scoring_config(recipe: Recipe) -> dict[str, Json]:
    """Returns what the scores of a pair depend on."""
    prompts = load_prompts(recipe.prompts)
    return {
        "llm": fingerprinted(recipe.llm),
        "scores": fingerprinted(recipe.scores),
        "prompts": prompts.model_dump(mode="json", exclude={"tasks", "written"}),
    }


def score_pairs(recipe: Recipe, pairs: Artifact, context: StepContext) -> dict[str, Json]:
    """Has the recipe's LLM score grouped pairs, shard by shard; returns metrics."""
    prompts = load_prompts(recipe.prompts)
    stage = ScorePairs(
        config=recipe.scores,
        prompts=PairPrompts(prompts=prompts, relevance=recipe.scores.relevance),
        llm=recipe.llm,
        engine=recipe.resources.engine,
        resources=recipe.resources.llm,
    )
    limit = Limit(
        share=recipe.scores.max_unusable_share,
        num_all=pairs.manifest.metrics["num_pairs"],
        remedy="raise llm.max_model_tokens or scores.max_unusable_share",
    )
    return run_stage(stage, pairs, context, limit)


@dataclass(frozen=True, kw_only=True)
class ScorePairs(Stage):
    """Passages with their queries in, the LLM's scores of each pair out."""

    config: ScoresConfig
    prompts: PairPrompts
    llm: LlmConfig
    engine: EngineConfig
    columns: tuple[str, ...] = tuple(PAIRS.names)

    def load(self) -> StageFunction:
        """Starts the engine; its first pairs are scored both ways before anything is."""
        config = self.config
        llm = LanguageModel.load(self.llm, self.engine)
        require_plain(self.prompts.prompts, llm)
        checking, difference = asyncio.Lock(), None

        async def check(pairs: list[ScoringPrompt]) -> float | None:
            """Checks the engine on the first pairs that show anything; others wait for it."""
            nonlocal difference
            async with checking:
                if difference is None and not config.separate_prompts:
                    difference = await check_scores(llm, pairs)
            return difference

        async def score(passages: pa.Table) -> StageOutput:
            rows = passages.to_pylist()
            pairs = []
            for row in rows:
                text = llm.truncate(row["text"], config.max_passage_tokens)
                pairs += [self.prompts.render(q, row["title"], text) for q in row["queries"]]
            apart = await check(pairs)
            answers = await llm.score(pairs, separate=config.separate_prompts)
            rest = iter(answers)
            scores, unusable = [], []
            for row in rows:
                own = [next(rest) for _ in row["query_ids"]]
                scores.append(
                    {
                        "passage_id": row["passage_id"],
                        "query_ids": row["query_ids"],
                        "query_likelihoods": [answer.ql for answer in own],
                        "relevances": [answer.rc for answer in own],
                        "errors": [answer.error for answer in own],
                    }
                )
                unusable += [
                    (f"query {query_id} with passage {row['passage_id']}", answer.error, query)
                    for query_id, query, answer in zip(
                        row["query_ids"], row["queries"], own, strict=True
                    )
                    if answer.error
                ]
            metrics = {
                "num_pairs": len(pairs),
                "num_prompt_tokens": sum(answer.num_prompt_tokens for answer in answers),
                "num_cached_tokens": sum(answer.num_cached_tokens for answer in answers),
            }
            table = pa.Table.from_pylist(scores, schema=SCORES)
            return StageOutput(
                rows=table,
                unusable=unusable,
                metrics=metrics,
                highest={} if apart is None else {"largest_score_difference": apart},
            )

        return score
