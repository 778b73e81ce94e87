"""The step `seeds`: the passages that the LLM writes queries about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
from pydantic import Field

from cluster.artifacts import Json, write_shards
from cluster.config import Config
from cluster.plain_json import dump_json
from cluster.steps import Step, StepContext
from pipelines.corpus.cutting import Passage
from pipelines.corpus.held_out import FILE, draw, hold_out
from pipelines.fingerprints import fingerprinted
from pipelines.ids import document_name
from pipelines.records import SEED

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


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """What is held out for the step `gate`.

    Attributes:
        num_queries: Titles and first sentences that the documents must have.
        num_seeds: Passages that the LLM writes queries for.
    """

    num_queries: int
    num_seeds: int


def step(recipe: Recipe) -> Step:
    """Returns the step."""
    held_out = recipe.gate.hold_out if recipe.gate else None
    return Step(
        name="seeds",
        config=fingerprinted(recipe.seeds)
        | ({"held_out": [held_out.num_queries, held_out.num_seeds]} if held_out else {}),
        inputs=("passages",),
        work=lambda context: choose_seeds(recipe.seeds, held_out, context),
    )


def choose_seeds(
    config: SeedsConfig, held_out: HoldOut | None, context: StepContext
) -> dict[str, Json]:
    """Samples seed passages uniformly, by a hash, so that more seeds contain the fewer.

    Neighbours in the corpus stay neighbours, because passages of one document share candidates.
    Of the documents that are held out come seeds of their own, and no others; their names are kept
    beside the shards.
    """
    passages = context.input("passages").read()
    documents: list[str] = []
    if held_out is not None:
        documents = hold_out(
            [Passage.of_row(row) for row in passages.to_pylist()],
            num_queries=held_out.num_queries,
            num_passages=held_out.num_seeds,
            seed=config.seed,
        )
        context.storage.write_bytes(FILE, dump_json(documents).encode())
    ids, names = passages["id"].to_pylist(), frozenset(documents)
    is_held_out = [document_name(source) in names for source in passages["source"].to_pylist()]
    order = sorted(range(len(ids)), key=lambda row: draw(f"{config.seed} {ids[row]}"))
    num_held_out = held_out.num_seeds if held_out else 0
    others = [row for row in order if not is_held_out[row]][: config.num_seeds]
    theirs = [row for row in order if is_held_out[row]][:num_held_out]
    chosen = sorted(others + theirs)
    column = pa.array([is_held_out[row] for row in chosen], pa.bool_())
    seeds = passages.take(chosen).append_column(SEED.field("held_out"), column)
    context.log.append(write_shards(context.storage, seeds, config.rows_per_shard))
    counts = {"num_held_out_seeds": len(theirs), "num_held_out_documents": len(documents)}
    return {"num_seeds": len(others)} | (counts if held_out else {})
