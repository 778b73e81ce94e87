"""The passages that `/v1/search` answers from, read from what people have.

A finished run brings its passages with their vectors; anyone else brings JSONL or Parquet, and the
passages are embedded when the server starts.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from actors.passage_index import PassageIndex
from cluster.artifacts import MANIFEST, Artifact
from cluster.errors import UserError
from cluster.storage import Storage, join, open_storage, read_table

if TYPE_CHECKING:  # its torch takes seconds, which a check before the start need not
    from actors.encoder import Encoder

ACCEPTED = (
    "accepted are a run's index, a .jsonl file (BEIR's _id, title, text), a .parquet file"
    " (id, title, text, perhaps embedding), or a folder of such files"
)
_PASSAGES_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class Passage:
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

    def search(self, vector: np.ndarray, top_k: int) -> list[tuple[Passage, float]]:
        """Returns the nearest passages of one vector and their inner products, best first."""
        scores, rows = self.index.search(vector[None, :], top_k)
        found = self.passages.take(pa.array(rows[0])).to_pylist()
        return [(Passage(**row), float(score)) for row, score in zip(found, scores[0], strict=True)]


def check_corpus(uri: str) -> None:
    """Refuses a corpus before a server is started for it; vectors are checked when it is loaded.

    Raises:
        UserError: Nothing readable there, or a malformed line.
    """
    storage, files = _files(uri)
    for path in files:
        if path.endswith(".jsonl"):
            _read_jsonl(storage.read_bytes(path), join(storage.uri, path))


def load_corpus(uri: str, encoder: "Encoder") -> Corpus:
    """Reads a corpus and its vectors; embeds the passages that come without.

    Raises:
        UserError: Nothing readable there, a malformed row, or vectors of another model.
    """
    index = PassageIndex(encoder.dimensions)
    parts = []
    for table in _tables(uri):
        passages = table.select(["id", "title", "text"])
        parts.append(passages)
        if "embedding" in table.column_names:
            index.add(_vectors(table, encoder.dimensions, uri))
            continue
        for batch in passages.to_batches(max_chunksize=_PASSAGES_AT_ONCE):
            index.add(_embed(batch.to_pydict(), encoder))
    passages = pa.concat_tables(parts)
    if not passages.num_rows:
        raise UserError(f"corpus {uri!r} is empty: give at least one passage")
    return Corpus(passages=passages, index=index)


def _embed(columns: dict[str, list[str]], encoder: "Encoder") -> np.ndarray:
    texts, titles = columns["text"], columns["title"]
    if "{title}" in encoder.templates.passage:
        return encoder.encode_passages(texts, titles)
    # As in mteb: a model without a place for titles gets the title in front of the text.
    joined = [f"{title} {text}".strip() for title, text in zip(titles, texts, strict=True)]
    return encoder.encode_passages(joined)


def _vectors(table: pa.Table, dimensions: int, uri: str) -> np.ndarray:
    column = table.column("embedding").combine_chunks()
    flat = column.flatten().to_numpy(zero_copy_only=False)
    if column.null_count or len(flat) != len(column) * dimensions:
        found = len(flat) / max(len(column), 1)
        raise UserError(
            f"corpus {uri!r} has vectors of {found:g} numbers and the model makes {dimensions}:"
            " serve the model that made the index, or drop the column `embedding`"
        )
    return np.asarray(flat, np.float32).reshape(len(column), dimensions)


def _files(uri: str) -> tuple[Storage, list[str]]:
    """Opens the folder and lists the data files: none for an artifact, whose manifest has them."""
    if uri.endswith((".jsonl", ".parquet")):
        folder, _, name = uri.rpartition("/")
        storage = open_storage(folder or ("/" if uri.startswith("/") else "."))
        files = [name] if storage.exists(name) else []
    else:
        storage = open_storage(uri)
        if storage.exists(MANIFEST):
            return storage, []
        files = [path for path in storage.list() if path.endswith((".jsonl", ".parquet"))]
        if "corpus.jsonl" in files:  # a BEIR folder, whose queries are JSONL too
            files = ["corpus.jsonl"]
    if not files:
        raise UserError(f"corpus {uri!r} holds no passages: {ACCEPTED}")
    return storage, files


def _tables(uri: str) -> Iterator[pa.Table]:
    storage, files = _files(uri)
    artifact = None if files else Artifact.open(storage)
    if artifact is not None:
        yield from map(_passage_table, artifact.tables())
    for path in files:
        where = join(storage.uri, path)
        if path.endswith(".parquet"):
            table = read_table(storage, path)
            missing = {"id", "text"} - set(table.column_names)
            if missing:
                raise UserError(
                    f"{where} has no column {' and '.join(sorted(missing))}: {ACCEPTED}"
                )
            yield _passage_table(table)
        else:
            yield _read_jsonl(storage.read_bytes(path), where)


def _passage_table(table: pa.Table) -> pa.Table:
    """Brings any passages to strings without nulls, with a title, with their vectors if any."""
    columns = {}
    for name in ("id", "title", "text"):
        if name in table.column_names:
            column = table.column(name).cast(pa.large_string()).fill_null("")
        else:
            column = pa.nulls(table.num_rows, pa.large_string()).fill_null("")
        columns[name] = column
    if "embedding" in table.column_names:
        columns["embedding"] = table.column("embedding")
    return pa.table(columns)


def _read_jsonl(content: bytes, where: str) -> pa.Table:
    rows: dict[str, list[str]] = {"id": [], "title": [], "text": []}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = row["text"]
            if not isinstance(text, str):
                raise TypeError("text is no string")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{where} line {number} is no passage ({type(error).__name__}: {error}): write"
                ' {"_id": "...", "title": "...", "text": "..."} in UTF-8, one a line'
            ) from error
        rows["id"].append(str(row.get("_id", row.get("id", number))))
        rows["title"].append(str(row.get("title") or ""))
        rows["text"].append(text)
    return pa.table(rows, schema=pa.schema([(name, pa.large_string()) for name in rows]))
