"""The step `pairs`: what the LLM will score, sorted by passage over the whole run.

A passage is a candidate of many queries. Sorted so, the LLM reads it once, wherever in the run its
queries stand, and every shard brings the texts that its scoring needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.artifacts import Json
from cluster.exchange import PARTITION, Exchange, Shared, run_exchange, run_tasks
from cluster.key_filter import KeyFilter, codes
from cluster.shard_groups import ShardGroup, shard_groups
from cluster.steps import Step, StepContext
from pipelines.records import PAIRS

if TYPE_CHECKING:
    from pipelines.recipe.recipe import Recipe

TITLE = "sort what to score by passage"

_ROWS = pa.schema(
    [
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
    """Groups (query, candidate) pairs and the candidates' texts by passage, in an exchange.

    Passage ids are hashes, so equal ranges of them make shards of about equal size. Of each query
    the nearest `num_scored` candidates are scored, the seed among them.

    Args:
        num_scored: Candidates of each query.
        context: With the inputs `candidates` and `passages`; its storage gets the shards.
        queries: Whose pairs.
        num_shards: As many as there are of candidates if None.
    """
    candidates = context.input("candidates")
    sources = [*shard_groups(candidates), *shard_groups(context.input("passages"))]
    asking = ((group, num_scored, queries) for group in shard_groups(candidates))
    wanted = KeyFilter.of(candidates.num_rows * num_scored, run_tasks(_wanted_codes, asking))
    pairs = _Pairs(
        num_partitions=num_shards or candidates.num_shards,
        order=("passage_id", "query_id"),
        num_scored=num_scored,
        queries=queries,
        wanted=Shared.of(wanted),
    )
    return {"num_passages": 0, "num_pairs": 0} | run_exchange(pairs, sources, context)


@dataclass(frozen=True, kw_only=True)
class _Pairs(Exchange):
    """Pairs meet the texts of their passages.

    Attributes:
        num_scored: Candidates of each query.
        queries: Whose pairs.
        wanted: A `KeyFilter` of the passages that have pairs, so that the texts of most others do
            not travel.
    """

    num_scored: int
    queries: Queries
    wanted: Shared

    def split(self, source: ShardGroup) -> pa.Table:
        """Returns the pairs of candidates, or passages."""
        rows: list[dict[str, Any]] = []
        for table in source.tables():
            if "candidate_ids" in table.schema.names:
                rows += _pairs(table, self.num_scored, self.queries)
            else:
                rows += [{"passage_id": r["id"], **r} for r in self._wanted(table).to_pylist()]
        places = [int(row["passage_id"][:8], 16) * self.num_partitions >> 32 for row in rows]
        table = pa.Table.from_pylist(rows, schema=_ROWS)
        return table.append_column(PARTITION, pa.array(places, pa.int64()))

    def merge(self, rows: pa.Table) -> tuple[pa.Table, dict[str, int]]:
        """Makes a row of each passage that has pairs, with its queries in the order of ids."""
        table = _by_passage(rows)
        num_pairs = sum(map(len, table["query_ids"].to_pylist()))
        return table, {"num_passages": table.num_rows, "num_pairs": num_pairs}

    def _wanted(self, passages: pa.Table) -> pa.Table:
        passed = self.wanted.get().passes(codes(passages["id"].to_pylist()))
        return passages.filter(pa.array(passed, pa.bool_()))


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


def _wanted_codes(candidates: ShardGroup, num_scored: int, queries: Queries) -> np.ndarray:
    """Returns the codes of the passages that the queries have pairs with."""
    parts = [
        codes([row["passage_id"] for row in _pairs(table, num_scored, queries)])
        for table in candidates.tables()
    ]
    return np.unique(np.concatenate(parts))


def _by_passage(sorted_rows: pa.Table) -> pa.Table:
    """Makes a row of each passage that has queries, of rows that are sorted by passage."""
    has_query = sorted_rows["query_id"].is_valid()
    wanted = sorted_rows["passage_id"].filter(has_query).unique()
    kept = sorted_rows.filter(pc.is_in(sorted_rows["passage_id"], value_set=wanted))
    rows: dict[str, dict[str, Any]] = {}
    for row in kept.to_pylist():
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
