"""Parquet: row by row, with the columns that are wanted alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from cluster.errors import Reject, StorageError, UserError, excerpt
from cluster.parquet import open_parquet
from cluster.row_files import Row
from pipelines.datasets.sources.columns import MAX_BATCH_ROWS, Rows, find_column
from pipelines.datasets.sources.streams import FREE_BYTES, MAX_UNPACKED, Source, Unreadable

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_BATCH_BYTES = 32 << 20


def parquet_rows(source: Source) -> Iterator[Row | Reject]:
    """Yields the rows; `source.fields` names the columns, the first of them the one it must have.

    Raises:
        UserError: It lacks that column.
    """
    import pyarrow as pa

    with source.local_file() as path, path.open("rb") as content:
        file, file_bytes = _open(content), path.stat().st_size
        text = source.fields[0]
        ways = {name: find_column(file.schema_arrow, name) for name in source.fields}
        if not ways[text]:
            raise UserError(
                f"corpus file {source.name} has no column {text!r}, only"
                f" {excerpt(', '.join(file.schema_arrow.names))}: set corpus.text_field"
            )
        source.columns.update(dict.fromkeys(file.schema_arrow.names))
        rows = Rows(source.name, source.fields, file_bytes)
        names = [".".join(way) for way in ways.values() if way]
        try:
            for batch in file.iter_batches(_batch_rows(file, names, file_bytes), columns=names):
                yield from rows.of(batch)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise Unreadable(f"not a readable Parquet file: {excerpt(error)}") from error


def _open(content: BinaryIO) -> pq.ParquetFile:
    try:
        return open_parquet(content, "the file", streamed=True)
    except StorageError as error:
        raise Unreadable(str(error)) from error


def _batch_rows(file: pq.ParquetFile, names: list[str], file_bytes: int) -> int:
    """Returns how many rows are read at once; raises Unreadable if a column chunk is a bomb."""
    fewest = MAX_BATCH_ROWS
    ways = [name.split(".") for name in names]
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        chunks = [group.column(column) for column in range(group.num_columns)]
        sizes = [
            chunk.total_uncompressed_size
            for chunk in chunks
            if any(chunk.path_in_schema.split(".")[: len(way)] == way for way in ways)
        ]
        if max(sizes, default=0) > max(FREE_BYTES, MAX_UNPACKED * file_bytes):
            raise Unreadable(f"unpacks to more than {MAX_UNPACKED} times its size")
        fewest = min(fewest, _BATCH_BYTES * group.num_rows // max(1, sum(sizes)))
    return max(1, fewest)
