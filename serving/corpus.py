"""The passages that `/v1/search` answers from, read from what people have.

A finished run brings its passages with their vectors; anyone else brings JSONL or Parquet, and the
passages are embedded when the server starts. A row that is no passage is left out and
counted; a corpus of which most rows are none is refused.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actors.passage_index import PassageIndex
from cluster.artifacts import MANIFEST, Artifact
from cluster.errors import Reject, UserError, excerpt
from cluster.parquet import parquet_batches, parquet_columns
from cluster.row_files import (
    Row,
    batch_rows,
    beir_corpora,
    file_format,
    find_files,
    is_beir,
    is_text,
    jsonl_rows,
    short,
    utf8_name,
    without_copies,
)
from cluster.storage import Storage, join, open_storage

if TYPE_CHECKING:  # its torch takes seconds, which a check before the start need not
    from actors.encoder import Encoder

ACCEPTED = (
    "accepted are a run's index, a .jsonl or .ndjson file (_id or id, title, text; perhaps .gz), a"
    " .parquet file (the same, perhaps embedding), or a folder of such files"
)
_COLUMNS = ("_id", "id", "title", "text", "embedding")
_SCHEMA = pa.schema([(name, pa.large_string()) for name in ("id", "title", "text")])
_PASSAGES_AT_ONCE = 1024
_MAX_REJECT_SHARE = 0.5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServedPassage:
    """What a search returns."""

    id: str
    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Passages (`id`, `title`, `text`) and the index of their vectors, row by row."""

    passages: pa.Table
    index: PassageIndex

    def __len__(self) -> int:
        return int(self.passages.num_rows)

    def search(self, vector: np.ndarray, top_k: int) -> list[tuple[ServedPassage, float]]:
        """Returns the nearest passages of one vector and their inner products, best first."""
        scores, rows = self.index.search(vector[None, :], top_k)
        nearest = self.passages.take(pa.array(rows[0])).to_pylist()
        return [
            (ServedPassage(**row), float(score))
            for row, score in zip(nearest, scores[0], strict=True)
        ]


@dataclass(kw_only=True)
class _Tally:
    """How many rows were read, and why some were not."""

    num_rows: int = 0
    num_rejects: int = 0
    first: Reject | None = None

    def reject(self, reject: Reject) -> None:
        self.num_rows += 1
        self.num_rejects += 1
        self.first = self.first or reject

    def summary(self, uri: str) -> str | None:
        """Returns a line about the rows that are left out; raises UserError if too many are."""
        if not self.num_rows:
            raise UserError(f"corpus {uri!r} is empty: give at least one passage")
        if self.first is None:
            return None
        where, reason, text = self.first
        line = (
            f"{self.num_rejects} of {self.num_rows} rows of corpus {uri!r} are no passages, such as"
            f" {excerpt(where)} ({reason}: {excerpt(text)})"
        )
        if self.num_rejects > _MAX_REJECT_SHARE * self.num_rows:
            raise UserError(f"{line}: {ACCEPTED}")
        return f"{line}; they are left out"


def check_corpus(uri: str) -> str | None:
    """Reads a corpus before a server is started for it; its vectors' length is checked later.

    Returns:
        A line about the rows that will be left out, if there are any.

    Raises:
        UserError: Nothing readable there, vectors that are none, or most rows are no passages.
    """
    storage, files, artifact = _find(uri)
    if artifact is not None:  # of our own making, and perhaps large
        files = files[:1]
    tally = _Tally()
    for table in _tables(storage, files, tally):
        if "embedding" in table.column_names:
            _vectors(table, None, uri)
    return tally.summary(uri)


def load_corpus(uri: str, encoder: "Encoder") -> Corpus:
    """Reads a corpus and its vectors; embeds the passages that come without.

    Raises:
        UserError: As `check_corpus`, or vectors of another model.
    """
    index = PassageIndex(encoder.dimensions)
    storage, files, artifact = _find(uri)
    tally = _Tally()
    parts = [_SCHEMA.empty_table()]
    for table in _tables(storage, files, tally):
        passages = table.select(_SCHEMA.names)
        parts.append(passages)
        if "embedding" in table.column_names:
            index.add(_vectors(table, encoder.dimensions, uri))
        elif len(passages):
            texts, titles = (passages[name].to_pylist() for name in ("text", "title"))
            index.add(encoder.encode_passages(texts, titles))
    if line := tally.summary(uri):
        logger.warning(line)
    if artifact is not None and tally.num_rows != artifact.num_rows:
        raise UserError(
            f"corpus {uri!r} has {tally.num_rows} rows and its manifest says {artifact.num_rows}:"
            " copy it anew, or let `tokay run` make it anew"
        )
    return Corpus(passages=pa.concat_tables(parts).combine_chunks(), index=index)


def _vectors(table: pa.Table, dimensions: int | None, uri: str) -> np.ndarray:
    """Returns unit vectors float32 `[rows, dimensions]`; of any one length if that is None."""
    column = table.column("embedding").combine_chunks()
    if not _is_vector(column.type):
        raise UserError(
            f"corpus {uri!r} has a column embedding of {excerpt(column.type)}: write lists of"
            " floats, or drop the column"
        )
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    wanted = dimensions or (lengths[0] if len(lengths) else 0)
    wrong = np.flatnonzero(lengths != wanted)
    if len(wrong):
        id_ = table.column("id")[int(wrong[0])].as_py()
        raise UserError(
            f"corpus {uri!r} has a vector of {lengths[wrong[0]]} numbers (of {excerpt(id_)}) where"
            f" {wanted} are wanted: serve the model that made the vectors, or drop the column"
            " embedding"
        )
    flat = column.flatten().to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
        vectors = np.asarray(flat, np.float32).reshape(len(column), wanted)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    none = np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0))
    if len(none):
        id_ = table.column("id")[int(none[0])].as_py()
        raise UserError(
            f"corpus {uri!r} has a vector of zeros or of no numbers (of {excerpt(id_)}): make it"
            " anew, or drop the column embedding"
        )
    # Those of unit length stay as they are, to the last bit.
    return np.where(np.abs(norms - 1) < 1e-3, vectors, vectors / norms)


def _tables(storage: Storage, files: Sequence[str], tally: _Tally) -> Iterator[pa.Table]:
    """Yields the passages of files (`id`, `title`, `text`, perhaps `embedding`), some at a time."""
    for path in files:
        if file_format(path) == "parquet":
            yield from _parquet_tables(storage, path, tally)
            continue
        rows = jsonl_rows(storage, path)
        while some := list(islice(rows, _PASSAGES_AT_ONCE)):
            yield _table(some, tally)[0]


def _parquet_tables(storage: Storage, path: str, tally: _Tally) -> Iterator[pa.Table]:
    place = join(storage.uri, path)
    try:
        content = storage.read_bytes(path)
    except FileNotFoundError as error:
        raise UserError(f"{place} is missing: copy it anew") from error
    columns = parquet_columns(content, place)
    kinds = {column: columns[column] for column in _COLUMNS if column in columns}
    if "text" not in kinds:
        raise UserError(
            f"{place} has no column text, only {excerpt(', '.join(columns))}: {ACCEPTED}"
        )
    for column in ("_id", "id", "text"):
        kind = kinds.get(column)
        if kind and not is_text(kind) and not (column != "text" and pa.types.is_integer(kind)):
            raise UserError(f"{place} has a column {column} of {excerpt(kind)}: write it as text")
    if "title" in kinds and not is_text(kinds["title"]):
        del kinds["title"]
    start = 1
    for batch in parquet_batches(content, list(kinds), place, batch_rows=_PASSAGES_AT_ONCE):
        texts = batch.select([column for column in kinds if column != "embedding"])
        table, kept = _table(batch_rows(texts, utf8_name(path), start), tally)
        start += batch.num_rows
        if "embedding" in kinds:
            table = table.append_column("embedding", batch.column("embedding").take(kept))
        yield table


def _passage(row: Row | Reject) -> ServedPassage | Reject:
    """Reads one row as `tokay run` does: `_id` or `id`, else its place; without a title if none."""
    if len(row) == 3:
        return row
    where, fields = row
    ids = (fields.get("_id"), fields.get("id"))
    id_ = next((str(value) for value in ids if isinstance(value, str | int | float)), where)
    text, title = fields.get("text"), fields.get("title")
    if not isinstance(text, str):
        return id_, "no text in field 'text'", short(fields)
    title = title if isinstance(title, str) else ""
    if not text.strip() and not title.strip():
        return id_, "blank", excerpt(text)
    return ServedPassage(id=id_, title=title, text=text)


def _table(rows: Iterable[Row | Reject], tally: _Tally) -> tuple[pa.Table, pa.Array]:
    """Returns the passages, and their numbers among the rows; tallies the others."""
    kept, passages = [], []
    for number, passage in enumerate(map(_passage, rows)):
        if isinstance(passage, ServedPassage):
            kept.append(number)
            passages.append(passage)
        else:
            tally.reject(passage)
    tally.num_rows += len(passages)
    columns = [[getattr(passage, name) for passage in passages] for name in _SCHEMA.names]
    return pa.table(columns, schema=_SCHEMA), pa.array(kept, pa.int64())


def _is_vector(kind: pa.DataType) -> bool:
    types = pa.types
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(is_list and types.is_floating(kind.value_type))


def _find(uri: str) -> tuple[Storage, list[str], Artifact | None]:
    """Opens the folder and lists the data files; those of an artifact are its shards."""
    storage = open_storage(uri)
    artifact = Artifact.open(storage) if storage.exists(MANIFEST) else None
    if artifact is not None:
        return storage, [shard.path for shard in artifact.shards], artifact
    storage, found = find_files(uri)
    files = without_copies([file.path for file in found if file_format(file.path)])
    if not files:
        raise UserError(f"corpus {uri!r} is not there, or holds no passages: {ACCEPTED}")
    return storage, beir_corpora(files) if is_beir(files) else files, None
