"""Corpora as people have them: JSONL, Parquet, plain text, a BEIR folder, on a disk or on S3.

A row that cannot be read is a reject with its reason. A corpus that cannot be found, that is not
what the recipe says, or a file of it that is not what its name says, is the user's mistake. What is
read and what is not stands in docs/what-is-read.md.
"""

import io
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.types as pt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.artifacts import fingerprint
from cluster.errors import Reject, UserError, excerpt
from cluster.json_lines import GZIP, json_lines, unpacked
from cluster.parquet import open_parquet, parquet_batches
from cluster.storage import Storage, open_storage
from pipelines.corpus.cutting import Document
from pipelines.fingerprints import NotFingerprinted


class CorpusConfig(BaseModel):
    """Where the passages come from and how they are cut."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Annotated[str, NotFingerprinted] = Field(
        description="a file or folder, file:// or s3:// URI"
    )
    include: tuple[str, ...] = Field(
        default=("*",), description="of a folder: files like any of these, such as 'news/*'"
    )
    format: Literal["auto", "beir", "jsonl", "parquet", "text"] = "auto"
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
    max_reject_share: Annotated[float, NotFingerprinted] = Field(
        default=0.5, ge=0, le=1, description="of rows; more rejects stop the step"
    )

    @model_validator(mode="after")
    def _evens_out(self) -> "CorpusConfig":
        if 2 * self.min_words > self.max_words:
            raise ValueError(
                f"min_words: {self.min_words} given, and max_words is {self.max_words}: accepted is"
                f" at most half of it, {self.max_words // 2}"
            )
        return self


class Corpus:
    """A corpus that was found to exist; iterate over `documents`.

    Attributes:
        files: The files that are read, in their order.
        passed_over: Files that are not, by suffix; hidden ones are not counted.
    """

    def __init__(self, config: CorpusConfig) -> None:
        """Finds the corpus's files; raises UserError where there is none."""
        self.config = config
        self.files: list[str] = []
        self.passed_over: Counter[str] = Counter()
        self.format: str = config.format
        self._names: dict[str, None] = {}
        self.storage, found = _find(config.path)
        there = [file for file in found if any(fnmatch(file, p) for p in config.include)]
        if not there:
            raise UserError(
                f"corpus {config.path} has {len(found)} files and none like"
                f" {' or '.join(config.include)}: correct corpus.include"
            )
        if self.format == "auto" and _is_beir(there):
            self.format = "beir"
        self.files = _choose(there, self.format)
        self.passed_over.update(map(_suffix, set(there) - set(self.files)))
        self._check_files()

    def version(self) -> str:
        """Returns a fingerprint of the corpus's content."""
        return fingerprint([[file, self.storage.version(file)] for file in self.files])

    def documents(self) -> Iterator[Document | Reject]:
        """Yields each document, or why it could not be read, in the order of the files.

        Raises:
            UserError: A file is not what its suffix says, or no row has a field that the recipe
                names, which is found out at the end.
        """
        self._names.clear()
        for file in self.files:
            read = {"parquet": self._parquet, "text": self._text, "jsonl": self._jsonl}
            yield from read[_FORMATS[_suffix(file)]](file)
        self._check_fields()

    def _check_files(self) -> None:
        config = self.config
        beside = ", ".join(f"{count} {suffix}" for suffix, count in self.passed_over.most_common(3))
        if not self.files:
            what = "that looks like a corpus" if self.format == "auto" else f"of {self.format}"
            raise UserError(
                f"corpus {config.path} has no file {what}, only {beside}: accepted are"
                f" {_ACCEPTED}; correct corpus.path or corpus.format"
            )
        texts = [file for file in self.files if not _is_about(file)]
        if self.format == "auto" and {_format(file) for file in self.files} == {"text"}:
            num_unread = sum(self.passed_over[suffix] for suffix in _DATA_SUFFIXES)
            if len(texts) < num_unread:
                raise UserError(
                    f"corpus {config.path} holds {beside}, which are not read, beside"
                    f" {excerpt(self.files[0])}: accepted are {_ACCEPTED}; write corpus.format:"
                    " text to read the texts alone"
                )

    def _check_fields(self) -> None:
        config = self.config
        named = {"text_field": config.text_field, "id_field": config.id_field}
        if config.title_field != CorpusConfig.model_fields["title_field"].default:
            named["title_field"] = config.title_field
        for option, name in named.items():
            if self._names and name is not None and name not in self._names:
                there = excerpt(", ".join(self._names))
                raise UserError(
                    f"corpus {config.path}: no row has the field {name!r}, only {there}: correct"
                    f" corpus.{option}"
                )

    def _note(self, names: Iterable[str]) -> None:
        """Remembers fields that rows have: the first ones, and any that the recipe names."""
        config = self.config
        named = (config.text_field, config.title_field, config.id_field)
        self._names.update(
            (name, None) for name in names if len(self._names) < 100 or name in named
        )

    def _jsonl(self, file: str) -> Iterator[Document | Reject]:
        for row in json_lines(self._lines(file), _name(file)):
            if len(row) == 3:
                yield row
            elif isinstance(row[1], dict):
                self._note(row[1])
                yield self._document(row[1], row[0])
            else:
                yield row[0], "not a JSON object", _short(row[1])

    def _parquet(self, file: str) -> Iterator[Document | Reject]:
        config, place = self.config, f"corpus file {_name(file)}"
        content = self.storage.read_bytes(file)
        names = open_parquet(content, place).schema_arrow.names
        if config.text_field not in names:
            raise UserError(
                f"{place} has no column {config.text_field!r}, only"
                f" {excerpt(', '.join(names))}: set corpus.text_field"
            )
        self._note(names)
        columns = dict.fromkeys([config.text_field, config.title_field, *self._id_fields])
        number = 0
        for batch in parquet_batches(content, list(columns), place):
            read = {
                name: _values(column)
                for name, column in zip(batch.schema.names, batch.columns, strict=True)
            }
            for row in range(batch.num_rows):
                number += 1
                fields = {name: values[row] for name, values in read.items()}
                yield self._document(fields, f"{_name(file)}:{number}")

    def _text(self, file: str) -> Iterator[Document | Reject]:
        name = _name(file)
        try:
            text = b"".join(self._lines(file)).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            yield name, "not UTF-8", f"byte {error.start} of {name}"
            return
        yield Document(name=name, title=PurePosixPath(name.removesuffix(GZIP)).stem, text=text)

    def _lines(self, file: str) -> Iterator[bytes]:
        return unpacked(io.BytesIO(self.storage.read_bytes(file)), _name(file))

    @property
    def _id_fields(self) -> list[str]:
        return [self.config.id_field] if self.config.id_field else ["_id", "id"]

    def _document(self, row: dict[str, Any], where: str) -> Document | Reject:
        """Makes a document of a row; bytes are texts in UTF-8, or none."""
        try:
            text, title = (
                _decoded(row.get(field))
                for field in (self.config.text_field, self.config.title_field)
            )
            id_ = next((_decoded(row[f]) for f in self._id_fields if row.get(f) is not None), where)
        except UnicodeDecodeError:
            return where, "not UTF-8", _short(row)
        if not isinstance(id_, str | int | float):
            return where, "its id is neither a text nor a number", _short(row)
        name, title = str(id_), title if isinstance(title, str) else ""
        if not isinstance(text, str):
            return name, f"no text in field {self.config.text_field!r}", _short(row)
        return Document(name=name, title=title, text=text)


_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
}
_ACCEPTED = "a BEIR folder, .jsonl, .ndjson, .txt, .md and .rst (each may be .gz), and .parquet"
# Formats that hold data and are not read here.
_DATA_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("arrow", "avro", "bz2", "csv", "db", "doc", "docx", "epub", "feather", "gz", "htm"),
        *("html", "json", "orc", "pdf", "pkl", "sqlite", "tar", "tgz", "tsv", "warc", "wet"),
        *("xlsx", "xml", "xz", "zip", "zst"),
    )
)
_ABOUT = ("readme", "license", "licence", "copying", "notice", "citation", "changelog")


def _suffix(file: str) -> str:
    """Returns the end of a file's name that says what it holds, in lower case."""
    return PurePosixPath(file.removesuffix(GZIP).lower()).suffix or PurePosixPath(file).suffix


def _format(file: str) -> str | None:
    suffix = _suffix(file)
    compressed = file.endswith(GZIP) and suffix == ".parquet"
    return None if compressed else _FORMATS.get(suffix)


def _is_about(file: str) -> bool:
    """Says whether a text is about the data rather than a part of them."""
    return _format(file) == "text" and PurePosixPath(file).name.lower().startswith(_ABOUT)


def _is_passages(file: str) -> bool:
    return PurePosixPath(file).name in ("corpus.jsonl", "corpus.jsonl.gz")


def _is_beir(files: list[str]) -> bool:
    names = {PurePosixPath(file).name.removesuffix(GZIP) for file in files}
    return {"corpus.jsonl", "queries.jsonl"} <= names


def _choose(files: list[str], format_: str) -> list[str]:
    """Returns the files that are read: of the format, or of every format that there is."""
    if format_ == "beir":
        chosen = [file for file in files if _is_passages(file)]
    elif format_ == "auto":
        chosen = [file for file in files if _format(file)]
        if any(_format(file) != "text" for file in chosen):
            chosen = [file for file in chosen if not _is_about(file)]
    else:
        chosen = [file for file in files if _format(file) == format_]
    # Of a file and its compressed copy one is enough.
    plain = set(chosen)
    return [
        file for file in chosen if not file.endswith(GZIP) or file.removesuffix(GZIP) not in plain
    ]


def _find(path: str) -> tuple[Storage, list[str]]:
    """Returns the folder's storage and its files, or the one file that `path` names."""
    storage = open_storage(path)
    files = [file for file in storage.list() if not _is_hidden(file)]
    if files:
        return storage, files
    parent, _, name = storage.uri.rpartition("/")
    folder = open_storage(parent or "/")
    if name and folder.exists(name):
        return folder, [name]
    raise UserError(
        f"corpus {path} does not exist or is empty: correct corpus.path,"
        " such as --set corpus.path=FOLDER"
    )


def _is_hidden(file: str) -> bool:
    """Says whether a system put it there: `.DS_Store`, AppleDouble's `._part.parquet`."""
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(file).parts)


def _name(file: str) -> str:
    """Returns a file's name as UTF-8 can write it: Linux lets names be any bytes."""
    return file.encode("utf-8", "backslashreplace").decode()


def _values(column: pa.Array) -> list[Any]:
    """Returns a column's values: texts as bytes, since nobody has checked that they are UTF-8."""
    if pt.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind):
        return list(column.cast(pa.large_binary()).to_pylist())
    if pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_binary_view(kind):
        return list(column.to_pylist())
    if pt.is_fixed_size_binary(kind) or pt.is_integer(kind) or pt.is_boolean(kind):
        return list(column.to_pylist())
    if pt.is_floating(kind) or pt.is_null(kind):
        return list(column.to_pylist())
    if pt.is_date(kind) or pt.is_timestamp(kind) or pt.is_decimal(kind):
        return list(column.cast(pa.string()).to_pylist())
    return [{"type": str(kind)} if valid else None for valid in column.is_valid().to_pylist()]


def _decoded(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxdict = 6


def _short(value: Any) -> str:
    return excerpt(_SHORT.repr(value))
