"""One spill and one merge, without Ray, on a disk and on S3."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster import exchange
from cluster.errors import StorageError
from cluster.exchange import PARTITION, Exchange, Shared, run_tasks
from cluster.file_list import shard_path
from cluster.storage import S3Storage, Storage, open_storage, read_table


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(tmp_path / "run")
    return open_storage(request.getfixturevalue("bucket") + "/some/run")


@dataclass(frozen=True, kw_only=True)
class Words(Exchange):
    order: tuple[str, ...] = ("word",)

    def split(self, source: list[tuple[int, str, int]]) -> pa.Table:
        places, words, numbers = zip(*source, strict=True) if source else ([], [], [])
        columns = [pa.array(places, pa.int64()), pa.array(words, pa.string())]
        return pa.table(
            [*columns, pa.array(numbers, pa.int64())], names=[PARTITION, "word", "number"]
        )

    def merge(self, rows: pa.Table) -> tuple[pa.Table, dict[str, int]]:
        return rows.filter(pa.compute.not_equal(rows["word"], "none")), {"num": rows.num_rows}


def test_partition_holds_its_rows_of_all_sources_in_their_order(storage: Storage) -> None:
    sources: list[Any] = [
        [(2, "b", 1), (0, "none", 2), (2, "a", 3), (3, "z", 4)],
        [],
        [(3, "z", 5), (2, "a", 6), (2, "b", 7), (2, "b", 8)],
    ]
    words, spills = Words(num_partitions=4), open_storage(f"{storage.uri}/work")
    for number, source in enumerate(sources):
        exchange._split(words, number, source, spills)
    made = [exchange._merge(words, n, len(sources), spills, storage) for n in range(4)]
    assert made[0] is None  # nothing is left of it
    assert made[1] is None  # it has no rows
    assert [counts for _, counts in filter(None, made)] == [{"num": 5}, {"num": 2}]
    assert made[2] is not None and made[2][0].path == shard_path(2)
    assert read_table(storage, shard_path(2)).to_pydict() == {
        "word": ["a", "a", "b", "b", "b"],
        "number": [3, 6, 1, 7, 8],
    }
    assert read_table(storage, shard_path(3))["number"].to_pylist() == [4, 5]
    with pytest.raises(StorageError, match="is no spill of 5 partitions"):
        exchange._read_spill(spills, exchange._spill_path(0), 4, 5)


def test_partition_is_read_without_the_others(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(bucket)
    assert isinstance(storage, S3Storage)
    words = Words(num_partitions=50)
    alphabet = [f"{number * 7919 % 10_007:05d}" * 40 for number in range(10_000)]
    source = [(number % 50, text, number) for number, text in enumerate(alphabet)]
    exchange._split(words, 0, source, storage)
    size = storage.size(exchange._spill_path(0))
    read = list[int]()
    get = storage._get

    def noted(*given: Any, **options: Any) -> Any:
        answer, content = get(*given, **options)
        read.append(len(content))
        return answer, content

    monkeypatch.setattr(storage, "_get", noted)
    rows = exchange._read_spill(storage, exchange._spill_path(0), 7, 50)
    assert rows is not None and rows["number"].to_pylist() == list(range(7, 10_000, 50))
    assert (len(read) <= 2 and sum(read) < size / 2) or size < 1 << 17


def test_without_ray_this_process_does_the_work() -> None:
    value = Shared.of({"a": 1})
    assert list(run_tasks(lambda number: value.get()["a"] + number, iter([(1,), (2,)]))) == [2, 3]
