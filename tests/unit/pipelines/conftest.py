from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from pipelines.records import SCORES

Row = dict[str, Any]


@pytest.fixture(scope="session")
def by_passage() -> Callable[[list[Row]], pa.Table]:
    """Turns queries with the scores of their first candidates into the table of step `scores`."""

    def table(queries: list[Row]) -> pa.Table:
        rows: dict[str, Row] = {}
        for query in queries:
            scored = zip(
                query["candidate_ids"],
                query["query_likelihoods"],
                query["relevances"],
                strict=False,
            )
            for id_, ql, rc in scored:
                row = rows.setdefault(id_, {name: [] for name in SCORES.names})
                row["passage_id"] = id_
                row["query_ids"].append(query["id"])
                row["query_likelihoods"].append(ql)
                row["relevances"].append(rc)
                row["errors"].append(None if ql is not None else "too long")
        return pa.Table.from_pylist([rows[id_] for id_ in sorted(rows)], schema=SCORES)

    return table
