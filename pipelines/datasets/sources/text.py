"""Plain text: a file is a document, and one that is long is several."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from cluster.errors import Reject
from pipelines.datasets.documents import Document
from pipelines.datasets.sources.streams import (
    MAX_ROW_BYTES,
    PACKED,
    Source,
    bounded_lines,
    too_long,
)


def texts(source: Source) -> Iterator[Document | Reject]:
    """Yields the file's text, in parts of at most MAX_ROW_BYTES that end where lines do."""
    path = PurePosixPath(source.name)
    title = PurePosixPath(path.stem).stem if path.suffix.lower() in PACKED else path.stem
    with source.stream() as stream:
        lines: list[bytes] = []
        start = size = number = 0
        for number, line in enumerate(bounded_lines(stream), start=1):
            if line is None:
                yield f"{source.name}:{number}", too_long("a line"), ""
                continue
            if size + len(line) > MAX_ROW_BYTES:
                yield _document(source.name, start, title, lines)
                start, size, lines = number, 0, []
            lines.append(line)
            size += len(line)
    if lines or not number:
        yield _document(source.name, start, title, lines)


def _document(name: str, start: int, title: str, lines: list[bytes]) -> Document | Reject:
    """Returns a part as a document; those behind the first are named by the line they start at."""
    where = f"{name}:{start}" if start else name
    try:
        text = b"".join(lines).decode("utf-8" if start else "utf-8-sig")
    except UnicodeDecodeError as error:
        return where, "not UTF-8", f"byte {error.start} of {where}"
    return Document(name=where, title=title, text=text)
