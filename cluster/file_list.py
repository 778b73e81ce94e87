"""Lists of files, millions of them, as the processes that wrote them describe them.

Whoever writes a shard knows its rows, bytes and checksum. Told once, they need not be read again: a
list of them is Parquet beside the manifest, about a hundred bytes a file.
"""

from __future__ import annotations

import io
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.errors import StorageError, excerpt
from cluster.files import FileEntry, StoredFile, checked_path
from cluster.parquet import parquet_table

FILES = pa.schema(
    [
        ("path", pa.string()),
        ("num_rows", pa.int64()),  # null where a file is not a Parquet shard
        ("num_bytes", pa.int64()),
        ("sha256", pa.binary(32)),
    ]
)
_SHARD = r"\A(shards|rejects)/[0-9]{9}\.parquet\z"
_MAX_SHARDS = 10**9


def shard_path(number: int, kind: str = "shards") -> str:
    """Returns the path of shard `number` below its step's folder; such names sort as numbers do."""
    if not 0 <= number < _MAX_SHARDS:
        raise ValueError(f"shard {number}: there are shards 0 to {_MAX_SHARDS - 1}")
    return f"{kind}/{number:09d}.parquet"


def shard_number(path: str) -> int:
    """Returns the number of the shard that has this path below its step's folder."""
    return int(path.rpartition("/")[2].removesuffix(".parquet"))


class FileList(Sequence[FileEntry]):
    """Files sorted by path, in Arrow; a slice shares the memory of the whole."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()

    @classmethod
    def of(cls, files: Iterable[FileEntry]) -> FileList:
        """Sorts descriptions by path; the last of those with one path holds."""
        return cls.from_table(files_table(files))

    @classmethod
    def from_table(cls, table: pa.Table) -> FileList:
        """Sorts rows of `FILES` by path; the last of those with one path holds."""
        numbered = table.append_column("number", pa.array(np.arange(table.num_rows)))
        latest = numbered.group_by("path").aggregate([("number", "max")])["number_max"]
        return cls(table.take(latest).sort_by("path"))

    @classmethod
    def from_parquet(cls, content: bytes, place: str) -> FileList:
        """Reads a list, which anybody may have written.

        Raises:
            StorageError: It is not one, is not sorted, or names a file outside its folder.
        """
        table = parquet_table(content, None, place)
        if not table.schema.equals(FILES):
            raise StorageError(f"{place} has other columns than {', '.join(FILES.names)}")
        files = cls(table)
        files._check(place)
        return files

    def to_parquet(self) -> bytes:
        """Returns the list as Parquet, in row groups of 64 k files."""
        sink = io.BytesIO()
        pq.write_table(self._table, sink, compression="zstd", row_group_size=1 << 16)
        return sink.getvalue()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, index: int) -> FileEntry: ...

    @overload
    def __getitem__(self, index: slice) -> FileList: ...

    def __getitem__(self, index: int | slice) -> FileEntry | FileList:
        if isinstance(index, slice):
            start, stop, stride = index.indices(len(self))
            if stride != 1:
                raise ValueError(f"files [::{stride}]: a part of a list is a range of it")
            return FileList(self._table.slice(start, max(stop - start, 0)))
        number = range(len(self))[index]
        return _entry(*(column[number].as_py() for column in self._table.columns))

    def __iter__(self) -> Iterator[FileEntry]:
        for batch in self._table.to_batches(max_chunksize=1024):
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield _entry(*row)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FileList) and bool(self._table.equals(other._table))

    def __repr__(self) -> str:
        return f"FileList({len(self)} files)"

    @property
    def paths(self) -> pa.ChunkedArray:
        """The paths, in order."""
        return self._table["path"]

    @property
    def num_rows(self) -> int:
        """Rows of all Parquet shards."""
        return int(pc.sum(self._table["num_rows"]).as_py() or 0)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return int(pc.sum(self._table["num_bytes"]).as_py() or 0)

    def below(self, folder: str) -> FileList:
        """Returns the files below a folder, which is written with a slash at its end."""
        end = folder[:-1] + chr(ord("/") + 1)
        return self[self._place(folder) : self._place(end)]

    def find(self, path: str) -> FileEntry | None:
        """Returns the file of this path, if there is one, by binary search."""
        number = self._place(path)
        found = self[number] if number < len(self) else None
        return found if found and found.path == path else None

    def locate(self, files: Iterator[StoredFile]) -> Iterator[tuple[StoredFile, int | None]]:
        """Yields files of a listing, and the number of each in this list, if its path is there."""
        while some := list(islice(files, 10_000)):
            try:
                paths = pa.array([file.path for file in some], pa.string())
            except UnicodeEncodeError as error:
                raise _not_utf8(error) from error
            places = pc.index_in(paths, value_set=self.paths).to_pylist()
            yield from zip(some, places, strict=True)

    def filter(self, mask: np.ndarray) -> FileList:
        """Returns the files for which the mask is true."""
        return FileList(self._table.filter(pa.array(mask)))

    def without(self, other: FileList) -> FileList:
        """Returns the files whose paths are not in another list."""
        return FileList(self._table.filter(pc.invert(pc.is_in(self.paths, value_set=other.paths))))

    def plus(self, files: Iterable[FileEntry]) -> FileList:
        """Returns these files and others, which take the place of those with the same path."""
        return FileList.from_table(pa.concat_tables([self._table, files_table(files)]))

    def at_row(self, row: int) -> tuple[int, int]:
        """Returns the number of the file that holds a row of them all, and which of its rows it is.

        Raises:
            IndexError: There are not that many rows.
        """
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row}: there are {self.num_rows}")
        ends = self._ends
        number = bisect_right(ends, row)
        return number, row - (int(ends[number - 1]) if number else 0)

    @cached_property
    def _ends(self) -> np.ndarray:
        """The number of rows up to the end of each file."""
        return np.cumsum(pc.fill_null(self._table["num_rows"], 0).to_numpy())

    def _place(self, path: str) -> int:
        paths = self._table["path"]
        return bisect_left(range(len(self)), path, key=lambda number: paths[number].as_py())

    def _check(self, place: str) -> None:
        """Raises StorageError unless the list is sorted, and every path one of ours."""
        paths = self._table["path"].combine_chunks()
        counts = (self._table["num_rows"], self._table["num_bytes"])
        needed = (paths, self._table["num_bytes"], self._table["sha256"])
        if any(column.null_count for column in needed) or any(
            (pc.min(count).as_py() or 0) < 0 for count in counts
        ):
            raise StorageError(
                f"{place} has a file without a path, a checksum or a number of bytes"
            )
        if len(paths) > 1 and not pc.all(pc.less(paths[:-1], paths[1:])).as_py():
            raise StorageError(f"{place} is not sorted by path, or names a file twice")
        of_shards = pc.starts_with(paths, "shards/")
        of_shards = pc.or_(of_shards, pc.starts_with(paths, "rejects/"))
        wrong = pc.and_(of_shards, pc.invert(pc.match_substring_regex(paths, _SHARD)))
        if pc.any(wrong).as_py():
            first = paths.filter(wrong)[0].as_py()
            raise StorageError(f"{excerpt(first)!r} is no shards/NINE DIGITS.parquet")
        for path in paths.filter(pc.invert(of_shards)).to_pylist():
            checked_path(path, place)


def files_table(files: Iterable[FileEntry]) -> pa.Table:
    """Returns descriptions as rows of `FILES`, in the order given.

    Raises:
        StorageError: A name is not UTF-8.
    """
    rows = list(files)
    try:
        return pa.table(
            [
                [file.path for file in rows],
                [file.num_rows for file in rows],
                [file.num_bytes for file in rows],
                [bytes.fromhex(file.sha256) for file in rows],
            ],
            schema=FILES,
        )
    except UnicodeEncodeError as error:
        raise _not_utf8(error) from error


def _not_utf8(error: UnicodeEncodeError) -> StorageError:
    return StorageError(f"{excerpt(error.object)!r} is no name in UTF-8: rename the file")


def _entry(path: str, num_rows: int | None, num_bytes: int, sha256: bytes) -> FileEntry:
    return FileEntry(path=path, num_rows=num_rows, num_bytes=num_bytes, sha256=sha256.hex())
