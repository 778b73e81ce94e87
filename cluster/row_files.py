"""Files whose rows are data: which of a folder's files they are, and what their rows hold.

A row is its place and its fields, or a reject with its reason. So one file is read the same way as
a corpus, as a labelled set and by a server.
"""

from __future__ import annotations

import gzip
import io
import reprlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from cluster.errors import Reject, UserError, excerpt
from cluster.files import StoredFile
from cluster.json_lines import GZIP, json_lines, text_lines
from cluster.parquet import parquet_batches
from cluster.storage import Storage, join, open_storage

if TYPE_CHECKING:
    import pyarrow as pa

Row = tuple[str, dict[str, Any]]  # where it stands, and its fields

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxdict = 6


def find_files(uri: str) -> tuple[Storage, list[StoredFile]]:
    """Returns a folder and its files but for hidden ones, or the one file that `uri` names.

    They are in the order of their paths. There are none where `uri` names nothing.
    """
    storage = open_storage(uri)
    if files := [file for file in storage.scan() if not _is_hidden(file.path)]:
        return storage, sorted(files, key=lambda file: file.path)
    parent, _, name = storage.uri.rpartition("/")
    folder = open_storage(parent or "/")
    file = folder.find(name) if name else None
    return folder, [file] if file else []


def file_format(path: str, formats: Mapping[str, str] = FORMATS) -> str | None:
    """Returns a file's format by its suffix in any case; all but Parquet may be packed (.gz)."""
    format_ = formats.get(suffix(path))
    return None if format_ == "parquet" and path.lower().endswith(GZIP) else format_


def suffix(path: str) -> str:
    """Returns the end of a file's name that says what it holds, in lower case."""
    path = path.lower()
    return PurePosixPath(path.removesuffix(GZIP)).suffix or PurePosixPath(path).suffix


def without_copies(paths: Sequence[str]) -> list[str]:
    """Leaves out packed files that lie beside the same file unpacked."""
    plain = set(paths)
    return [p for p in paths if not (p.lower().endswith(GZIP) and p[: -len(GZIP)] in plain)]


def find_file(storage: Storage, path: str) -> str | None:
    """Returns the path of a file, or of the packed one where that alone is there, or None."""
    return next((name for name in (path, path + GZIP) if storage.exists(name)), None)


def beir_corpora(paths: Iterable[str]) -> list[str]:
    """Returns the files that hold the passages of BEIR folders."""
    return [path for path in paths if _plain_name(path) == "corpus.jsonl"]


def is_beir(paths: Iterable[str]) -> bool:
    """Says whether the files are a BEIR folder's, whose queries are JSON lines too."""
    return {"corpus.jsonl", "queries.jsonl"} <= set(map(_plain_name, paths))


def utf8_name(path: str) -> str:
    """Returns a file's name as UTF-8 can write it: Linux lets names be any bytes."""
    return path.encode("utf-8", "backslashreplace").decode()


def file_lines(storage: Storage, path: str) -> Iterator[bytes]:
    r"""Yields the lines of a file, which end at ``\n`` alone; of a packed one, of what it holds.

    Raises:
        UserError: It cannot be unpacked.
    """
    lines = io.BytesIO(storage.read_bytes(path))
    try:
        yield from gzip.GzipFile(fileobj=lines) if path.lower().endswith(GZIP) else lines
    except (OSError, EOFError, zlib.error) as error:
        place = excerpt(join(storage.uri, path))
        raise UserError(f"{place} cannot be unpacked: {error}; pack it again") from error


def jsonl_rows(storage: Storage, path: str) -> Iterator[Row | Reject]:
    """Yields the objects of a file of JSON lines."""
    for row in json_lines(file_lines(storage, path), utf8_name(path)):
        if len(row) == 3 or isinstance(row[1], dict):
            yield row
        else:
            yield row[0], "not a JSON object", short(row[1])


def tsv_rows(storage: Storage, path: str) -> Iterator[Row | Reject]:
    """Yields the rows of a file with a line of column names, and tabs between; no quoting."""
    header: list[str] = []
    for row in text_lines(file_lines(storage, path), utf8_name(path)):
        if len(row) == 3:
            yield row
            continue
        where, line = row
        values = line.split("\t")
        if not header:
            header = values
        elif len(values) == len(header):
            yield where, dict(zip(header, values, strict=True))
        else:
            yield where, f"not {len(header)} columns", line[:200]


def parquet_rows(
    content: bytes, columns: Sequence[str], place: str, name: str
) -> Iterator[Row | Reject]:
    """Yields the rows of a Parquet file with those of the columns that it has.

    Errors name its `place`, and the rows' places are `name:1` and so on.

    Raises:
        StorageError: As `cluster.parquet.parquet_batches`.
    """
    start = 1
    for batch in parquet_batches(content, columns, place):
        yield from batch_rows(batch, name, start)
        start += batch.num_rows


def batch_rows(batch: pa.RecordBatch, name: str, start: int = 1) -> Iterator[Row | Reject]:
    """Yields the rows of a batch, whose bytes are texts in UTF-8; the first is `name:start`."""
    columns = [_values(column) for column in batch.columns]
    for number in range(batch.num_rows):
        where = f"{name}:{start + number}"
        fields = {
            column: values[number]
            for column, values in zip(batch.schema.names, columns, strict=True)
        }
        try:
            yield where, {column: _decoded(value) for column, value in fields.items()}
        except UnicodeDecodeError:
            yield where, "not UTF-8", short(fields)


def is_plain(kind: pa.DataType) -> bool:
    """Says whether a column holds texts, bytes, numbers or lists of them."""
    import pyarrow.types as pt

    wrappers = (pt.is_list, pt.is_large_list, pt.is_fixed_size_list, pt.is_dictionary)
    if any(wraps(kind) for wraps in wrappers):
        return is_plain(kind.value_type)
    if pt.is_primitive(kind):
        return not pt.is_temporal(kind)
    return is_text(kind) or pt.is_decimal(kind) or pt.is_fixed_size_binary(kind)


def is_text(kind: pa.DataType) -> bool:
    """Says whether a column holds texts, perhaps as bytes or in a dictionary, or nothing at all."""
    import pyarrow.types as pt

    if pt.is_dictionary(kind):
        return is_text(kind.value_type)
    is_string = pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind)
    is_bytes = pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_binary_view(kind)
    return bool(is_string or is_bytes or pt.is_null(kind))


def short(value: Any) -> str:
    """Returns a row as a reject shows it."""
    return excerpt(_SHORT.repr(value))


def _values(column: pa.Array) -> list[Any]:
    """Returns a column's values; dates and decimals as texts, what is not plain by its type."""
    import pyarrow as pa
    import pyarrow.types as pt

    if pt.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pt.is_date(kind) or pt.is_timestamp(kind) or pt.is_decimal(kind):
        column = column.cast(pa.string())
    elif not is_plain(kind):
        return [{"type": str(kind)} if valid else None for valid in column.is_valid().to_pylist()]
    return list(column.to_pylist())


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    return value.decode() if isinstance(value, bytes) else value


def _is_hidden(path: str) -> bool:
    """Says whether a system put it there: `.DS_Store`, AppleDouble's `._part.parquet`."""
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(path).parts)


def _plain_name(path: str) -> str:
    return PurePosixPath(path).name.removesuffix(GZIP)
