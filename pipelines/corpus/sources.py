"""Corpora as people have them: JSONL, Parquet, plain text, a BEIR folder, on a disk or on S3.

A line that cannot be read is a reject with its reason; only a corpus that cannot be found, or that
holds nothing at all, is the user's mistake.
"""

import io
import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from cluster.artifacts import fingerprint
from cluster.errors import Reject, UserError
from cluster.storage import Storage, open_storage
from pipelines.corpus.passages import Document

PYTHON_DOCUMENTATION = "python-documentation"


class CorpusConfig(BaseModel):
    """Where the passages come from and how they are cut."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(
        description="a file or folder, file:// or s3:// URI, or 'python-documentation'"
    )
    include: tuple[str, ...] = Field(
        default=("*",), description="of a folder: files like any of these, such as 'news/*'"
    )
    format: Literal["auto", "beir", "jsonl", "parquet", "text", "python-documentation"] = "auto"
    text_field: str = "text"
    title_field: str = "title"
    id_field: str | None = Field(default=None, description="default: _id or id, else the line")
    max_words: int = Field(default=160, ge=16, description="of a passage; longer texts are cut")
    min_words: int = Field(
        default=20, ge=1, description="of a text's last passage; it takes from the one before"
    )
    near_duplicate_threshold: float | None = Field(
        default=0.8, gt=0, le=1, description="Jaccard similarity from which a passage is a reject"
    )
    max_reject_share: float = Field(
        default=0.5, ge=0, le=1, description="of rows; more rejects stop the step"
    )


class Corpus:
    """A corpus that was found to exist; iterate over `documents`."""

    def __init__(self, config: CorpusConfig) -> None:
        """Finds the corpus's files; raises UserError where there is none."""
        self.config = config
        self.files: list[str] = []
        self.format: str = config.format
        if PYTHON_DOCUMENTATION in (config.path, config.format):
            self.format = PYTHON_DOCUMENTATION
            return
        self.storage, found = _find(config.path)
        self.files = [file for file in found if any(fnmatch(file, p) for p in config.include)]
        if not self.files:
            raise UserError(
                f"corpus {config.path} has {len(found)} files and none like"
                f" {' or '.join(config.include)}: correct corpus.include"
            )
        if self.format == "auto":
            self.format = _guess(config.path, self.files)
        suffixes = _SUFFIXES[self.format]
        self.files = [file for file in self.files if file.endswith(suffixes)]
        if self.format == "beir":
            self.files = [file for file in self.files if PurePosixPath(file).name == "corpus.jsonl"]
        if not self.files:
            raise UserError(
                f"corpus {config.path} holds no {self.format} file ({' or '.join(suffixes)}):"
                " correct corpus.path or corpus.format"
            )

    def version(self) -> str:
        """Returns a fingerprint of the corpus's content."""
        if self.format == PYTHON_DOCUMENTATION:
            import sys
            from importlib.metadata import distributions

            installed = sorted({(d.metadata["Name"], d.version) for d in distributions()})
            return fingerprint([sys.version, installed])
        return fingerprint([[file, self.storage.version(file)] for file in self.files])

    def documents(self) -> Iterator[Document | Reject]:
        """Yields each document, or why it could not be read, in the order of the files."""
        if self.format == PYTHON_DOCUMENTATION:
            from pipelines.corpus.python_documentation import python_documentation

            yield from python_documentation()
            return
        read = {"parquet": self._parquet, "text": self._text}.get(self.format, self._jsonl)
        for file in self.files:
            yield from read(file)

    def _jsonl(self, file: str) -> Iterator[Document | Reject]:
        for row in read_jsonl(self.storage, file):
            if len(row) == 3:
                yield row
            else:
                yield self._document(row[1], row[0])

    def _parquet(self, file: str) -> Iterator[Document | Reject]:
        try:
            source = pq.ParquetFile(pa.BufferReader(self.storage.read_bytes(file)))
        except pa.ArrowInvalid as error:
            raise UserError(f"corpus file {file} is not Parquet: {error}") from error
        if self.config.text_field not in source.schema_arrow.names:
            raise UserError(
                f"corpus file {file} has no column {self.config.text_field!r}, only"
                f" {', '.join(source.schema_arrow.names)}: set corpus.text_field"
            )
        number = 0
        for batch in source.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield self._document(row, f"{file}:{number}")

    def _text(self, file: str) -> Iterator[Document | Reject]:
        try:
            text = self.storage.read_bytes(file).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            yield file, "not UTF-8", f"byte {error.start} of {file}"
            return
        yield Document(name=file, title=PurePosixPath(file).stem, text=text)

    def _document(self, row: Any, where: str) -> Document | Reject:
        if not isinstance(row, dict):
            return where, "not a JSON object", str(row)[:200]
        text = row.get(self.config.text_field)
        fields = [self.config.id_field] if self.config.id_field else ["_id", "id"]
        name = next((str(row[f]) for f in fields if row.get(f) is not None), where)
        if not isinstance(text, str):
            return (
                name,
                f"no text in field {self.config.text_field!r}",
                json.dumps(row, default=str)[:200],
            )
        title = row.get(self.config.title_field)
        return Document(name=name, title=title if isinstance(title, str) else "", text=text)


def read_jsonl(storage: Storage, path: str) -> Iterator[tuple[str, Any] | Reject]:
    """Yields the place and the value of each line of JSON, or why it could not be read."""
    for number, line in enumerate(io.BytesIO(storage.read_bytes(path)), start=1):
        if not line.strip():
            continue
        where, line = f"{path}:{number}", line.rstrip(b"\n")
        try:
            value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            yield where, "not UTF-8", line[:200].decode("utf-8", "replace")
        except ValueError:
            yield where, "malformed JSON", line[:200].decode("utf-8", "replace")
        else:
            yield where, value


def is_text(value: Any) -> bool:
    """Says whether a JSON value can be written as UTF-8: half a surrogate pair cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


_SUFFIXES = {
    "beir": (".jsonl",),
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet",),
    "text": (".txt", ".md", ".rst"),
}


def _find(path: str) -> tuple[Storage, list[str]]:
    """Returns the folder's storage and its files, or the one file that `path` names."""
    storage = open_storage(path)
    files = storage.list()
    if files:
        return storage, files
    parent, _, name = storage.uri.rpartition("/")
    folder = open_storage(parent or "/")
    if name and folder.exists(name):
        return folder, [name]
    raise UserError(f"corpus {path} does not exist or is empty: correct corpus.path")


def _guess(path: str, files: list[str]) -> str:
    names = {PurePosixPath(file).name for file in files}
    if {"corpus.jsonl", "queries.jsonl"} <= names:
        return "beir"
    for name in ("parquet", "jsonl", "text"):
        if any(file.endswith(_SUFFIXES[name]) for file in files):
            return name
    raise UserError(
        f"corpus {path} has no file that looks like a corpus: accepted are a BEIR folder, .jsonl,"
        " .ndjson, .parquet, .txt, .md and .rst"
    )
