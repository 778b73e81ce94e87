import pickle
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import StorageError
from cluster.file_list import FILES, FileList, files_table, shard_path
from cluster.files import FileEntry, StoredFile


def entry(path: str, num_rows: int | None = 1, num_bytes: int = 7) -> FileEntry:
    return FileEntry(path=path, num_rows=num_rows, num_bytes=num_bytes, sha256=f"{num_bytes:064x}")


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def test_names_of_shards_sort_as_their_numbers() -> None:
    numbers = [0, 9, 10, 99_999, 100_000, 1_000_000, 999_999_999]
    assert sorted(map(shard_path, numbers)) == list(map(shard_path, numbers))
    for number in (-1, 10**9):
        with pytest.raises(ValueError, match="there are shards 0 to 999999999"):
            shard_path(number)


def test_list_is_sorted_and_the_last_of_a_name_holds() -> None:
    given = [entry("shards/b", num_bytes=1), entry("a", None), entry("shards/b", num_bytes=2)]
    files = FileList.of(given)
    assert list(files) == [given[1], given[2]]
    assert (len(files), files.num_rows, files.num_bytes) == (2, 1, 9)
    assert list(files.plus([entry("b")])) == [given[1], entry("b"), given[2]]
    assert list(files.without(FileList.of([entry("a")]))) == [given[2]]
    assert len(FileList.of([])) == FileList.of([]).num_rows == 0


def test_file_is_found_by_name_and_folder() -> None:
    paths = ["rejects/000000000.parquet", *map(shard_path, range(3000)), "shards.txt", "z"]
    files = FileList.of(map(entry, paths))
    for path in paths:
        assert files.find(path) == entry(path)
    assert [files.find(path) for path in ("", "shards/", "shards/000003000.parquet", "zz")] == (
        [None] * 4
    )
    shards = files.below("shards/")
    assert [file.path for file in shards] == list(map(shard_path, range(3000)))
    assert shards[-1] == shards[2999] == entry(shard_path(2999))
    assert list(shards[5:7]) == [entry(shard_path(5)), entry(shard_path(6))]
    assert len(shards[7:5]) == len(files.below("nothing/")) == 0
    with pytest.raises(IndexError):
        shards[3000]
    with pytest.raises(ValueError, match="a range of it"):
        shards[::2]


def test_row_is_found_by_its_number_among_all() -> None:
    files = FileList.of(entry(shard_path(n), rows) for n, rows in enumerate([3, 0, 2, 0, 0, 1]))
    expected = [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (5, 0)]
    assert [files.at_row(row) for row in range(6)] == expected
    assert files[1:].at_row(0) == (1, 0)
    for row in (-1, 6):
        with pytest.raises(IndexError, match="there are 6"):
            files.at_row(row)


def test_listing_is_compared_with_the_list() -> None:
    files = FileList.of([entry("a", num_bytes=1), entry("b", num_bytes=2)])
    listed = [StoredFile(path=path, num_bytes=9, version=None) for path in ("b", "c", "a")]
    found = list(files.locate(iter(listed)))
    assert [(file.path, number) for file, number in found] == [("b", 1), ("c", None), ("a", 0)]
    assert list(files.filter(np.array([False, True]))) == [entry("b", num_bytes=2)]


def test_list_comes_back_as_it_was_written() -> None:
    files = FileList.of([entry("model.bin", None), entry(shard_path(1))])
    assert FileList.from_parquet(files.to_parquet(), "") == files
    assert pickle.loads(pickle.dumps(files)) == files


@pytest.mark.parametrize(
    "path",
    [
        "../../../private.parquet",
        "/private.parquet",
        "shards/../../../private.parquet",
        "shards/private.parquet",
        "shards/000000000.parquet/",
        "shards//000000000.parquet",
        "shards/-1.parquet",
        "shards/00000.parquet",
        "shards/0000000000.parquet",
        "shards/00000000\u0661.parquet",  # a digit, but none of ours
        "rejects/x/000000000.parquet",
        "rejects/000000000.parquet\n",
        "shards/x\nshards/000000000.parquet",
        "a\0b",
        "",
    ],
)
def test_list_that_names_a_file_elsewhere_is_refused(path: str) -> None:
    content = FileList.of([entry("model.bin"), entry(path)]).to_parquet()
    with pytest.raises(StorageError) as error:
        FileList.from_parquet(content, "run/files.parquet")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


TWO = files_table([entry("a"), entry("b")])
WRONG: dict[str, Callable[[], pa.Table]] = {
    "a column more": lambda: TWO.append_column("more", pa.array([1, 2])),
    "a column less": lambda: TWO.drop_columns(["num_rows"]),
    "other types": lambda: TWO.cast(FILES.set(0, pa.field("path", pa.large_string()))),
    "twice": lambda: pa.concat_tables([TWO, TWO]),
    "not sorted": lambda: TWO.take([1, 0]),
    "no path": lambda: TWO.set_column(0, "path", pa.array(["a", None], pa.string())),
    "no checksum": lambda: TWO.set_column(3, "sha256", pa.array([None] * 2, pa.binary(32))),
    "no size": lambda: TWO.set_column(2, "num_bytes", pa.array([None, 1], pa.int64())),
    "a negative size": lambda: TWO.set_column(2, "num_bytes", pa.array([-1, 1], pa.int64())),
    "negative rows": lambda: TWO.set_column(1, "num_rows", pa.array([1, -1], pa.int64())),
}


@pytest.mark.parametrize("make", WRONG.values(), ids=WRONG)
def test_list_of_another_form_is_refused(make: Callable[[], pa.Table]) -> None:
    with pytest.raises(StorageError, match=r"^run/files\.parquet "):
        FileList.from_parquet(parquet(make()), "run/files.parquet")
    assert FileList.from_parquet(parquet(TWO), "") == FileList(TWO)


def test_name_that_is_no_utf8_is_one_line() -> None:
    with pytest.raises(StorageError, match="no name in UTF-8"):
        FileList.of([entry("\udcff")])
