"""Files of a source as streams: unpacked on the way, and never more than some MiB in memory."""

from __future__ import annotations

import io
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import BinaryIO, Protocol

from cluster.errors import excerpt
from cluster.row_files import utf8_name
from cluster.storage import LocalStorage, Storage

PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}

MAX_ROW_BYTES = 16 << 20
"""Of a line, a row, a value of JSON, a record of an archive, a page."""

MAX_UNPACKED = 200
"""How many times its size a packed file may unpack to: texts reach 20."""

FREE_BYTES = 64 << 20
"""So much any file may unpack to, however small it is."""


_STEP_BYTES = 16 << 10  # so much less may come of a truncated file than it holds


class Unreadable(Exception):
    """The rest of a file cannot be read; the message is the reason of its reject."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file of a corpus.

    Attributes:
        storage: The folder that it lies in.
        path: Where, in that folder.
        fields: The columns that are wanted of it, where it has columns.
        columns: The columns that are there are added to these.
        passed_over: Counts the records of an archive that are no pages, by what they are.
    """

    storage: Storage
    path: str
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
    def local_file(self, *, unpack: bool = True) -> Iterator[Path]:
        """Gives the file on this machine's disk, unpacked unless told otherwise."""
        with TemporaryDirectory(prefix="tokay-source-") as folder:
            if isinstance(self.storage, LocalStorage):
                file = self.storage.folder / self.path
            else:
                file = Path(folder, "file")
                self.storage.download(self.path, file)
            if unpack and self.packing:
                unpacked = Path(folder, "unpacked")
                with _opened(file) as packed, unpacked.open("wb") as target:
                    shutil.copyfileobj(_Unpacked(packed, self.packing), target, 1 << 20)
                file = unpacked
            yield file

    @contextmanager
    def stream(self) -> Iterator[BinaryIO]:
        """Gives the file's bytes, unpacked as they are read."""
        with self.local_file(unpack=False) as file, _opened(file) as content:
            if self.packing:
                content = io.BufferedReader(_Unpacked(content, self.packing), 1 << 20)
            yield content


def bounded_lines(stream: BinaryIO) -> Iterator[bytes | None]:
    r"""Yields the lines, which end at ``\n`` alone; None for one of more than MAX_ROW_BYTES."""
    while line := stream.readline(MAX_ROW_BYTES + 1):
        if len(line) <= MAX_ROW_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(1 << 20)
        yield None


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


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    try:
        content = file.open("rb", buffering=1 << 20)
    except OSError as error:
        raise Unreadable(f"cannot be read: {excerpt(error.strerror)}") from error
    with content:
        yield content


class _Unpacked(io.RawIOBase):
    """What a packed file holds, as long as that is no bomb."""

    def __init__(self, packed: BinaryIO, packing: str) -> None:
        import pyarrow as pa

        self._unpacking = pa.CompressedInputStream(pa.PythonFile(packed, "r"), packing)
        self._left = max(FREE_BYTES, MAX_UNPACKED * os.fstat(packed.fileno()).st_size)

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
