"""Corpora as people have them: JSONL, Parquet, plain text, a BEIR folder, on a disk or on S3.

A row that cannot be read is a reject with its reason. A corpus that does not exist, that is not
what the recipe says, or a file of it that is not what its name says, is the user's mistake. What is
read and what is not stands in docs/what-is-read.md.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cluster.artifacts import fingerprint
from cluster.config import Config
from cluster.errors import Reject, UserError, excerpt
from cluster.json_lines import GZIP
from cluster.parquet import parquet_columns
from cluster.row_files import (
    FORMATS,
    Row,
    beir_corpora,
    file_format,
    file_lines,
    find_files,
    is_beir,
    jsonl_rows,
    parquet_rows,
    short,
    suffix,
    utf8_name,
    without_copies,
)
from cluster.storage import file_versions
from pipelines.fingerprints import NotFingerprinted


@dataclass(frozen=True, kw_only=True)
class Document:
    """A source text: `name` is its locator in the corpus, unique and stable."""

    name: str
    title: str
    text: str


class CorpusConfig(Config):
    """Where the passages come from and how they are cut."""

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
    """A corpus that exists; iterate over `documents`.

    Attributes:
        files: The files that are read, in their order.
        passed_over: Files that are not, by suffix; hidden ones are not counted.
    """

    def __init__(self, config: CorpusConfig) -> None:
        """Finds the corpus's files; raises UserError where there is none."""
        self.config = config
        self.passed_over: Counter[str] = Counter()
        self.format: str = config.format
        self._names: dict[str, None] = {}
        self.storage, all_files = find_files(config.path)
        if not all_files:
            raise UserError(
                f"corpus {config.path} does not exist or is empty: correct corpus.path,"
                " such as --set corpus.path=FOLDER"
            )
        files = [file for file in all_files if any(fnmatch(file, p) for p in config.include)]
        if not files:
            raise UserError(
                f"corpus {config.path} has {len(all_files)} files and none like"
                f" {' or '.join(config.include)}: correct corpus.include"
            )
        if self.format == "auto" and is_beir(files):
            self.format = "beir"
        self.files = _choose(files, self.format)
        self.passed_over.update(map(suffix, set(files) - set(self.files)))
        self._check_files()

    def version(self) -> str:
        """Returns a fingerprint of the corpus's content."""
        return fingerprint([list(each) for each in file_versions(self.storage, self.files)])

    def documents(self) -> Iterator[Document | Reject]:
        """Yields each document, or why it could not be read, in the order of the files.

        Raises:
            UserError: A file is not what its suffix says, or no row has a field that the recipe
                names, which shows at the end.
        """
        self._names.clear()
        for file in self.files:
            if _format(file) == "text":
                yield self._text(file)
                continue
            for row in self._rows(file):
                yield row if len(row) == 3 else self._document(row[1], row[0])
        self._check_fields()

    def _check_files(self) -> None:
        config = self.config
        beside = ", ".join(f"{count} {each}" for each, count in self.passed_over.most_common(3))
        if not self.files:
            what = "that looks like a corpus" if self.format == "auto" else f"of {self.format}"
            raise UserError(
                f"corpus {config.path} has no file {what}, only {beside}: accepted are"
                f" {_ACCEPTED}; correct corpus.path or corpus.format"
            )
        texts = [file for file in self.files if not _is_about(file)]
        if self.format == "auto" and {_format(file) for file in self.files} == {"text"}:
            num_unread = sum(self.passed_over[each] for each in _DATA_SUFFIXES)
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

    def _rows(self, file: str) -> Iterator[Row | Reject]:
        config, place = self.config, f"corpus file {utf8_name(file)}"
        if _format(file) == "jsonl":
            for row in jsonl_rows(self.storage, file):
                if len(row) == 2:
                    self._note(row[1])
                yield row
            return
        content = self.storage.read_bytes(file)
        names = parquet_columns(content, place)
        if config.text_field not in names:
            raise UserError(
                f"{place} has no column {config.text_field!r}, only"
                f" {excerpt(', '.join(names))}: set corpus.text_field"
            )
        self._note(names)
        columns = dict.fromkeys([config.text_field, config.title_field, *self._id_fields])
        yield from parquet_rows(content, list(columns), place, utf8_name(file))

    def _text(self, file: str) -> Document | Reject:
        name = utf8_name(file)
        try:
            text = b"".join(file_lines(self.storage, file)).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return name, "not UTF-8", f"byte {error.start} of {name}"
        return Document(name=name, title=PurePosixPath(name.removesuffix(GZIP)).stem, text=text)

    @property
    def _id_fields(self) -> list[str]:
        return [self.config.id_field] if self.config.id_field else ["_id", "id"]

    def _document(self, row: dict[str, Any], where: str) -> Document | Reject:
        text, title = row.get(self.config.text_field), row.get(self.config.title_field)
        id_ = next((row[field] for field in self._id_fields if row.get(field) is not None), where)
        if not isinstance(id_, str | int | float):
            return where, "its id is neither a text nor a number", short(row)
        if not isinstance(text, str):
            return str(id_), f"no text in field {self.config.text_field!r}", short(row)
        return Document(name=str(id_), title=title if isinstance(title, str) else "", text=text)


_FORMATS = {**FORMATS, ".txt": "text", ".md": "text", ".rst": "text"}
_ACCEPTED = "a BEIR folder, .jsonl, .ndjson, .txt, .md and .rst (each may be .gz), and .parquet"
# Formats that hold data and are not read here.
_DATA_SUFFIXES = frozenset(
    f".{each}"
    for each in (
        *("arrow", "avro", "bz2", "csv", "db", "doc", "docx", "epub", "feather", "gz", "htm"),
        *("html", "json", "orc", "pdf", "pkl", "sqlite", "tar", "tgz", "tsv", "warc", "wet"),
        *("xlsx", "xml", "xz", "zip", "zst"),
    )
)
_ABOUT = ("readme", "license", "licence", "copying", "notice", "citation", "changelog")


def _format(file: str) -> str | None:
    return file_format(file, _FORMATS)


def _is_about(file: str) -> bool:
    """Says whether a text is about the data rather than a part of them."""
    return _format(file) == "text" and PurePosixPath(file).name.lower().startswith(_ABOUT)


def _choose(files: list[str], format_: str) -> list[str]:
    """Returns the files that are read: of the format, or of every format that there is."""
    if format_ == "beir":
        chosen = beir_corpora(files)
    elif format_ == "auto":
        chosen = [file for file in files if _format(file)]
        if any(_format(file) != "text" for file in chosen):
            chosen = [file for file in chosen if not _is_about(file)]
    else:
        chosen = [file for file in files if _format(file) == format_]
    return without_copies(chosen)
