"""Files of a run, on a disk or on S3, behind one small interface.

Steps run on any node of a cluster, so nothing but a storage URI may tie them together. Every write
is atomic: a reader sees the whole file or none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol
from urllib.parse import unquote

from cluster.errors import StorageError, excerpt
from cluster.files import DescribedWriter, FileEntry, StoredFile, checked_path, join
from cluster.local_storage import LocalStorage
from cluster.parquet import parquet_table
from cluster.s3_storage import S3Storage

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "LocalStorage",
    "S3Storage",
    "Storage",
    "file_versions",
    "join",
    "open_storage",
    "read_table",
]
__all__ += ["write_table"]

_READERS = 8  # files that are read for their versions at once


class Storage(Protocol):
    """A folder addressed by a URI.

    Every `path` is relative to it, uses forward slashes and stays within it: a StorageError refuses
    one that begins with a slash or has an empty part, `.` or `..`, be it given, or a key on S3.
    """

    uri: str

    def read_bytes(self, path: str) -> bytes:
        """Returns the whole file; raises FileNotFoundError."""

    def write_bytes(self, path: str, content: bytes) -> None:
        """Writes the whole file atomically, making parent folders."""

    def open(self, path: str) -> BinaryIO:
        """Opens a file to be read by ranges, of which no others travel; raises FileNotFoundError.

        All ranges are those of one version of the file.
        """

    def writing(self, path: str) -> AbstractContextManager[DescribedWriter]:
        """Gives a file to write to, which is at `path` once the block has ended without an error.

        Nothing larger than some megabytes is kept in memory on the way.
        """

    def upload(self, source: Path, path: str) -> None:
        """Copies one local file to `path` atomically."""

    def download(self, path: str, target: Path) -> None:
        """Copies one file to the local `target`; raises FileNotFoundError."""

    def list(self, prefix: str = "") -> list[str]:
        """Returns the sorted paths of all whole files below the folder `prefix`."""

    def scan(self, prefix: str = "") -> Iterator[StoredFile]:
        """Yields all whole files below the folder `prefix` with their sizes, in no order.

        On S3 a request tells of a thousand of them, with their versions.
        """

    def entries(self) -> Iterator[str]:
        """Yields the names of the files and folders that lie right in it, in no order."""

    def exists(self, path: str) -> bool:
        """Says whether the file is there."""

    def find(self, path: str) -> StoredFile | None:
        """Returns the file as a listing shows it, or None."""

    def size(self, path: str) -> int:
        """Returns the file's bytes; raises FileNotFoundError."""

    def delete(self, prefix: str) -> None:
        """Deletes a file, or a folder with all it holds; nothing there is no error."""

    def version(self, path: str) -> str:
        """Returns a short text that changes with the file's content."""


_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(?://([^/]*))?(.*)", re.DOTALL)


def open_storage(uri: str | Path) -> Storage:
    """Opens the folder that `uri` names: a path, `file:///path` or `s3://bucket/prefix`.

    A `#` or `?` is a part of the name; only `%` in a file URI stands for something else.

    Raises:
        StorageError: The scheme is none of these, or an S3 URI names no bucket, or has a part that
            is empty, `.` or `..`.
    """
    text = str(uri)
    parts = _URI.fullmatch(text)
    if not parts:
        return LocalStorage(Path(text))
    scheme, host, path = parts[1].lower(), parts[2], parts[3]
    if "@" in (host or ""):  # not repeated: errors reach logs
        raise StorageError(
            "the storage URI holds credentials, which logs would show: leave them out, and give"
            " them to the machine by its environment or an instance profile"
        )
    given = f"storage {excerpt(text)!r}"
    if scheme == "file":
        if host not in (None, "", "localhost"):
            raise StorageError(f"{given}: write file:///{excerpt(host + path)}, or a path")
        return LocalStorage(Path(unquote(path)))
    if scheme == "s3":
        if not host:
            raise StorageError(f"{given} names no bucket: write s3://BUCKET/PREFIX")
        prefix = path[1:].rstrip("/")
        return S3Storage(host, prefix and checked_path(prefix, given))
    raise StorageError(
        f"{given} has the scheme {scheme!r}: accepted are a folder, file:// and s3:// (a folder of"
        " that name is written with ./ before it)"
    )


def file_versions(storage: Storage, paths: Sequence[str]) -> list[tuple[str, str]]:
    """Returns files and their versions; those of several on S3 by a listing, a thousand at once.

    On a disk several files are read at a time, for it is their content that counts.
    """
    listed: dict[str, str | None] = {}
    if len(paths) > 1 and isinstance(storage, S3Storage):
        wanted = frozenset(paths)
        listed = {file.path: file.version for file in storage.scan() if file.path in wanted}
    with ThreadPoolExecutor(_READERS) as pool:
        versions = pool.map(lambda path: listed.get(path) or storage.version(path), paths)
        return list(zip(paths, versions, strict=True))


def read_table(storage: Storage, path: str, columns: list[str] | None = None) -> pa.Table:
    """Reads one Parquet file; of one with more columns only those that are asked for.

    Raises:
        FileNotFoundError: It is not there.
        StorageError: It is not Parquet, lacks a column, or has one of an extension type.
    """
    with storage.open(path) as file:
        return parquet_table(file, columns, join(storage.uri, path))


def write_table(
    storage: Storage, path: str, table: pa.Table, rows_per_group: int | None = None
) -> FileEntry:
    """Writes one Parquet file atomically, and describes it.

    Whoever reads some of its rows decodes `rows_per_group` of them at once; Arrow's default is all.
    """
    import pyarrow.parquet as pq  # here, since encoders and training steps go without it

    with storage.writing(path) as file:
        pq.write_table(table, file, compression="zstd", row_group_size=rows_per_group)
    return file.entry(table.num_rows)
