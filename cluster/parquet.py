"""The one way to read Parquet: only the columns that are asked for, and no extension types.

A file says itself which Python class its values belong to, and `ray.data` registers one whose
values are unpickled. So a file of somebody else may hold code where nobody would look for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cluster.errors import StorageError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


def open_parquet(content: bytes, place: str) -> pq.ParquetFile:
    """Opens a Parquet file that holds no extension types.

    Args:
        content: The file.
        place: Where it lies, for errors.

    Raises:
        StorageError: It is not Parquet, or a column has an extension type.
    """
    import pyarrow as pa  # here, since encoders and training steps go without it
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(pa.BufferReader(content))
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise StorageError(f"{place} is not a readable Parquet file: {reason}") from error


def parquet_batches(
    content: bytes, columns: Sequence[str], place: str, *, batch_rows: int = 1024
) -> Iterator[pa.RecordBatch]:
    """Yields the rows of a Parquet file with those of the columns that it has.

    Raises:
        StorageError: It is not Parquet, a column has an extension type, or cannot be decoded.
    """
    import pyarrow as pa

    file = open_parquet(content, place)
    there = [name for name in columns if name in file.schema_arrow.names]
    try:
        yield from file.iter_batches(batch_rows, columns=there)
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise StorageError(f"{place} is not a readable Parquet file: {reason}") from error
