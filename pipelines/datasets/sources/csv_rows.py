"""Rows of CSV (RFC 4180) and of TSV, which knows no quotes; the first line names the columns."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

from cluster.errors import Reject
from cluster.row_files import Row, short
from pipelines.datasets.sources.streams import (
    MAX_ROW_BYTES,
    Source,
    bounded_lines,
    count_lines,
    head,
    span_lines,
    too_long,
)


def csv_rows(source: Source) -> Iterator[Row | Reject]:
    """Yields the rows of a file with commas, or semicolons where its first line has no comma."""
    with source.stream() as stream:
        yield from _rows(stream, source, _csv_dialect(stream))


def tsv_rows(source: Source) -> Iterator[Row | Reject]:
    """Yields the rows of a file with tabs between, in which quotes are characters like others."""
    with source.stream() as stream:
        yield from _rows(stream, source, _Dialect(delimiter="\t", quoting=csv.QUOTE_NONE))


def csv_count(source: Source) -> int | None:
    """Returns what `count_lines` does; None if a row of the source's span has two lines.

    Such a file must be read from its beginning: a line that is within quotes looks like any other.
    """
    span = source.span
    assert span is not None
    with source.stream() as stream:
        dialect = _csv_dialect(stream)
        first, _ = span_lines(stream, span)
        rows = _Rows(bounded_lines(stream), first, dialect)  # on behind it, where a row may end
        while stream.tell() < span.stop and (row := next(rows, None)):
            if row.num_lines > 1:
                return None
    return count_lines(source)


@dataclass(frozen=True, kw_only=True)
class _Dialect:
    delimiter: str
    quoting: Literal[0, 3]


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A row, or why it cannot be read.

    Attributes:
        values: Its columns, where they could be told apart.
        reason: Empty for a row.
        number: Of its last line.
        num_lines: How many it has.
    """

    values: list[str]
    reason: str
    number: int
    num_lines: int


def _csv_dialect(stream: BinaryIO) -> _Dialect:
    first = head(stream).partition(b"\n")[0]
    delimiter = ";" if b";" in first and b"," not in first else ","
    return _Dialect(delimiter=delimiter, quoting=csv.QUOTE_MINIMAL)


def _rows(stream: BinaryIO, source: Source, dialect: _Dialect) -> Iterator[Row | Reject]:
    header: list[str] | None = None
    if source.span and source.span.start:  # the names of the columns may stand before the span
        before = _Rows(bounded_lines(stream, source.span.start), 1, dialect)
        header = next((row.values for row in before if not row.reason), None)
    first, lines = span_lines(stream, source.span)
    for row in _Rows(lines, first, dialect):
        where, values = f"{source.name}:{row.number}", row.values
        if row.reason:
            yield where, row.reason, short(values) if values else ""
        elif header is None:
            header = values
        elif values and len(values) != len(header):
            yield where, f"not {len(header)} columns", short(values)
        elif values:
            yield where, dict(zip(header, values, strict=True))


class _Rows:
    """The rows of lines, the first of which has the number `first`.

    An error ends none but its row: the next one begins at the line behind.
    """

    def __init__(self, lines: Iterator[bytes | None], first: int, dialect: _Dialect) -> None:
        csv.field_size_limit(MAX_ROW_BYTES)
        self._lines = _Lines(lines, first)
        self._rows = csv.reader(self._lines, delimiter=dialect.delimiter, quoting=dialect.quoting)

    def __iter__(self) -> _Rows:
        return self

    def __next__(self) -> _Row:
        lines, values, reason = self._lines, list[str](), ""
        lines.row_bytes, before = 0, lines.number
        try:
            values = next(self._rows)
            "".join(values).encode()
        except csv.Error as error:
            reason = f"malformed CSV ({error})"
        except UnicodeEncodeError:
            reason = "not UTF-8"
        return _Row(
            values=values, reason=reason, number=lines.number, num_lines=lines.number - before
        )


class _Lines:
    """Lines as text, those bytes that are not UTF-8 as surrogates; the last one has `number`."""

    def __init__(self, lines: Iterator[bytes | None], first: int) -> None:
        self.number, self.row_bytes = first - 1, 0
        self._lines = lines

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        self.row_bytes += len(line or b"")
        if line is None or self.row_bytes > MAX_ROW_BYTES:
            raise csv.Error(too_long("a row"))
        return line.decode("utf-8-sig" if self.number == 1 else "utf-8", "surrogateescape")
