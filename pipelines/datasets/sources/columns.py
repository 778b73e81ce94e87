"""Rows of Arrow batches from files of anybody: checked, and some MiB of them at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cluster.errors import Reject
from cluster.row_files import Row, batch_rows, is_text
from pipelines.datasets.sources.streams import MAX_ROW_BYTES, MAX_UNPACKED, Unreadable, too_long

if TYPE_CHECKING:
    import pyarrow as pa

MAX_BATCH_ROWS = 1024
_ROW_BYTES = 16  # what a row counts beside its texts


def find_column(schema: pa.Schema, name: str) -> list[str] | None:
    """Returns the way to a column, or to a field of structs that `name` gives by dots."""
    import pyarrow.types as pt

    if name in schema.names:
        return [name]
    steps = name.split(".")
    fields = {field.name: field.type for field in schema}
    for number, step in enumerate(steps):
        kind = fields.get(step)
        if kind is None:
            return None
        last = number == len(steps) - 1
        fields = {f.name: f.type for f in kind.fields} if pt.is_struct(kind) and not last else {}
    return steps


class Rows:
    """Reads the batches of one file, or of a part of one.

    Attributes:
        num_rows: How many rows there were so far.
    """

    def __init__(self, name: str, fields: Sequence[str], max_bytes: int, num_rows: int = 0) -> None:
        """Begins behind `num_rows` rows of the file, and will read no more than `max_bytes`."""
        self.num_rows = num_rows
        self._name = name
        self._fields = fields
        self._left = max_bytes

    def of(self, batch: pa.RecordBatch) -> Iterator[Row | Reject]:
        """Yields a batch's rows with those of the fields that it has.

        Raises:
            Unreadable: The columns contradict themselves, or hold far more than the file.
        """
        import pyarrow as pa

        try:
            columns = {
                field: _checked(_column(batch, way))
                for field in self._fields
                if (way := find_column(batch.schema, field))
            }
        except (pa.ArrowException, ValueError) as error:
            raise Unreadable(f"a batch of rows that contradicts itself: {error}") from error
        table = pa.RecordBatch.from_arrays(list(columns.values()), list(columns))
        lengths = [_Lengths(column) for column in columns.values() if is_text(column.type)]
        start = 0
        while start < batch.num_rows:
            end, size = start, 0
            while end < min(batch.num_rows, start + MAX_BATCH_ROWS):
                row_bytes = sum(length(end) for length in lengths)
                if end > start and size + row_bytes > MAX_ROW_BYTES:
                    break
                end, size = end + 1, size + row_bytes
            self._left -= size + _ROW_BYTES * (end - start)
            if self._left < 0:
                raise Unreadable(f"unpacks to more than {MAX_UNPACKED} times its size")
            if size > MAX_ROW_BYTES:
                yield f"{self._name}:{self.num_rows + 1}", too_long("a row"), ""
            else:
                yield from batch_rows(
                    table.slice(start, end - start), self._name, self.num_rows + 1
                )
            self.num_rows += end - start
            start = end


def _column(batch: pa.RecordBatch, way: list[str]) -> pa.Array:
    import pyarrow.compute as pc

    column = batch.column(way[0])
    column.validate()
    return pc.struct_field(column, way[1:]) if way[1:] else column


def _checked(column: pa.Array) -> pa.Array:
    """Returns a column whose offsets and indices hold; as bytes if its text is not UTF-8."""
    import pyarrow as pa

    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        if pa.types.is_dictionary(column.type):
            values = _as_bytes(column.dictionary)
            column = pa.DictionaryArray.from_arrays(column.indices, values)
        else:
            column = _as_bytes(column)
        column.validate(full=True)
    return column


def _as_bytes(texts: pa.Array) -> pa.Array:
    import pyarrow as pa

    is_large = pa.types.is_large_string(texts.type)
    return texts.cast(pa.large_binary() if is_large else pa.binary())


class _Lengths:
    """The bytes of each text of a column, without its dictionary being written out."""

    def __init__(self, column: pa.Array) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        self._places = None
        if pa.types.is_dictionary(column.type):
            self._places = column.indices.fill_null(-1).to_numpy(zero_copy_only=False)
            column = column.dictionary
        if pa.types.is_null(column.type):
            column = column.cast(pa.binary())
        lengths = pc.binary_length(column).fill_null(0)
        self._lengths = [*lengths.to_pylist(), 0]  # the last is that of a null index

    def __call__(self, row: int) -> int:
        return int(self._lengths[row if self._places is None else self._places[row]])
