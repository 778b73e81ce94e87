from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.errors import UserError
from cluster.file_list import shard_path
from cluster.parquet import row_groups_table
from cluster.storage import LocalStorage, Storage, read_table, write_table
from pipelines.records import EXAMPLE
from pipelines.training import examples
from pipelines.training.examples import (
    Batch,
    count_batches,
    iterate_batches,
    iterate_validation,
    own_rows,
)
from pipelines.training.place import Place


def write(folder: Path, shards: list[list[int]], rows_per_group: int | None = None) -> str:
    """Writes shards whose rows have these batch numbers; texts count through all rows."""
    number = 0
    for shard, batches in enumerate(shards):
        rows = []
        for batch in batches:
            rows.append(
                {
                    "batch": batch,
                    "dataset": "fret",
                    "query_tokens": [number, 1],
                    "positive_tokens": [number, 2, 2],
                    "negative_tokens": [[number, 3]] * (number % 3),
                    "teacher_scores": [] if number % 3 else [2.0],
                    "query_id": f"q{number}",
                    "positive_id": f"p{number}",
                    "symmetric": False,
                }
            )
            number += 1
        table = pa.Table.from_pylist(rows, schema=EXAMPLE)
        write_table(LocalStorage(folder), shard_path(shard), table, rows_per_group)
    return str(folder)


def read(uri: str, start: int = 0) -> list[tuple[int, list[str]]]:
    return [(batch.number, batch.query_ids) for batch in iterate_batches(uri, start)]


def test_batches_come_in_order_across_shards(tmp_path: Path):
    uri = write(tmp_path, [[0, 0, 1], [1, 1], [1, 2], [], [3]])
    assert read(uri) == [
        (0, ["q0", "q1"]),
        (1, ["q2", "q3", "q4", "q5"]),
        (2, ["q6"]),
        (3, ["q7"]),
    ]
    assert count_batches(uri) == 4


def test_batch_holds_its_columns(tmp_path: Path):
    _, batch = iterate_batches(write(tmp_path, [[0, 1, 1], [1]]))
    assert isinstance(batch, Batch)
    assert [row.tolist() for row in batch.queries] == [[1, 1], [2, 1], [3, 1]]
    assert [row.tolist() for row in batch.positives] == [[1, 2, 2], [2, 2, 2], [3, 2, 2]]
    negatives = [[row.tolist() for row in rows] for rows in batch.negatives]
    assert negatives == [[[1, 3]], [[2, 3], [2, 3]], []]
    assert batch.teacher_scores == [[], [], [2.0]]
    assert (batch.number, batch.dataset, batch.symmetric) == (1, "fret", False)
    assert (batch.query_ids, batch.positive_ids) == (["q1", "q2", "q3"], ["p1", "p2", "p3"])
    assert batch.num_tokens == 6 + 9 + 6


def test_held_out_batches_are_none_or_those_beside_the_shards(tmp_path: Path):
    uri = write(tmp_path, [[0]])
    assert list(iterate_validation(uri)) == []
    write(tmp_path / "validation", [[0, 0, 1]])
    assert [batch.query_ids for batch in iterate_validation(uri)] == [["q0", "q1"], ["q2"]]


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4])
def test_resumed_stream_is_the_rest_of_the_whole(tmp_path: Path, start: int):
    uri = write(tmp_path, [[0, 0, 1], [1, 1], [1, 2], [3]])
    assert read(uri, start) == read(uri)[start:]


def test_resumed_stream_reads_no_text_of_the_shards_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [[n, n] if n % 4 else [n, n + 1] if n % 8 else [] for n in range(40)]
    numbers = sorted({number for shard in shards for number in shard})
    shards = [[numbers.index(number) for number in shard] for shard in shards]
    uri = write(tmp_path, shards)
    whole, opened = read(uri), []

    def noted(storage: Storage, path: str, columns: list[str] | None = None) -> pa.Table:
        opened.append((path, True))
        return read_table(storage, path, columns)

    class Noted(examples._Shard):
        def __init__(self, storage: Storage, path: str) -> None:
            opened.append((path, False))
            super().__init__(storage, path)

    monkeypatch.setattr(examples, "read_table", noted)
    monkeypatch.setattr(examples, "_Shard", Noted)
    for start in (1, 7, 30, len(whole)):
        opened.clear()
        assert read(uri, start) == whole[start:]
        first = next((n for n, shard in enumerate(shards) if start in shard), len(shards))
        assert min((p for p, only in opened if not only), default="z") >= shard_path(first - 1)
        assert sum(only for _, only in opened) < 16


@pytest.mark.parametrize("world", [1, 2, 3, 9])
def test_worker_reads_its_own_rows_and_the_ids_of_all(tmp_path: Path, world: int) -> None:
    uri = write(tmp_path, [[0] * 5 + [1], [1, 1, 1, 2], [2] * 7], rows_per_group=2)
    whole = list(iterate_batches(uri))
    for number, batch in enumerate(whole):
        seen = []
        for rank in range(world):
            own = list(iterate_batches(uri, place=Place(rank=rank, world=world)))[number]
            assert (own.query_ids, own.positive_ids) == (batch.query_ids, batch.positive_ids)
            assert (own.dataset, own.num_examples) == (batch.dataset, batch.num_examples)
            rows = own.part.queries if own.part else slice(None)
            assert own.part or world == 1
            columns = zip(
                own.queries[rows],
                own.positives[rows],
                own.negatives[rows],
                own.teacher_scores[rows],
                strict=True,
            )
            seen += [repr(row) for row in columns]
        columns = zip(
            batch.queries, batch.positives, batch.negatives, batch.teacher_scores, strict=True
        )
        assert seen == [repr(row) for row in columns]


def test_worker_decodes_no_row_group_without_rows_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = write(tmp_path, [[0] * 16 + [1] * 16], rows_per_group=4)
    decoded: list[list[int]] = []

    def noted(file: Any, groups: Sequence[int], columns: Sequence[str], place: str) -> pa.Table:
        if "query_tokens" in columns:
            decoded.append(list(groups))
        return row_groups_table(file, groups, columns, place)

    monkeypatch.setattr(examples, "row_groups_table", noted)
    list(iterate_batches(uri, place=Place(rank=2, world=4)))
    assert decoded == [[2], [6]]
    decoded.clear()
    list(iterate_batches(uri))
    assert decoded == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_own_rows_are_all_rows_once() -> None:
    for size, world in ((7, 3), (3, 5), (8, 4), (0, 2)):
        spans = [own_rows(size, Place(rank=rank, world=world)) for rank in range(world)]
        assert [row for span in spans for row in range(size)[span]] == list(range(size))
        sizes = [span.stop - span.start for span in spans]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("shards", [[[0, 1, 0]], [[0], [2]], [[1, 1]]])
def test_rows_out_of_order_are_refused(tmp_path: Path, shards: list[list[int]]):
    with pytest.raises(UserError, match="not together"):
        read(write(tmp_path, shards))


def test_missing_examples_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="hold no row"):
        count_batches(write(tmp_path, [[]]))
