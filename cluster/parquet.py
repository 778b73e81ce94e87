"""The one way to read Parquet: only the columns that are asked for, and no extension types.

A file says itself which Python class its values belong to, and `ray.data` registers one whose
values are unpickled. So a file of somebody else may hold code where nobody would look for it.
"""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from cluster.errors import StorageError, excerpt

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_MAX_FOOTER_BYTES = 256 << 20
# Arrow keeps its schema in the footer, in base64, and a type's class under this key. Searching for
# the text, at each of the three places in a base64 group, needs no trust in the footer's structure.
_EXTENSION = b"ARROW:extension:name"
_EXTENSION_IN_BASE64 = tuple(b64encode(_EXTENSION[start : start + 18]) for start in range(3))


def open_parquet(
    content: bytes | BinaryIO, place: str, *, streamed: bool = False
) -> pq.ParquetFile:
    """Opens a Parquet file that holds no extension types; `place` is for errors.

    Of a file that can be read by range, the footer is read, and later the columns in question.
    One that is `streamed` may be larger than memory: it is read in small pieces, and texts come as
    dictionaries, so that a text that it holds once, and names a million times, is in memory once.

    Raises:
        StorageError: It is not Parquet, or a column has an extension type.
    """
    import pyarrow as pa  # here, since encoders and training steps go without it
    import pyarrow.parquet as pq

    source = io.BytesIO(content) if isinstance(content, bytes) else content
    size = source.seek(0, io.SEEK_END)
    source.seek(max(size - 8, 0))
    num_bytes = min(int.from_bytes(source.read(4), "little"), size)
    if num_bytes > _MAX_FOOTER_BYTES:
        raise StorageError(f"{place} is not a readable Parquet file: a footer of {num_bytes} bytes")
    source.seek(max(size - 8 - num_bytes, 0))
    end = source.read()  # the footer, which Arrow gets as it was read here, and not anew
    # Before Arrow sees the file, which makes the types, and may run their code, to open it.
    if any(name in end for name in _EXTENSION_IN_BASE64):
        raise StorageError(
            f"{place} has a column of an Arrow extension type, whose values may run code when they"
            " are read: write the file anew with text, numbers, lists and structs only"
        )
    with _one_line(place):
        # Else Arrow takes Parquet's own JSON and UUID for extension types too.
        footer = pq.ParquetFile(pa.BufferReader(end), arrow_extensions_enabled=False).metadata
        columns = map(footer.schema.column, range(footer.num_columns))
        texts = [each.path for each in columns if each.physical_type == "BYTE_ARRAY"]
        return pq.ParquetFile(
            pa.PythonFile(source, "r"),
            metadata=footer,
            read_dictionary=texts if streamed else None,
            pre_buffer=not streamed,  # columns that lie side by side are one read
            buffer_size=1 << 20 if streamed else 0,
            arrow_extensions_enabled=False,
        )


def parquet_columns(content: bytes, place: str) -> dict[str, pa.DataType]:
    """Returns the type of each column; raises StorageError as `open_parquet`."""
    file = open_parquet(content, place)
    with _one_line(place):
        return {field.name: field.type for field in file.schema_arrow}


def parquet_batches(
    content: bytes, columns: Sequence[str], place: str, *, batch_rows: int = 1024
) -> Iterator[pa.RecordBatch]:
    """Yields the rows of a Parquet file with those of the columns that it has.

    A column of text comes as bytes in a batch in which some of it is not UTF-8, so that a reader
    can refuse those rows alone.

    Raises:
        StorageError: It is not Parquet, a column has an extension type, or cannot be decoded.
    """
    import pyarrow as pa

    file = open_parquet(content, place)
    names = _names(file, columns, place)
    with _one_line(place):
        for batch in file.iter_batches(batch_rows, columns=[n for n in names if n in columns]):
            for number, column in enumerate(batch.columns):
                try:
                    column.validate(full=True)
                except pa.ArrowInvalid:
                    name = batch.schema.names[number]
                    batch = batch.set_column(number, name, column.cast(pa.binary()))
            yield batch


def parquet_table(content: bytes | BinaryIO, columns: Sequence[str] | None, place: str) -> pa.Table:
    """Returns a Parquet file's rows with these columns; all of them where `columns` is None.

    Raises:
        StorageError: As `parquet_batches`; or a column is not there, or its text is not UTF-8.
    """
    file = open_parquet(content, place)
    names = _names(file, columns, place)
    missing = [name for name in columns or [] if name not in names]
    if missing:
        raise StorageError(
            f"{place} has no column {excerpt(', '.join(missing))}, only {excerpt(', '.join(names))}"
        )
    with _one_line(place):
        table = file.read(columns)
        table.validate(full=True)
        return table if columns is None else table.select(columns)


def row_groups_table(
    file: pq.ParquetFile, groups: Sequence[int], columns: Sequence[str], place: str
) -> pa.Table:
    """Returns some row groups of an opened file with these columns, which it must have.

    Raises:
        StorageError: They cannot be decoded, or their text is not UTF-8.
    """
    with _one_line(place):
        table = file.read_row_groups(list(groups), list(columns))
        table.validate(full=True)
        return table.select(columns)


def _names(file: pq.ParquetFile, columns: Sequence[str] | None, place: str) -> list[str]:
    """Returns a file's columns; raises StorageError if one that is to be read is there twice."""
    with _one_line(place):
        names: list[str] = file.schema_arrow.names
    for name in names if columns is None else columns:
        if names.count(name) > 1:
            raise StorageError(
                f"{place} has {names.count(name)} columns {excerpt(name)!r}: write it anew with one"
            )
    return names


@contextmanager
def _one_line(place: str) -> Iterator[None]:
    """Turns what Arrow raises over a broken file into one line for the user."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StorageError(f"{place} is not a readable Parquet file: {excerpt(error)}") from error
