"""Parquet: row by row, with the columns that are wanted alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, BinaryIO

from cluster.errors import Reject, StorageError, UserError, excerpt
from cluster.parquet import open_parquet
from cluster.row_files import Row
from pipelines.datasets.sources.columns import MAX_BATCH_ROWS, Rows, find_column
from pipelines.datasets.sources.parquet_footer import ColumnChunk, read_footer
from pipelines.datasets.sources.streams import FREE_BYTES, MAX_UNPACKED, Source, Unreadable

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_BATCH_BYTES = 32 << 20


def parquet_rows(source: Source) -> Iterator[Row | Reject]:
    """Yields the rows; `source.fields` names the columns, the first of them the one it must have.

    What cannot be read of a row group is a reject, named by the first row of it; the next goes on.

    Raises:
        UserError: It lacks that column.
    """
    import pyarrow as pa

    with source.file(in_order=False) as content:
        file = _open(content)
        text = source.fields[0]
        ways = {name: find_column(file.schema_arrow, name) for name in source.fields}
        if not ways[text]:
            raise UserError(
                f"corpus file {source.name} has no column {text!r}, only"
                f" {excerpt(', '.join(file.schema_arrow.names))}: set corpus.text_field"
            )
        source.columns.update(dict.fromkeys(file.schema_arrow.names))
        names = [".".join(way) for way in ways.values() if way]
        groups, num_before = _footer(file, content), _num_before(file)
        places = _places(groups, content)
        free_bytes = FREE_BYTES // max(1, len(groups))
        for number in _groups(source, places):
            max_bytes = max(free_bytes, MAX_UNPACKED * (places[number + 1] - places[number]))
            rows = Rows(source.name, source.fields, max_bytes, num_before[number])
            reason = None
            try:
                num_rows = num_before[number + 1] - num_before[number]
                batch_rows = _batch_rows(num_rows, groups[number], names, places[-1])
                for batch in file.iter_batches(batch_rows, row_groups=[number], columns=names):
                    yield from rows.of(batch)
            except Unreadable as error:
                reason = str(error)
            except (pa.ArrowException, OSError, ValueError) as error:
                reason = f"not a readable Parquet file: {excerpt(error)}"
            if reason is not None:
                yield f"{source.name}:{rows.num_rows + 1}", reason, ""


def parquet_count(source: Source) -> int:
    """Returns how many row groups begin in the source's span."""
    with source.file(in_order=False) as content:
        return len(_groups(source, _places(_footer(_open(content), content), content)))


def _open(content: BinaryIO) -> pq.ParquetFile:
    try:
        return open_parquet(content, "the file", streamed=True)
    except StorageError as error:
        raise Unreadable(str(error)) from error


def _groups(source: Source, places: list[int]) -> list[int]:
    """Returns the row groups that begin in the source's span; all, if it has none."""
    span = source.span
    return [
        number
        for number, place in enumerate(places[:-1])
        if span is None or span.start <= place < span.stop
    ]


def _footer(file: pq.ParquetFile, content: BinaryIO) -> list[list[ColumnChunk]]:
    """Returns the column chunks of each row group; raises Unreadable if it is broken."""
    try:
        groups = read_footer(content)
    except ValueError as error:
        raise Unreadable(f"not a readable Parquet file: {excerpt(error)}") from error
    if len(groups) != file.metadata.num_row_groups:
        raise Unreadable("not a readable Parquet file: the footer is broken")
    return groups


def _places(groups: list[list[ColumnChunk]], content: BinaryIO) -> list[int]:
    """Returns where each row group begins, and where the file ends.

    Whatever the footer says, they lie in the file, in the order of the groups.
    """
    end = content.seek(0, 2)
    places = [0]
    for chunks in groups:
        given = [chunk.place for chunk in chunks if chunk.place]
        places.append(max(places[-1], min([*given, end - 1])))
    return [*places[1:], end]


def _num_before(file: pq.ParquetFile) -> list[int]:
    """Returns how many rows there are before each row group, as the footer says."""
    groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
    return list(accumulate((max(0, group.num_rows) for group in groups), initial=0))


def _batch_rows(num_rows: int, chunks: list[ColumnChunk], names: list[str], file_bytes: int) -> int:
    """Returns how many rows are read at once; raises Unreadable if a column chunk is a bomb."""
    ways = [name.split(".") for name in names]
    sizes = [
        chunk.unpacked_bytes
        for chunk in chunks
        if any(chunk.path.split(".")[: len(way)] == way for way in ways)
    ]
    if max(sizes, default=0) > max(FREE_BYTES, MAX_UNPACKED * file_bytes):
        raise Unreadable(f"unpacks to more than {MAX_UNPACKED} times its size")
    fitting: int = _BATCH_BYTES * num_rows // max(1, sum(sizes))
    return max(1, min(MAX_BATCH_ROWS, fitting))
