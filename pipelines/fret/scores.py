"""The step `scores`: the LLM judges each query's nearest candidates by two scores."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import pyarrow as pa
from pydantic import Field

from actors.engine import EngineConfig, LlmConfig
from actors.language_model import LanguageModel
from actors.pair_scores import ScoringPrompt, joined
from actors.score_check import check_scores
from cluster.artifacts import Artifact, Json
from cluster.config import Config
from cluster.stages import Limit, Stage, StageFunction, StageOutput, run_stage
from cluster.steps import Step, StepContext
from pipelines.fingerprints import NotFingerprinted, fingerprinted
from pipelines.fret.fusion import LLM_JUDGES
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
    ql_examples: Literal["all", "positive"] = Field(
        default="all",
        description="the examples of query likelihood; all: those of relevance, some of which do"
        " not fit, so that both scores come out of one prompt and cost little more than one;"
        " positive: those after which the task's queries are written, which all fit, in a prompt"
        " of its own. Then only those of ql and rc are asked that fret.fusion names (with auto"
        " both), and both read each passage twice",
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
        config=scoring_config(recipe, recipe.fret.llm_judges),
        inputs=("pairs",),
        work=lambda context: score_pairs(
            pair_prompts(recipe, recipe.fret.llm_judges), recipe, context.input("pairs"), context
        ),
    )


def scoring_config(recipe: Recipe, judges: tuple[str, ...] = LLM_JUDGES) -> dict[str, Json]:
    """Returns what the scores of a pair depend on."""
    ask = pair_prompts(recipe, judges)
    return {
        "llm": fingerprinted(recipe.llm),
        "scores": fingerprinted(recipe.scores),
        "prompts": ask.prompts.model_dump(
            mode="json", exclude={"tasks": {"__all__": {"instruction"}}, "written": True}
        ),
        # Of one prompt both scores come out, whoever is asked.
        **({"judges": list(judges)} if ask.apart else {}),
    }


def pair_prompts(recipe: Recipe, judges: tuple[str, ...] = LLM_JUDGES) -> PairPrompts:
    """Returns how a recipe has pairs judged, and by which of the LLM's judges where it can tell."""
    return PairPrompts(
        prompts=load_prompts(recipe.prompts),
        relevance=recipe.scores.relevance,
        apart=recipe.scores.ql_examples == "positive",
        judges=judges,
    )


def score_pairs(
    prompts: PairPrompts, recipe: Recipe, pairs: Artifact, context: StepContext
) -> dict[str, Json]:
    """Has the recipe's LLM score grouped pairs, shard by shard; returns metrics."""
    stage = ScorePairs(
        config=recipe.scores,
        prompts=prompts,
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
        checking, known = asyncio.Lock(), None

        async def check(prompts: list[ScoringPrompt]) -> float | None:
            """Checks the engine on the first prompts that show anything; others wait for it."""
            nonlocal known
            async with checking:
                if known is None and not config.separate_prompts:
                    known = await check_scores(llm, prompts)
            return known

        async def score(passages: pa.Table) -> StageOutput:
            rows = passages.to_pylist()
            pairs: list[tuple[ScoringPrompt, ...]] = []
            for row in rows:
                text = llm.truncate(row["text"], config.max_passage_tokens)
                asked = zip(row["queries"], row["tasks"], strict=True)
                pairs += [self.prompts.render(q, row["title"], text, task) for q, task in asked]
            prompts = list(itertools.chain.from_iterable(pairs))
            difference = await check(prompts)
            of_prompts = iter(await llm.score(prompts, separate=config.separate_prompts))
            answers = [joined([next(of_prompts) for _ in pair]) for pair in pairs]
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
                highest={} if difference is None else {"largest_score_difference": difference},
            )

        return score
