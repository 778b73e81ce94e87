"""Rows of JSON: one a line, or the values of an array or of a file that is laid out to be read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from cluster.errors import Reject
from cluster.json_lines import json_lines, parse_json
from cluster.row_files import Row, short
from pipelines.datasets.sources.streams import (
    MAX_ROW_BYTES,
    Source,
    count_lines,
    head,
    span_lines,
    too_long,
)

_TOKEN = re.compile(rb'["\\{}\[\],]')
_BLANKS = b"\xef\xbb\xbf \t\r\n"  # and the byte order mark


def jsonl_rows(source: Source) -> Iterator[Row | Reject]:
    """Yields the objects of a file of JSON lines."""
    with source.stream() as stream:
        yield from _line_rows(stream, source)


def json_rows(source: Source) -> Iterator[Row | Reject]:
    """Yields the objects of a JSON array, or those that stand one after another.

    What is called `.json` often holds JSON lines: it does if the first line is a whole value.
    """
    with source.stream() as stream:
        start = head(stream).lstrip(_BLANKS)
        if _are_lines(start):
            yield from _line_rows(stream, source)
        else:
            yield from _rows(_values(stream, start.startswith(b"[")), source.name, "a value")


def json_count(source: Source) -> int | None:
    """Returns what `count_lines` does; None for what must be read from its beginning."""
    with source.stream() as stream:
        are_lines = _are_lines(head(stream).lstrip(_BLANKS))
    return count_lines(source) if are_lines else None


def _are_lines(start: bytes) -> bool:
    line, end, _ = start.partition(b"\n")
    return not start.startswith(b"[") and bool(end) and _is_json(line)


def _line_rows(stream: BinaryIO, source: Source) -> Iterator[Row | Reject]:
    first, lines = span_lines(stream, source.span)
    yield from _rows(lines, source.name, "a line", first)


def _rows(
    values: Iterable[bytes | None], name: str, what: str, first: int = 1
) -> Iterator[Row | Reject]:
    """Yields the rows in whole values; a value is None where it was too long to be read."""
    refused: list[Reject] = []

    def fit() -> Iterator[bytes]:
        for number, value in enumerate(values, start=first):
            if value is None:
                refused.append((f"{name}:{number}", too_long(what), ""))
            yield value or b""

    for row in json_lines(fit(), name, first):
        yield from refused
        refused.clear()
        if len(row) == 3 or isinstance(row[1], dict):
            yield row
        else:
            yield row[0], "not a JSON object", short(row[1])
    yield from refused


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line)
    except ValueError:
        return False
    return True


def _values(stream: BinaryIO, in_array: bool) -> Iterator[bytes | None]:
    """Yields the text of each value, cut where brackets outside of strings say so.

    Args:
        stream: The text.
        in_array: Whether they are an array's, with commas between, or follow one another.
    """
    value, is_long = bytearray(), False
    depth, in_string, escaped = 0, False, -1  # escaped: where the character behind a \ stands
    offset = 0
    while chunk := stream.read(1 << 16):
        start = 0
        for token in _TOKEN.finditer(chunk):
            at, symbol = token.start(), token[0]
            if offset + at == escaped:
                continue
            if in_string:
                if symbol == b"\\":
                    escaped = offset + at + 1
                in_string = symbol != b'"'
                continue
            in_string = symbol == b'"'
            if symbol in b"{[":
                depth += 1
                if in_array and depth == 1:
                    start = at + 1
            elif symbol in b"}]":
                depth -= 1
            is_end = depth == 0 if symbol in b"}]" else symbol == b"," and in_array and depth == 1
            if is_end:
                value += chunk[start : at if in_array else at + 1]
                yield None if is_long else bytes(value).lstrip(_BLANKS)
                start = at + 1
                value.clear()
                is_long = False
        value += chunk[start:]
        if len(value) > MAX_ROW_BYTES:
            value.clear()
            is_long = True
        offset += len(chunk)
    if is_long or value.strip(_BLANKS):
        yield None if is_long else bytes(value)
