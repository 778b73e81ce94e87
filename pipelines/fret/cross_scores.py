"""The step `cross_scores`: a cross-encoder judges the pairs, instead of the LLM or beside it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from cluster.config import Config
from cluster.stages import Limit, Stage, StageFunction, StageOutput, run_stage
from cluster.steps import Step, StepContext
from pipelines.fingerprints import NotFingerprinted, fingerprinted
from pipelines.records import CROSS_SCORES, PAIRS

if TYPE_CHECKING:
    from actors.cross_encoder import PreparedPairs
    from cluster.artifacts import Json
    from pipelines.recipe.recipe import Recipe

TITLE = "the cross-encoder scores each candidate"


class CrossEncoderConfig(Config):
    """A cross-encoder, which reads a query and a passage together; its one output is the score."""

    model: str = Field(description="folder or hub id")
    max_tokens: int = Field(default=512, ge=16, description="of a query and its passage together")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    batch_tokens: Annotated[int | None, NotFingerprinted] = Field(
        default=None, ge=1, description="padding included, in one pass; null: what suits the device"
    )
    trust_remote_code: bool = Field(
        default=False,
        description="run code that comes with it; --trust-remote-code must say it too",
    )


def step(recipe: Recipe) -> Step:
    """Returns the step of a recipe whose fusion names the cross-encoder."""
    assert recipe.cross_encoder is not None
    return Step(
        name="cross_scores",
        config={"cross_encoder": fingerprinted(recipe.cross_encoder)},
        inputs=("pairs",),
        work=lambda context: cross_score_pairs(recipe, context),
    )


def cross_score_pairs(recipe: Recipe, context: StepContext) -> dict[str, Json]:
    """Has the recipe's cross-encoder score grouped pairs, shard by shard; returns metrics."""
    assert recipe.cross_encoder is not None
    pairs = context.input("pairs")
    stage = CrossScorePairs(cross_encoder=recipe.cross_encoder, resources=recipe.resources.encoder)
    limit = Limit(
        share=recipe.scores.max_unusable_share,
        num_all=pairs.manifest.metrics["num_pairs"],
        remedy="set cross_encoder.dtype to float32 or raise scores.max_unusable_share",
    )
    return run_stage(stage, pairs, context, limit)


@dataclass(frozen=True, kw_only=True)
class CrossScorePairs(Stage):
    """Passages with their queries in, a score of each pair out."""

    cross_encoder: CrossEncoderConfig
    columns: tuple[str, ...] = tuple(PAIRS.names)

    def load(self) -> StageFunction:
        """Loads the model; a shard is tokenised while the one before is scored."""
        from actors.cross_encoder import CrossEncoder

        config = self.cross_encoder
        model = CrossEncoder.load(
            config.model,
            max_tokens=config.max_tokens,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
        )
        # One thread each, so that shards take turns, and torch's own threads are started once.
        tokenising, scoring = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

        def score(pairs: PreparedPairs) -> np.ndarray:
            return model.score_prepared(pairs, batch_tokens=config.batch_tokens)

        async def work(passages: pa.Table) -> StageOutput:
            rows = passages.to_pylist()
            pairs = [
                # As BEIR gives passages to cross-encoders.
                (query, f"{row['title'] or ''} {row['text']}".strip())
                for row in rows
                for query in row["queries"]
            ]
            run = asyncio.get_running_loop().run_in_executor
            prepared = await run(tokenising, model.prepare, pairs)
            scores = iter((await run(scoring, score, prepared)).tolist())
            output, unusable = [], []
            for row in rows:
                own = [next(scores) for _ in row["query_ids"]]
                errors = [None if np.isfinite(value) else _NO_NUMBER for value in own]
                output.append(
                    {
                        "passage_id": row["passage_id"],
                        "query_ids": row["query_ids"],
                        "cross_scores": [
                            None if error else value
                            for value, error in zip(own, errors, strict=True)
                        ],
                        "errors": errors,
                    }
                )
                unusable += [
                    (f"query {query_id} with passage {row['passage_id']}", error, query)
                    for query_id, query, error in zip(
                        row["query_ids"], row["queries"], errors, strict=True
                    )
                    if error
                ]
            return StageOutput(
                rows=pa.Table.from_pylist(output, schema=CROSS_SCORES),
                unusable=unusable,
                metrics={"num_pairs": len(pairs)},
            )

        return work


_NO_NUMBER = "the cross-encoder's score is no number"
