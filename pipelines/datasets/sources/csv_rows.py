"""Rows of CSV (RFC 4180) and of TSV, which knows no quotes; the first line names the columns."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import BinaryIO, Literal

from cluster.errors import Reject
from cluster.row_files import Row, short
from pipelines.datasets.sources.streams import MAX_ROW_BYTES, Source, bounded_lines, too_long


def csv_rows(source: Source) -> Iterator[Row | Reject]:
    """Yields the rows of a file with commas, or semicolons where its first line has no comma."""
    with source.stream() as stream:
        head = stream.peek(1).partition(b"\n")[0]  # type: ignore[attr-defined]
        delimiter = ";" if b";" in head and b"," not in head else ","
        yield from _rows(stream, source.name, delimiter, csv.QUOTE_MINIMAL)


def tsv_rows(source: Source) -> Iterator[Row | Reject]:
    """Yields the rows of a file with tabs between, in which quotes are characters like others."""
    with source.stream() as stream:
        yield from _rows(stream, source.name, "\t", csv.QUOTE_NONE)


def _rows(
    stream: BinaryIO, name: str, delimiter: str, quoting: Literal[0, 3]
) -> Iterator[Row | Reject]:
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = _Lines(stream)
    rows = csv.reader(lines, delimiter=delimiter, quoting=quoting)
    header: list[str] | None = None
    while True:
        lines.row_bytes = 0
        try:
            values = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"{name}:{lines.number}", f"malformed CSV ({error})", ""
            continue
        where = f"{name}:{lines.number}"
        try:
            "".join(values).encode()
        except UnicodeEncodeError:
            yield where, "not UTF-8", short(values)
            continue
        if header is None:
            header = values
        elif values and len(values) != len(header):
            yield where, f"not {len(header)} columns", short(values)
        elif values:
            yield where, dict(zip(header, values, strict=True))


class _Lines:
    """Lines as text, those bytes that are not UTF-8 as surrogates; a row's last one has `number`.

    An error does not end it: the CSV reader begins a new row at the line behind.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.number = self.row_bytes = 0
        self._lines = bounded_lines(stream)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        self.row_bytes += len(line or b"")
        if line is None or self.row_bytes > MAX_ROW_BYTES:
            raise csv.Error(too_long("a row"))
        return line.decode("utf-8-sig" if self.number == 1 else "utf-8", "surrogateescape")
