"""The step `pairs`: what the LLM will score, sorted by passage over the whole run.

A passage is a candidate of many queries. Sorted so, the LLM reads it once, wherever in the run its
queries stand, and every shard brings the texts that its scoring needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cluster.artifacts import Artifact, Json, shard_path
from cluster.steps import Step, StepContext
from cluster.storage import write_table
from pipelines.records import PAIRS

if TYPE_CHECKING:
    from pipelines.recipe.recipe import Recipe

TITLE = "sort what to score by passage"

_ROWS = pa.schema(
    [
        ("shard", pa.int64()),
        ("passage_id", pa.string()),
        ("title", pa.string()),  # null in a row that is a pair
        ("text", pa.string()),
        ("query_id", pa.string()),  # null in a row that is a passage
        ("query", pa.string()),
        ("task", pa.string()),
    ]
)


def step(recipe: Recipe) -> Step:
    """Returns the step; what a probe has scored, it leaves out."""
    num_scored = recipe.scores.num_scored
    return Step(
        name="pairs",
        config={"num_scored": num_scored, "columns": PAIRS.names},
        inputs=("candidates", *(["probe"] if recipe.has_probe else []), "passages"),
        work=lambda context: pairs_to_score(num_scored, context),
    )


@dataclass(frozen=True, kw_only=True)
class Queries:
    """Which queries are meant: those with these ids or, where `only` is false, all the others."""

    ids: frozenset[str] = frozenset()
    only: bool = False

    def __contains__(self, query_id: str) -> bool:
        return (query_id in self.ids) == self.only


def pairs_to_score(num_scored: int, context: StepContext) -> dict[str, Json]:
    """Groups the pairs that no probe has scored; none if the probe says SKIP."""
    probe = context.inputs.get("probe")
    if probe is None:
        return group_pairs(num_scored, context)
    if probe.manifest.metrics["fusion"] is None:
        return {"num_passages": 0, "num_pairs": 0}
    scored = {
        id_
        for table in probe.tables(["query_ids"])
        for ids in table["query_ids"].to_pylist()
        for id_ in ids
    }
    return group_pairs(num_scored, context, Queries(ids=frozenset(scored)))


def group_pairs(
    num_scored: int,
    context: StepContext,
    queries: Queries = Queries(),
    num_shards: int | None = None,
) -> dict[str, Json]:
    """Groups (query, candidate) pairs and the candidates' texts by passage, with Ray Data.

    Passage ids are hashes, so equal ranges of them make shards of about equal size. Of each query
    the nearest `num_scored` candidates are scored, the seed among them.

    Args:
        num_scored: Candidates of each query.
        context: With the inputs `candidates` and `passages`; its storage gets the shards.
        queries: Whose pairs.
        num_shards: As many as there are of candidates if None.
    """
    import ray

    candidates, passages = context.input("candidates"), context.input("passages")
    num_parts, storage = num_shards or len(candidates.shards), context.storage
    wanted = ray.put(_scored_ids(candidates, num_scored, queries))

    def read(batch: dict[str, Any]) -> pa.Table:
        ((step, number),) = batch["item"]
        if step == "candidates":
            rows = _pairs(candidates.shard(candidates.shards[number]), num_scored, queries)
        else:
            ids, texts = ray.get(wanted), passages.shard(passages.shards[number]).to_pylist()
            rows = [{"passage_id": row["id"], **row} for row in texts if _holds(ids, row["id"])]
        for row in rows:
            row["shard"] = int(row["passage_id"][:8], 16) * num_parts >> 32
        return pa.Table.from_pylist(rows, schema=_ROWS)

    def write(group: pa.Table) -> pa.Table:
        rows = _by_passage(group)
        write_table(storage, shard_path(group["shard"][0].as_py()), rows)
        num_pairs = sum(map(len, rows["query_ids"].to_pylist()))
        return pa.table({"num_passages": [rows.num_rows], "num_pairs": [num_pairs]})

    artifacts = {"candidates": candidates, "passages": passages}
    parts = [
        {"item": (name, number)}
        for name, artifact in artifacts.items()
        for number in range(len(artifact.shards))
    ]
    written = (
        ray.data.from_items(parts, override_num_blocks=len(parts))
        .map_batches(read, batch_size=1)
        .groupby("shard")
        .map_groups(write, batch_format="pyarrow")
    )
    totals = {"num_passages": 0, "num_pairs": 0}
    for done, row in enumerate(written.iter_rows(), start=1):
        totals = {name: total + row[name] for name, total in totals.items()}
        context.progress.update(done, num_parts, f"{totals['num_pairs']:,} pairs")
    return dict(totals)


def scored_candidates(row: dict[str, Any], num_scored: int) -> list[str]:
    """Returns the nearest candidates of a query; the seed takes the last place if it is farther."""
    ids: list[str] = row["candidate_ids"][:num_scored]
    if ids and row["seed_id"] not in ids:
        ids[-1] = row["seed_id"]
    return ids


def _pairs(candidates: pa.Table, num_scored: int, queries: Queries) -> list[dict[str, Any]]:
    return [
        {"passage_id": id_, "query_id": row["id"], "query": row["query"], "task": row["task"]}
        for row in candidates.to_pylist()
        if row["dropped_by"] is None and row["id"] in queries
        for id_ in scored_candidates(row, num_scored)
    ]


def _scored_ids(candidates: Artifact, num_scored: int, queries: Queries) -> np.ndarray:
    """Returns the sorted ids of all passages that will be scored, as bytes."""
    pairs = (_pairs(table, num_scored, queries) for table in candidates.tables())
    ids = {row["passage_id"] for rows in pairs for row in rows}
    return np.array(sorted(ids), dtype=np.bytes_)


def _holds(ids: np.ndarray, id_: str) -> bool:
    place = int(np.searchsorted(ids, id_.encode()))
    return place < len(ids) and ids[place].decode() == id_


def _by_passage(group: pa.Table) -> pa.Table:
    """Makes a row of each passage, with its queries in the order of their ids."""
    rows: dict[str, dict[str, Any]] = {}
    for row in group.sort_by([("passage_id", "ascending"), ("query_id", "ascending")]).to_pylist():
        passage = rows.setdefault(
            row["passage_id"],
            {"passage_id": row["passage_id"], "query_ids": [], "queries": [], "tasks": []},
        )
        if row["query_id"] is None:
            passage |= {"title": row["title"], "text": row["text"]}
        else:
            passage["query_ids"].append(row["query_id"])
            passage["queries"].append(row["query"])
            passage["tasks"].append(row["task"])
    return pa.Table.from_pylist(list(rows.values()), schema=PAIRS)
