"""The step `scores`: the LLM judges each query's nearest candidates twice, in one prompt."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from actors.language_model import EngineOptions, LanguageModel, PairScore
from cluster.artifacts import Artifact, Json
from cluster.stages import StageFunction, StageOutput, StageResources, run_stage
from cluster.steps import StepContext
from pipelines.encoders import PassageTexts
from pipelines.fret.prompts import PairPrompts
from pipelines.records import CANDIDATES, SCORES


class ScoresConfig(BaseModel):
    """What is scored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_scored: int = Field(
        default=20, ge=2, description="nearest candidates that are scored, the seed among them"
    )
    max_passage_tokens: int = Field(default=160, ge=16)
    relevance: str = Field(
        default="yes-no", description="how the LLM is asked: yes-no (the paper) or graded (0 to 4)"
    )


@dataclass(frozen=True, kw_only=True)
class ScoreCandidates:
    """Queries with candidates in, the same with the LLM's scores out."""

    config: ScoresConfig
    prompts: PairPrompts
    engine: EngineOptions
    passages: Artifact
    resources: StageResources
    columns: tuple[str, ...] = tuple(CANDIDATES.names)

    def load(self) -> StageFunction:
        """Starts the engine and reads the passages' texts."""
        config = self.config
        llm = LanguageModel.load(self.engine)
        texts = PassageTexts(self.passages)

        async def score(queries: pa.Table) -> StageOutput:
            rows = [_first_candidates(row, config.num_scored) for row in queries.to_pylist()]
            # Passage by passage, because the engine keeps the prefix it has just computed.
            pairs = sorted(
                (passage_id, number, place)
                for number, row in enumerate(rows)
                if row["dropped_by"] is None
                for place, passage_id in enumerate(row["candidate_ids"][: config.num_scored])
            )
            cut = {}
            for passage_id in {passage_id for passage_id, _, _ in pairs}:
                title, text = texts[passage_id]
                cut[passage_id] = (title, llm.truncate(text, config.max_passage_tokens))
            answers = await llm.score(
                [self.prompts.render(rows[n]["query"], *cut[passage]) for passage, n, _ in pairs]
            )
            by_row: list[dict[int, PairScore]] = [{} for _ in rows]
            for (_, number, place), answer in zip(pairs, answers, strict=True):
                by_row[number][place] = answer
            for row, places in zip(rows, by_row, strict=True):
                error = next((a.error for a in places.values() if a.error), None)
                row["dropped_by"] = row["dropped_by"] or error
                if error:
                    places = {}
                order = sorted(places)
                row["query_likelihoods"] = [places[place].ql for place in order]
                row["relevances"] = [places[place].rc for place in order]
            metrics = {
                "num_pairs": len(pairs),
                "num_prompt_tokens": sum(answer.num_prompt_tokens for answer in answers),
                "num_cached_tokens": sum(answer.num_cached_tokens for answer in answers),
            }
            table = pa.Table.from_pylist(rows, schema=SCORES)
            return StageOutput(rows=table, metrics=metrics)

        return score


def _first_candidates(row: dict[str, Any], num_scored: int) -> dict[str, Any]:
    """Moves the seed into the scored candidates if the retriever ranks it lower."""
    ids, similarities = row["candidate_ids"], row["similarities"]
    if not ids:
        return row
    place = ids.index(row["seed_id"])
    if place >= num_scored:
        for values in (ids, similarities):
            values.insert(num_scored - 1, values.pop(place))
    return row


def score_candidates(
    config: ScoresConfig,
    prompts: PairPrompts,
    engine: EngineOptions,
    resources: StageResources,
    context: StepContext,
) -> dict[str, Json]:
    """Streams the queries with their candidates past the vLLM actors."""
    stage = ScoreCandidates(
        config=config,
        prompts=prompts,
        engine=engine,
        passages=context.input("passages"),
        resources=resources,
    )
    return run_stage(stage, context.input("candidates"), context)
