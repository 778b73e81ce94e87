"""Files of a source as streams: unpacked on the way, and never more than some MiB in memory."""

from __future__ import annotations

import io
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import BinaryIO, Protocol, cast

from cluster.errors import excerpt
from cluster.row_files import utf8_name
from cluster.storage import LocalStorage, S3Storage, Storage

PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}

MAX_ROW_BYTES = 16 << 20
"""Of a line, a row, a value of JSON, a record of an archive, a page."""

MAX_UNPACKED = 200
"""How many times its size a packed file may unpack to: texts reach 20."""

FREE_BYTES = 64 << 20
"""So much any file may unpack to, however small it is."""

HEAD_BYTES = 1 << 20
"""So much of a file, at most, says what the rest is."""

_STEP_BYTES = 16 << 10  # so much less may come of a truncated file than it holds
_RANGE_BYTES = 8 << 20  # of a file on S3, which a request asks for where it is read in order


class Unreadable(Exception):
    """The rest of a file cannot be read; the message is the reason of its reject."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A part of a file: the rows that begin in it, which one task reads.

    Attributes:
        start: Its first byte.
        stop: The byte behind it.
        num_before: What `count_lines` counts in all spans before.
    """

    start: int
    stop: int
    num_before: int = 0


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file of a corpus.

    Attributes:
        storage: The folder that it lies in.
        path: Where, in that folder.
        version: The one that is read, where a listing told it.
        span: What is read of it; all, if None.
        fields: The columns that are wanted of it, where it has columns.
        columns: The columns that are there are added to these.
        passed_over: Counts the records of an archive that are no pages, by what they are.
    """

    storage: Storage
    path: str
    version: str | None = None
    span: Span | None = None
    fields: tuple[str, ...] = ()
    columns: dict[str, None] = field(default_factory=dict)
    passed_over: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        """The path as UTF-8 can write it, which the names of its documents begin with."""
        return utf8_name(self.path)

    @property
    def packing(self) -> str | None:
        """How it is packed, by its name's end."""
        return PACKED.get(PurePosixPath(self.path.lower()).suffix)

    @contextmanager
    def stream(self) -> Iterator[BinaryIO]:
        """Gives the file's bytes, unpacked as they are read; what is packed has no places."""
        with self._opened() as content:
            if self.packing:
                content = io.BufferedReader(_Unpacked(content, self.packing), HEAD_BYTES)
            yield content

    @contextmanager
    def file(self, *, unpack: bool = True, in_order: bool = True) -> Iterator[BinaryIO]:
        """Gives the file to be read at any place.

        Args:
            unpack: A packed one, which is unpacked to this machine's disk.
            in_order: It is mostly read from its beginning to its end; if not, S3 is asked for what
                is read alone.
        """
        if unpack and self.packing:
            with self.local_file() as path, path.open("rb") as content:
                yield content
        else:
            with self._opened(in_order) as content:
                yield content

    @contextmanager
    def local_file(self) -> Iterator[Path]:
        """Gives the file on this machine's disk, unpacked."""
        if isinstance(self.storage, LocalStorage) and not self.packing:
            yield self.storage.folder / self.path
            return
        with TemporaryDirectory(prefix="tokay-source-") as folder:
            file = Path(folder, "file")
            with self.stream() as content, file.open("wb") as target:
                shutil.copyfileobj(content, target, 1 << 20)
            yield file

    @contextmanager
    def _opened(self, in_order: bool = True) -> Iterator[BinaryIO]:
        if isinstance(self.storage, S3Storage):
            reader = _FailureKept(self.storage.open(self.path, self.version))
            try:
                content = io.BufferedReader(reader, _RANGE_BYTES) if in_order else reader
                yield cast(BinaryIO, content)
            finally:
                if reader.failure is not None:
                    raise reader.failure
            return
        assert isinstance(self.storage, LocalStorage)
        try:
            file = (self.storage.folder / self.path).open("rb", buffering=HEAD_BYTES)
        except OSError as error:
            raise Unreadable(f"cannot be read: {excerpt(error.strerror)}") from error
        with file:
            yield file


def head(stream: BinaryIO) -> bytes:
    """Returns some of what comes next in a stream, which stays there; as much wherever it lies."""
    ahead: bytes = stream.peek(1)[:HEAD_BYTES]  # type: ignore[attr-defined]
    return ahead


def bounded_lines(stream: BinaryIO, num_bytes: int | None = None) -> Iterator[bytes | None]:
    r"""Yields the lines, which end at ``\n`` alone; None for one of more than MAX_ROW_BYTES.

    With `num_bytes` those that begin within so many bytes.
    """
    left = sys.maxsize if num_bytes is None else num_bytes
    while left > 0 and (line := stream.readline(MAX_ROW_BYTES + 1)):
        left -= len(line)
        if len(line) <= MAX_ROW_BYTES:
            yield line
            continue
        left -= _pass_line(stream, line)
        yield None


def span_lines(stream: BinaryIO, span: Span | None) -> tuple[int, Iterator[bytes | None]]:
    """Returns the number of a span's first line, and the lines as `bounded_lines` does."""
    if span is None:
        return 1, bounded_lines(stream)
    if span.start == 0:
        return 1, bounded_lines(stream, span.stop)
    stream.seek(span.start - 1)  # a line begins at the span's first byte if this one ends another
    passed = _pass_line(stream)
    return span.num_before + 2, bounded_lines(stream, span.stop - span.start + 1 - passed)


def count_lines(source: Source) -> int:
    """Counts the ends of lines from the byte before a source's span to the one before its last."""
    span = source.span
    assert span is not None
    place, num = max(0, span.start - 1), 0
    with source.stream() as stream:
        stream.seek(place)
        while part := stream.read(min(1 << 20, span.stop - 1 - place)):
            num += part.count(b"\n")
            place += len(part)
    return num


def _pass_line(stream: BinaryIO, line: bytes = b"") -> int:
    """Passes over the rest of a line; returns its bytes."""
    passed = 0
    while not line.endswith(b"\n") and (line := stream.readline(1 << 20)):
        passed += len(line)
    return passed


class Readable(Protocol):
    """What gives bytes, at most `size` at a time and none at its end."""

    def read(self, size: int, /) -> bytes: ...  # noqa: D102


def read_bounded(stream: Readable) -> bytes:
    """Returns what can be read of the rest of a stream; of a longer one, over MAX_ROW_BYTES."""
    content = bytearray()
    with suppress(OSError, ValueError, EOFError):  # what is missing shows in the length
        while len(content) <= MAX_ROW_BYTES and (part := stream.read(1 << 20)):
            content += part
    return bytes(content)


def too_long(what: str) -> str:
    """Returns the reason of what is longer than MAX_ROW_BYTES."""
    return f"{what} of more than {MAX_ROW_BYTES >> 20} MiB"


class _FailureKept(io.RawIOBase):
    """A file that remembers why it could not be read: a library may take that for broken data."""

    def __init__(self, content: BinaryIO) -> None:
        self.failure: Exception | None = None
        self._content = content

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._content.seek(offset, whence)

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self.failure is not None:
            raise self.failure
        try:
            content = self._content.read(len(buffer))
        except Exception as error:
            self.failure = error
            raise
        buffer[: len(content)] = content
        return len(content)


class _Unpacked(io.RawIOBase):
    """What a packed file holds, as long as that is no bomb."""

    def __init__(self, packed: BinaryIO, packing: str) -> None:
        import pyarrow as pa

        self._left = max(FREE_BYTES, MAX_UNPACKED * packed.seek(0, io.SEEK_END))
        packed.seek(0)
        self._unpacking = pa.CompressedInputStream(pa.PythonFile(packed, "r"), packing)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            content: bytes = self._unpacking.read(min(len(buffer), _STEP_BYTES))
        except OSError as error:
            raise Unreadable(f"cannot be unpacked: {excerpt(error)}") from error
        self._left -= len(content)
        if self._left < 0:
            raise Unreadable(f"unpacks to more than {MAX_UNPACKED} times its size")
        buffer[: len(content)] = content
        return len(content)
