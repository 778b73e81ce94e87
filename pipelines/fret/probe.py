"""The step `probe`: before all pairs are scored, a few hundred queries show how the teacher judges.

It is there with `fret.fusion: auto`, which labels by what the probe chooses, and in the run of
`tokay plan --probe`, which ends with it. What it has scored is not scored again.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from cluster.artifacts import Artifact, Json, unfinished_artifact
from cluster.config import Config
from cluster.steps import Step, StepContext
from cluster.storage import join, open_storage
from pipelines.fingerprints import NotFingerprinted
from pipelines.fret.corpus_queries import TASKS
from pipelines.fret.judging import Judging
from pipelines.fret.pairs import Queries, group_pairs
from pipelines.fret.scored_queries import QueryScores, with_scores
from pipelines.fret.scores import pair_prompts, score_pairs, scoring_config

if TYPE_CHECKING:
    from pipelines.recipe.recipe import Recipe

TITLE = "see how well the teacher judges"
_PAIRS = "work/pairs"  # what is scored; it goes when the step is done


class ProbeConfig(Config):
    """How many queries show how well the teacher judges."""

    num_queries: int = Field(
        default=200,
        ge=1,
        description="drawn by a hash of their ids, of those whose seed the retriever has among its"
        " nearest scores.num_scored candidates",
    )
    # It reaches the run of a plan as `sample`.
    max_passages: Annotated[int, NotFingerprinted] = Field(
        default=20_000,
        ge=2,
        description="to which `tokay plan --probe` samples the corpus, whole documents by a hash"
        " of their names",
    )
    sample: int | None = Field(
        default=None,
        ge=2,
        description="`tokay plan --probe` sets it: the run is over so many passages, and ends with"
        " the probe",
    )


def step(recipe: Recipe) -> Step:
    """Returns the step."""
    return Step(
        name="probe",
        config={**scoring_config(recipe), "num_queries": recipe.probe.num_queries},
        inputs=("candidates", "passages"),
        work=lambda context: probe_teacher(recipe, context),
    )


def probe_teacher(recipe: Recipe, context: StepContext) -> dict[str, Json]:
    """Scores the pairs of some queries; returns how well each judge did, and the verdict."""
    candidates, num_scored = context.input("candidates"), recipe.scores.num_scored
    drawn = draw_queries(candidates, recipe.probe.num_queries, num_scored)
    storage = open_storage(join(context.storage.uri, _PAIRS))
    grouping = replace(context, storage=storage)
    metrics: dict[str, Json] = {"num_passages": 0, "num_pairs": 0}
    if drawn:
        metrics = group_pairs(
            num_scored,
            grouping,
            Queries(ids=frozenset(drawn), only=True),
            num_shards=-(-len(drawn) // recipe.seeds.rows_per_shard),
        )
    pairs = unfinished_artifact(storage, grouping.log.files(), metrics)
    metrics |= score_pairs(pair_prompts(recipe), recipe, pairs, context)
    scores = QueryScores(unfinished_artifact(context.storage, context.log.files()))
    judging = judge(candidates, drawn, scores, recipe.candidates.ordered_by)
    return {**metrics, "num_queries": len(drawn), "num_scored": num_scored, **judging.metrics()}


def draw_queries(candidates: Artifact, num_queries: int, num_scored: int) -> set[str]:
    """Returns ids of queries that were not dropped and whose seed is among those to be scored.

    Those taken from the corpus are left out: to recognise a passage by its own sentence takes no
    judgement. More queries contain the fewer.
    """

    def fit() -> Iterator[str]:
        for table in candidates.tables(["id", "task", "dropped_by", "seed_rank"]):
            for row in table.to_pylist():
                written = row["dropped_by"] is None and row["task"] not in TASKS
                if written and 0 < row["seed_rank"] <= num_scored:
                    yield row["id"]

    def draw(id_: str) -> bytes:
        return hashlib.sha256(f"probe {id_}".encode()).digest()

    return set(heapq.nsmallest(num_queries, fit(), key=draw))


def judge(candidates: Artifact, drawn: set[str], scores: QueryScores, ordered_by: str) -> Judging:
    """Counts the drawn queries; one with a pair that could not be scored is left out."""
    judging = Judging(ordered_by)
    for table in candidates.tables():
        for row in table.to_pylist():
            if row["id"] in drawn:
                scored = scores.of(row["id"])
                if not any(score["error"] for score in scored.values()):
                    judging.add_row(row | with_scores(row, scored))
    return judging
