import gc
import time
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


@pytest.fixture(scope="session")
def assert_linear() -> Callable[..., None]:
    """Asserts that a call takes no more than in proportion to the length of its text.

    The text is a unit, again and again, between a head and a tail; it is doubled twice.
    """

    def seconds(call: Callable[[str], object], text: str) -> float:
        def once() -> float:
            begin = time.thread_time()
            call(text)
            return time.thread_time() - begin

        gc.disable()  # it looks through whatever the tests before have left
        try:
            return min(once() for _ in range(3))
        finally:
            gc.enable()

    def check(
        call: Callable[[str], object],
        unit: str,
        *,
        head: str = "",
        tail: str = "",
        size: int = 8000,
    ) -> None:
        for _ in range(8):  # another process may have the caches
            long = head + unit * (4 * size // len(unit)) + tail
            taken = seconds(call, long)
            if taken < 0.004:  # of a megabyte: four seconds at most, were it quadratic
                return
            text = head + unit * (size // len(unit)) + tail
            ratio = taken / max(seconds(call, text), 1e-6)
            if ratio < 10:  # linear: 4, quadratic: 16
                return
        raise AssertionError(f"{call} takes {ratio:.0f} times as long for 4 times {unit!r}")

    return check
