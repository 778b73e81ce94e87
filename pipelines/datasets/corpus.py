"""Corpora as people have them: rows, texts, web pages and archives of them, on a disk or on S3.

What cannot be read, a row, a page or the rest of a file, is a reject with its reason. A corpus that
does not exist, or that is not what the recipe says, is the user's mistake. What is read and what is
not stands in docs/what-is-read.md; `sources/` has a reader for each format.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from fnmatch import fnmatch
from itertools import islice
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cluster.artifacts import fingerprint
from cluster.config import Config
from cluster.errors import Reject, UserError, excerpt
from cluster.row_files import Row, find_files, short
from pipelines.datasets.documents import Document, Page
from pipelines.datasets.pages.main_text import MainText
from pipelines.datasets.pages.workers import PageWorkers
from pipelines.datasets.sources.arc import arc_pages
from pipelines.datasets.sources.arrow import arrow_rows
from pipelines.datasets.sources.csv_rows import csv_count, csv_rows, tsv_rows
from pipelines.datasets.sources.html import html_pages
from pipelines.datasets.sources.json_rows import json_count, json_rows, jsonl_rows
from pipelines.datasets.sources.parquet import parquet_count, parquet_rows
from pipelines.datasets.sources.streams import PACKED, Source, Span, Unreadable, count_lines
from pipelines.datasets.sources.text import texts
from pipelines.datasets.sources.warc import warc_pages
from pipelines.fingerprints import NotFingerprinted

Item = Row | Document | Page | Reject

_READERS: dict[str, Callable[[Source], Iterator[Item]]] = {
    "arc": arc_pages,
    "arrow": arrow_rows,
    "csv": csv_rows,
    "html": html_pages,
    "json": json_rows,
    "jsonl": jsonl_rows,
    "parquet": parquet_rows,
    "text": texts,
    "tsv": tsv_rows,
    "warc": warc_pages,
}
# Of files that may be read by spans: what a span adds to `Span.num_before`, or None.
_COUNTERS: dict[str, Callable[[Source], int | None]] = {
    "csv": csv_count,
    "json": json_count,
    "jsonl": count_lines,
    "parquet": parquet_count,
    "tsv": count_lines,
}


class CorpusConfig(Config):
    """Where the passages come from and how they are cut."""

    path: Annotated[str, NotFingerprinted] = Field(
        description="a file or folder, file:// or s3:// URI"
    )
    include: tuple[str, ...] = Field(
        default=("*",), description="of a folder: files like any of these, such as 'news/*'"
    )
    format: Literal[
        "auto",
        "arc",
        "arrow",
        "beir",
        "csv",
        "html",
        "json",
        "jsonl",
        "parquet",
        "text",
        "tsv",
        "warc",
    ] = "auto"
    text_field: str = Field(
        default="text", description="a.b names the field b of the field a, here and below"
    )
    title_field: str = "title"
    url_field: str = "url"
    html_field: str | None = Field(
        default=None, description="that holds HTML, whose main text is taken instead of text_field"
    )
    id_field: str | None = Field(default=None, description="default: _id or id, else the line")
    main_text: MainText = Field(
        default="trafilatura", description="what finds the main text of web pages; or resiliparse"
    )
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
        records_passed_over: What archives hold beside pages, by kind, as far as they were read.
        field_names: The first names of fields that rows have, and any that the recipe names.
    """

    def __init__(self, config: CorpusConfig) -> None:
        """Finds the corpus's files; raises UserError where there is none."""
        self.config = config
        self.passed_over: Counter[str] = Counter()
        self.records_passed_over: Counter[str] = Counter()
        self.format: str = config.format
        self.field_names: dict[str, None] = {}
        self.storage, found = find_files(config.path)
        if not found:
            raise UserError(
                f"corpus {config.path} does not exist or is empty: correct corpus.path,"
                " such as --set corpus.path=FOLDER"
            )
        paths = [file.path for file in found]
        files = [path for path in paths if any(fnmatch(path, p) for p in config.include)]
        if not files:
            raise UserError(
                f"corpus {config.path} has {len(found)} files and none like"
                f" {' or '.join(config.include)}: correct corpus.include"
            )
        if self.format == "auto" and _is_beir(files):
            self.format = "beir"
        self.files = _choose(files, self.format)
        chosen = frozenset(self.files)
        self._stored = {file.path: file for file in found if file.path in chosen}
        self._span: Span | None = None
        self.passed_over.update(map(_suffix, set(files) - set(self.files)))
        self._check_files()

    def version(self) -> str:
        """Returns a fingerprint of the corpus's content."""
        stored = [self._stored[file] for file in self.files]
        return fingerprint([[f.path, f.version or self.storage.version(f.path)] for f in stored])

    def sizes(self) -> list[int]:
        """Returns the bytes of each file."""
        return [self._stored[file].num_bytes for file in self.files]

    def some(self, files: Sequence[str], span: Span | None = None) -> "Corpus":
        """Returns a corpus of some of its files, or a span of one, small enough to travel."""
        part = copy(self)
        part.files, part._span = list(files), span
        part._stored = {file: self._stored[file] for file in files}
        part.passed_over, part.records_passed_over, part.field_names = Counter(), Counter(), {}
        return part

    def has_spans(self, file: str) -> bool:
        """Says whether a file may be read by spans: `count` knows."""
        return _format(file) in _COUNTERS and _unpacked(file) == PurePosixPath(file)

    def count(self, spans: Sequence[Span]) -> list[int] | None:
        """Returns what each span of its one file adds to `Span.num_before` of those behind it.

        None if the file must be read as a whole.
        """
        (file,) = self.files
        nums = []
        for span in spans:
            try:
                num = _COUNTERS[_format(file)](self._source(file, span))
            except Unreadable:
                return None
            if num is None:
                return None
            nums.append(num)
        return nums

    def documents(self) -> Iterator[Document | Reject]:
        """Yields each document, or why it could not be read, in the order of the files.

        Pages are read by processes beside this one, which end with the iterator.

        Raises:
            UserError: No row has a field that the recipe names, which shows at the end; or a file
                with columns lacks that of the text.
        """
        yield from self.read()
        self.check_fields(self.field_names)

    def read(self, num_cores: int | None = None) -> Iterator[Document | Reject]:
        """Yields what `documents` does, of a part of a corpus that need not have every field.

        Pages are read by `num_cores` processes, as many as there are cores if None.

        Raises:
            UserError: A file with columns lacks that of the text.
        """
        self.field_names.clear()
        self.records_passed_over.clear()
        with PageWorkers(self.config.main_text, max_workers=num_cores) as workers:
            yield from workers.documents(self._items())

    def first_names(self, num: int) -> list[str]:
        """Returns so many of `field_names`, however many and long they are, and the recipe's."""
        first = [excerpt(name) for name in islice(self.field_names, num)]
        return first + [name for name in self._fields if name in self.field_names]

    def check_fields(self, names: Iterable[str]) -> None:
        """Raises UserError if rows have fields and the recipe names one that is not among them."""
        config = self.config
        there = dict.fromkeys(names)
        named = {"id_field": config.id_field, self._content_key: self._content_field}
        for option in ("title_field", "url_field"):
            if getattr(config, option) != CorpusConfig.model_fields[option].default:
                named[option] = getattr(config, option)
        for option, name in named.items():
            if there and name is not None and name not in there:
                raise UserError(
                    f"corpus {config.path}: no row has the field {name!r}, only"
                    f" {excerpt(', '.join(there))}: correct corpus.{option}"
                )

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

    @property
    def _content_key(self) -> str:
        return "html_field" if self.config.html_field else "text_field"

    @property
    def _content_field(self) -> str:
        return self.config.html_field or self.config.text_field

    @property
    def _id_fields(self) -> tuple[str, ...]:
        return (self.config.id_field,) if self.config.id_field else ("_id", "id")

    @property
    def _fields(self) -> tuple[str, ...]:
        """The fields that are read of rows, that of the text or the HTML first."""
        config = self.config
        fields = (self._content_field, config.title_field, config.url_field, *self._id_fields)
        return tuple(dict.fromkeys(fields))

    def _items(self) -> Iterator[Document | Page | Reject]:
        for file in self.files:
            source = self._source(file, self._span)
            try:
                for item in _READERS[_format(file)](source):
                    if isinstance(item, tuple) and len(item) == 2:
                        yield self._of_row(*item)
                    else:
                        yield item
            except Unreadable as error:
                yield source.name, str(error), ""

    def _source(self, file: str, span: Span | None) -> Source:
        return Source(
            storage=self.storage,
            path=file,
            version=self._stored[file].version,
            span=span,
            fields=self._fields,
            columns=self.field_names,
            passed_over=self.records_passed_over,
        )

    def _of_row(self, where: str, row: dict[str, Any]) -> Document | Page | Reject:
        fields = {name: value for name in self._fields if (value := _field(row, name)) is not None}
        # The first names of rows are remembered for errors, and any that the recipe names.
        new = islice(row, max(0, 100 - len(self.field_names)))
        self.field_names.update(dict.fromkeys((*new, *fields)))
        id_ = next((fields[name] for name in self._id_fields if name in fields), where)
        if not isinstance(id_, str | int | float):
            return where, "its id is neither a text nor a number", short(row)
        content = fields.get(self._content_field)
        if not isinstance(content, str):
            return str(id_), f"no text in field {self._content_field!r}", short(row)
        title, url = (
            value if isinstance(value := fields.get(name), str) else None
            for name in (self.config.title_field, self.config.url_field)
        )
        if self.config.html_field is None:
            return Document(name=str(id_), title=title or "", text=content, url=url)
        return Page(
            name=str(id_),
            title=title or "",
            url=url,
            content=content.encode(),
            charset="utf-8",
        )


_SUFFIXES = {
    **{f".{each}": each for each in ("arc", "arrow", "csv", "html", "json", "jsonl", "parquet")},
    **{f".{each}": each for each in ("tsv", "warc")},
    **dict.fromkeys((".txt", ".md", ".rst"), "text"),
    ".htm": "html",
    ".ndjson": "jsonl",
    ".wet": "warc",
    ".xhtml": "html",
}
_ACCEPTED = (
    "a BEIR folder, .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, .txt, .md, .rst, .html,"
    " .htm, .xhtml, .warc, .wet and .arc (each may be .gz, .zst or .bz2)"
)
# Formats that hold data and are not read here.
_DATA_SUFFIXES = frozenset(
    f".{each}"
    for each in (
        *("avro", "bz2", "db", "doc", "docx", "epub", "feather", "gz", "orc", "pdf", "pkl"),
        *("sqlite", "tar", "tgz", "xlsx", "xml", "xz", "zip", "zst"),
    )
)
_ABOUT = ("readme", "license", "licence", "copying", "notice", "citation", "changelog")
# What Hugging Face's `save_to_disk` and hub write beside the rows.
_DESCRIPTIONS = ("state.json", "dataset_info.json", "dataset_dict.json", "dataset_infos.json")


def _field(row: dict[str, Any], name: str) -> Any:
    """Returns a field, or one within another that `name` gives with a dot, or None."""
    if name in row or "." not in name:
        return row.get(name)
    value: Any = row
    for step in name.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return value


def _unpacked(file: str) -> PurePosixPath:
    """Returns a file's path without the end that says how it is packed."""
    path = PurePosixPath(file)
    return path.with_suffix("") if path.suffix.lower() in PACKED else path


def _suffix(file: str) -> str:
    return (_unpacked(file).suffix or PurePosixPath(file).suffix).lower()


def _format(file: str) -> str:
    """Returns a file's format by its suffix in any case; "" if it is not read here."""
    name = _unpacked(file).name.lower()
    return "" if name in _DESCRIPTIONS else _SUFFIXES.get(PurePosixPath(name).suffix, "")


def _is_about(file: str) -> bool:
    """Says whether a text is about the data rather than a part of them."""
    return _format(file) == "text" and PurePosixPath(file).name.lower().startswith(_ABOUT)


def _is_beir(files: Iterable[str]) -> bool:
    """Says whether the files are a BEIR folder's, whose queries are JSON lines too."""
    return {"corpus.jsonl", "queries.jsonl"} <= {_unpacked(file).name for file in files}


def _choose(files: list[str], format_: str) -> list[str]:
    """Returns the files that are read: of the format, or of every format that there is.

    Packed files that lie beside the same file unpacked are left out.
    """
    if format_ == "beir":
        chosen = [file for file in files if _unpacked(file).name == "corpus.jsonl"]
    elif format_ == "auto":
        chosen = [file for file in files if _format(file)]
        if any(_format(file) != "text" for file in chosen):
            chosen = [file for file in chosen if not _is_about(file)]
    else:
        chosen = [file for file in files if _format(file) == format_]
    return [
        file
        for file in chosen
        if (unpacked := str(_unpacked(file))) == file or unpacked not in chosen
    ]
