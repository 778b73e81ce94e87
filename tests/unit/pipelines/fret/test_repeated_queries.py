"""Which queries repeat earlier ones, against the whole list compared in one process."""

import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.artifacts import Artifact, unfinished_artifact, write_shards
from cluster.exchange import run_exchange
from cluster.file_list import FileList
from cluster.shard_groups import shard_groups
from cluster.steps import StepContext
from cluster.storage import open_storage, read_table
from pipelines.corpus.near_duplicates import near_duplicates
from pipelines.fret.labelling import LABELLED, LABELS_SOURCE, sources_of
from pipelines.fret.repeated_queries import (
    NEARLY_REPEATS,
    REPEATS,
    FindRepeated,
    drop_repeated,
)

WORDS = [f"word{number}" for number in range(40)]


class NoProgress:
    def update(self, done: float, total: float | None = None, note: str = "") -> None: ...


def stored(folder: Path, table: pa.Table, rows_per_shard: int) -> Artifact:
    storage = open_storage(folder)
    return unfinished_artifact(storage, FileList.of(write_shards(storage, table, rows_per_shard)))


def dropped(
    folder: Path,
    queries: Sequence[str | None],
    *,
    num_partitions: int = 3,
    rows_per_shard: int = 7,
    threshold: float = 0.8,
) -> dict[int, str]:
    """What is dropped; None is a query that something else has dropped."""
    columns = {
        "place": range(len(queries)),
        "query": [query or "to and fro the bee flew" for query in queries],
        "dropped_by": [None if query else "too short" for query in queries],
    }
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    # They lie in the order of a hash of their ids.
    random.Random(1).shuffle(rows)
    labels = stored(folder / "labels", pa.Table.from_pylist(rows, schema=LABELLED), rows_per_shard)
    context = StepContext(storage=open_storage(folder / "alike"), inputs={}, progress=NoProgress())
    find = FindRepeated(num_partitions=num_partitions, threshold=threshold)
    run_exchange(find, list(sources_of(LABELS_SOURCE, labels)), context)
    alike = unfinished_artifact(context.storage, context.log.files())
    files = drop_repeated(alike, open_storage(folder / "dropped"))
    tables = [read_table(open_storage(folder / "dropped"), file.path) for file in files]
    return {row["place"]: row["reason"] for table in tables for row in table.to_pylist()}


def in_memory(queries: Sequence[str | None], threshold: float) -> dict[int, str]:
    found: dict[int, str] = {}
    first: dict[str, int] = {}
    for place, query in enumerate(queries):
        if query and first.setdefault(query.casefold(), place) != place:
            found[place] = REPEATS
    places = list(first.values())
    near = near_duplicates(list(first), threshold)
    return found | {places[number]: NEARLY_REPEATS for number in near}


def drifting(seed: int, number: int) -> list[str | None]:
    """Queries of which many are another with a word changed, or in other letters, in chains."""
    draw = random.Random(seed)
    queries: list[str | None] = []
    for _ in range(number):
        words = (draw.choice(queries) or "").split() if queries and draw.random() < 0.7 else []
        if not words:
            words = draw.choices(WORDS, k=draw.randrange(1, 30))
        elif draw.random() < 0.7:
            words[-1] = draw.choice(WORDS)
        query = " ".join(words)
        queries.append(draw.choice([query, query.upper(), None, query]))
    return queries


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_same_queries_are_dropped_as_by_the_whole_list(
    threshold: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = drifting(0, 150)
    expected = in_memory(queries, threshold)
    assert {*expected.values()} == ({REPEATS, NEARLY_REPEATS} if threshold < 1 else {REPEATS})
    assert dropped(tmp_path / "one", queries, num_partitions=1, threshold=threshold) == expected
    monkeypatch.setattr(shard_groups, "__defaults__", (1,))
    made = dropped(
        tmp_path / "many", queries, num_partitions=5, rows_per_shard=50, threshold=threshold
    )
    assert made == expected


def test_many_that_are_alike_are_compared_with_the_first_alone(tmp_path: Path) -> None:
    many = [f"{' '.join(WORDS)} number {number}" for number in range(30)]
    assert dropped(tmp_path, many) == dict.fromkeys(range(1, 30), NEARLY_REPEATS)
    num_rows = sum(file.num_rows or 0 for file in _alike(tmp_path))
    assert num_rows <= 30 * 12  # of twelve bands


def _alike(folder: Path) -> FileList:
    storage = open_storage(folder / "alike")
    context = StepContext(storage=storage, inputs={}, progress=NoProgress())
    return context.log.files()


def test_nothing_is_dropped_where_nothing_is_alike(tmp_path: Path) -> None:
    assert dropped(tmp_path, ["what makes bread rise", None, "how do bees dance"]) == {}
