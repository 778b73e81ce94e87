"""Queries and the scores of their candidates, brought together by id."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.artifacts import Artifact
from pipelines.fret.fusion import SCORED
from pipelines.records import CANDIDATES

PAIR = pa.schema(
    [
        ("query_id", pa.string()),
        ("passage_id", pa.string()),
        ("ql", pa.float32()),
        ("rc", pa.float32()),
        ("ce", pa.float32()),
        ("error", pa.string()),
    ]
)
_OF_CANDIDATES = [field.name for field in CANDIDATES if pa.types.is_list(field.type)]


class QueryScores:
    """The pairs' scores, by query: 100 bytes a pair in memory."""

    def __init__(self, *artifacts: Artifact) -> None:
        """Reads the artifacts' shards, which are sorted by passage.

        What several of them say of a pair is brought together.
        """
        tables = [one_row_a_pair(table) for artifact in artifacts for table in artifact.tables()]
        self._pairs = pa.concat_tables([PAIR.empty_table(), *tables]).sort_by("query_id")
        self._query_ids = np.array(self._pairs["query_id"].to_pylist(), dtype=np.bytes_)

    def of(self, query_id: str) -> dict[str, dict[str, Any]]:
        """Returns a query's scores, by passage id, each with `ql`, `rc`, `ce` and `error`.

        What is not known is None; of a query that was not scored nothing is returned.
        """
        key = query_id.encode()
        start = int(np.searchsorted(self._query_ids, key))
        end = int(np.searchsorted(self._query_ids, key, side="right"))
        return of_one_query(self._pairs.slice(start, end - start).to_pylist())


def of_one_query(pairs: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the scores of a query's pairs by passage id; of one pair all rows are one."""
    found: dict[str, dict[str, Any]] = {}
    for row in pairs:
        known = {name: value for name, value in row.items() if value is not None}
        found[row["passage_id"]] = found.get(row["passage_id"], row) | known
    return found


def judged_first(row: dict[str, Any], judged: Collection[str]) -> dict[str, Any]:
    """Returns a row's columns of candidates, each id once, those that were judged first."""
    candidates = row["candidate_ids"]
    places = {id_: place for place, id_ in enumerate(candidates)}.values()  # of each id one
    order = sorted(places, key=lambda place: candidates[place] not in judged)
    columns = {name: row[name] for name in _OF_CANDIDATES}
    return {
        name: [column[place] for place in order] if column else []
        for name, column in columns.items()
    }


def with_scores(row: dict[str, Any], scored: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns a row's columns of candidates, and those of the pairs' scores.

    One that was not asked for is empty.

    Args:
        row: Of CANDIDATES.
        scored: What `QueryScores.of` returned for it, without an error; these come first.
    """
    columns = judged_first(row, scored)
    ids = [id_ for id_ in columns["candidate_ids"] if id_ in scored]
    for judge, name in SCORED.items():
        values = [scored[id_][judge] for id_ in ids]
        columns[name] = [] if None in values else values
    return columns


def one_row_a_pair(scores: pa.Table) -> pa.Table:
    """Returns a row of `PAIR` for each query of each passage."""
    parents = pc.list_parent_indices(scores["query_ids"])
    columns = {
        "query_id": pc.list_flatten(scores["query_ids"]),
        "passage_id": scores["passage_id"].take(parents),
        "error": pc.list_flatten(scores["errors"]),
    }
    for judge, name in SCORED.items():
        there = name in scores.column_names
        columns[judge] = pc.list_flatten(scores[name]) if there else pa.nulls(len(parents))
    return pa.table({name: columns[name] for name in PAIR.names}).cast(PAIR)
