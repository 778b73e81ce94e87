"""Lines of files that strangers wrote, perhaps packed: each one, or why it cannot be read."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from typing import IO

from cluster.errors import Reject, UserError

GZIP = ".gz"
_SHOWN = 200  # characters of a line that a reject keeps


def unpacked(stream: IO[bytes], place: str) -> Iterator[bytes]:
    r"""Yields the lines of a file, which end at ``\n`` alone; of a ``.gz``, of what it holds.

    Args:
        stream: The file; closed at the end.
        place: Its name.

    Raises:
        UserError: It cannot be unpacked.
    """
    with stream:
        if not place.endswith(GZIP):
            yield from stream
            return
        try:
            with gzip.open(stream) as content:
                yield from content
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{place} cannot be unpacked: {error}; pack it again") from error


def text_lines(lines: Iterable[bytes], place: str) -> Iterator[tuple[str, str] | Reject]:
    """Yields ``file:line`` and each line without its end; blank ones are left out."""
    for number, line in enumerate(lines, start=1):
        where = f"{place}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            yield where, "not UTF-8", line[:_SHOWN].decode("utf-8", "replace")
            continue
        if text.strip():
            yield where, text.rstrip("\r\n")
