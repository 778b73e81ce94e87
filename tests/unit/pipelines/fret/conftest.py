from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from cluster.artifacts import Json, write_shards
from cluster.steps import Step, StepContext
from pipelines.records import CANDIDATES, PASSAGE

PASSAGES = [
    {"id": id_, "title": "", "text": f"text {id_}", "source": id_} for id_ in ("a", "b", "c")
]


@pytest.fixture(scope="session")
def written() -> Callable[..., Step]:
    """Makes a step that writes a table, two rows a shard."""

    def step(
        name: str,
        table: pa.Table,
        inputs: tuple[str, ...] = (),
        metrics: dict[str, Json] | None = None,
    ) -> Step:
        def work(context: StepContext) -> dict[str, Json]:
            write_shards(context.storage, table, 2)
            return metrics or {}

        return Step(name=name, config={}, inputs=inputs, work=work)

    return step


@pytest.fixture(scope="session")
def mined(written: Callable[..., Step]) -> Callable[[list[dict[str, Any]]], list[Step]]:
    """Makes the steps `passages`, with a, b and c, and `candidates`, with the given rows."""

    def steps(rows: list[dict[str, Any]]) -> list[Step]:
        candidates = pa.Table.from_pylist(rows, schema=CANDIDATES)
        return [
            written("passages", pa.Table.from_pylist(PASSAGES, schema=PASSAGE)),
            written("candidates", candidates, ("passages",)),
        ]

    return steps
