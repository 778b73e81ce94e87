"""Files below a storage's folder: their paths, and what is known of one without opening it."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.errors import StorageError, excerpt


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file as a listing shows it.

    Attributes:
        path: Below its storage.
        num_bytes: Its size.
        version: Changes with its content; None where only reading it would tell, as on a disk.
    """

    path: str
    num_bytes: int
    version: str | None


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file as its writer describes it; `num_rows` is None where it is not a Parquet shard."""

    path: str
    num_bytes: int
    sha256: str
    num_rows: int | None = None


class _Sink(Protocol):
    def write(self, content: Any, /) -> object: ...


class DescribedWriter(io.RawIOBase):
    """What is written to a file, on its way there: counted and hashed."""

    def __init__(self, path: str, sink: _Sink) -> None:
        self._path, self._sink = path, sink
        self._hash, self._num_bytes = hashlib.sha256(), 0

    def writable(self) -> bool:
        """Says that it can be written to."""
        return True

    def write(self, content: Any, /) -> int:
        """Writes all of the bytes."""
        view = memoryview(content).cast("B")
        self._hash.update(view)
        self._sink.write(view)
        self._num_bytes += len(view)
        return len(view)

    def entry(self, num_rows: int | None = None) -> FileEntry:
        """Describes what was written so far."""
        return FileEntry(
            path=self._path,
            num_bytes=self._num_bytes,
            sha256=self._hash.hexdigest(),
            num_rows=num_rows,
        )


def checked_path(path: str, place: str) -> str:
    """Returns a relative path that stays within its folder, and is written in one way only.

    Raises:
        StorageError: It begins with a slash, or a part is empty, `.` or `..`, or holds a zero byte.
    """
    if "\0" in path or {"", ".", ".."}.intersection(path.split("/")):
        raise StorageError(
            f"{excerpt(place)} names {excerpt(path)!r}: a path must be relative, with no part that"
            " is empty, '.' or '..', so that it stays in its folder; rename it"
        )
    return path


def join(uri: str, *parts: str) -> str:
    """Returns the URI of a path below `uri`."""
    return "/".join([uri.rstrip("/"), *parts])
