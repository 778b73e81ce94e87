"""Where a Parquet file's column chunks lie, and how large they are, read without Arrow.

pyarrow 26 ends the process where it is asked for a column chunk whose description does not fit the
schema, so a broken file would take the worker with it. This reads the few numbers that are needed
from the footer: Thrift's compact protocol, https://github.com/apache/thrift/blob/master/doc/specs/
thrift-compact-protocol.md, of the structs in https://github.com/apache/parquet-format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE = range(8)
_BINARY, _LIST, _SET, _MAP, _STRUCT, _UUID = range(8, 14)
_FIXED = {_BYTE: 1, _DOUBLE: 8, _UUID: 16}
_MAX_DEPTH = 32
# FileMetaData.row_groups, RowGroup.columns, ColumnChunk.meta_data, and what is said of a chunk.
_PATH, _UNPACKED, _DATA, _DICTIONARY = 3, 6, 9, 11
_GROUPS, _COLUMNS, _CHUNK = 4, 1, 3
_OF_CHUNK: dict[int, Any] = {key: {} for key in (_PATH, _UNPACKED, _DATA, _DICTIONARY)}
_WANTED = {_GROUPS: {_COLUMNS: {_CHUNK: _OF_CHUNK}}}


@dataclass(frozen=True, kw_only=True)
class ColumnChunk:
    """A column's part of a row group.

    Attributes:
        path: The column's name; of a nested one those on the way to it, with dots between.
        unpacked_bytes: Its size when it is decompressed.
        place: The file's byte where it begins; 0 if the footer does not say.
    """

    path: str
    unpacked_bytes: int
    place: int


def read_footer(content: BinaryIO) -> list[list[ColumnChunk]]:
    """Returns the column chunks of each row group.

    Raises:
        ValueError: The footer is broken, or describes columns in another file.
    """
    size = content.seek(0, 2)
    content.seek(max(size - 8, 0))
    num_bytes = min(int.from_bytes(content.read(4), "little"), size)
    content.seek(max(size - 8 - num_bytes, 0))
    try:
        told = _Compact(content.read(num_bytes)).struct(_WANTED, 0)
        return [
            [_chunk(column[_CHUNK]) for column in group.get(_COLUMNS, ())]
            for group in told.get(_GROUPS, ())
        ]
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("the footer is broken") from error


def _chunk(told: Mapping[int, Any]) -> ColumnChunk:
    places = [told[key] for key in (_DICTIONARY, _DATA) if told.get(key, 0) > 0]
    return ColumnChunk(
        path=".".join(name.decode("utf-8", "replace") for name in told[_PATH]),
        unpacked_bytes=int(told[_UNPACKED]),
        place=min(places, default=0),
    )


class _Compact:
    """A reader of the compact protocol that keeps what is wanted alone."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def struct(self, wanted: Mapping[int, Any], depth: int) -> dict[int, Any]:
        """Returns the fields that `wanted` names, by number; it says the same of their own."""
        if depth > _MAX_DEPTH:
            raise ValueError("the footer is nested too deep")
        fields: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) & 15 != _STOP:
            number = number + (head >> 4) if head >> 4 else self._int()
            value = self._value(head & 15, wanted.get(number), depth + 1)
            if number in wanted:
                fields[number] = value
        return fields

    def _value(self, kind: int, wanted: Mapping[int, Any] | None, depth: int) -> Any:
        if kind in (_TRUE, _FALSE):
            return kind == _TRUE
        if kind in (_I16, _I32, _I64):
            return self._int()
        if kind in _FIXED:
            return self._skip(_FIXED[kind])
        if kind == _BINARY:
            return self._skip(self._varint())
        if kind in (_LIST, _SET):
            return self._list(wanted, depth)
        if kind == _MAP:
            return self._map(depth)
        if kind == _STRUCT:
            return self.struct(wanted or {}, depth)
        raise ValueError(f"the footer has a value of kind {kind}")

    def _list(self, wanted: Mapping[int, Any] | None, depth: int) -> list[Any] | None:
        head = self._byte()
        number, kind = head >> 4, head & 15
        number = self._varint() if number == 15 else number
        kept = []
        for _ in range(number):
            value = self._element(kind, wanted, depth)
            if wanted is not None:
                kept.append(value)
        return kept

    def _map(self, depth: int) -> None:
        if number := self._varint():
            kinds = self._byte()
            for _ in range(number):
                self._element(kinds >> 4, None, depth)
                self._element(kinds & 15, None, depth)

    def _element(self, kind: int, wanted: Mapping[int, Any] | None, depth: int) -> Any:
        """A value of a list or map, where a truth value has a byte of its own."""
        is_truth = kind in (_TRUE, _FALSE)
        return self._byte() if is_truth else self._value(kind, wanted, depth + 1)

    def _byte(self) -> int:
        self._at += 1
        return self._content[self._at - 1]

    def _skip(self, num_bytes: int) -> bytes:
        end = self._at + num_bytes
        if end > len(self._content):
            raise ValueError("the footer ends early")
        taken, self._at = self._content[self._at : end], end
        return taken

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("the footer has a number of more than 64 bits")

    def _int(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
