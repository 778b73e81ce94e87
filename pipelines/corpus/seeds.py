"""The step `seeds`: the passages that the LLM writes queries about."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from pydantic import Field

from cluster.artifacts import Json, write_shards
from cluster.config import Config
from cluster.steps import Step, StepContext
from pipelines.fingerprints import fingerprinted

if TYPE_CHECKING:
    from pipelines.recipe.recipe import Recipe

TITLE = "sample seed passages"


class SeedsConfig(Config):
    """Which passages the LLM writes about."""

    num_seeds: int = Field(default=1000, ge=1)
    seed: int = 0
    rows_per_shard: int = Field(
        default=32, ge=1, description="the unit of work, of resume and of retry"
    )


def step(recipe: Recipe) -> Step:
    """Returns the step."""
    return Step(
        name="seeds",
        config=fingerprinted(recipe.seeds),
        inputs=("passages",),
        work=lambda context: choose_seeds(recipe.seeds, context),
    )


def choose_seeds(config: SeedsConfig, context: StepContext) -> dict[str, Json]:
    """Samples seed passages uniformly, by a hash, so that more seeds contain the fewer.

    Neighbours in the corpus stay neighbours, because passages of one document share candidates.
    """
    passages = context.input("passages").read()
    ids = passages["id"].to_pylist()

    def draw(row: int) -> bytes:
        return hashlib.sha256(f"{config.seed} {ids[row]}".encode()).digest()

    chosen = sorted(sorted(range(len(ids)), key=draw)[: config.num_seeds])
    write_shards(context.storage, passages.take(chosen), config.rows_per_shard)
    return {"num_seeds": len(chosen)}
