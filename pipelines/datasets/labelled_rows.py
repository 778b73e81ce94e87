"""Rows of labelled sets, from files, S3 or the hub: each a dict, or a reject with its reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cluster.artifacts import Json
from cluster.errors import Reject, UserError
from cluster.parquet import open_parquet, parquet_columns
from cluster.row_files import (
    FORMATS,
    Row,
    file_format,
    file_lines,
    find_file,
    is_plain,
    jsonl_rows,
    parquet_rows,
    tsv_rows,
    utf8_name,
)
from cluster.storage import Storage, file_versions, open_storage
from pipelines.datasets.labelled_sets import FIELDS, HUB, RUN_PASSAGES, LabelledSet

if TYPE_CHECKING:
    from cluster.artifacts import Artifact

_FORMATS = {**FORMATS, ".tsv": "tsv"}
_ACCEPTED = ".jsonl, .ndjson, .tsv, .jsonl.gz, .ndjson.gz, .tsv.gz, .parquet"
# What `datasets` may read: formats of values alone. Of others, one unpickles and several open
# files that a row names.
_HUB_FORMATS = ("parquet", "json", "csv", "text", "cache")


def version(labelled: LabelledSet) -> Json:
    """Returns what changes with the set's content; of a hub data set, its name and revision.

    Raises:
        UserError: The set does not exist.
    """
    if labelled.path == RUN_PASSAGES:
        return None  # the step reads them as an input
    if labelled.path.startswith(HUB):
        return labelled.path
    if labelled.kind == "retrieval":
        storage = open_storage(labelled.path)
        return [list(each) for each in file_versions(storage, _beir_files(labelled))]
    if labelled.kind == "bitext":
        storage, *files = _bitext_files(labelled)
        return [list(each) for each in file_versions(storage, files)]
    storage, name = _file(labelled)
    return storage.version(name)


def read_rows(labelled: LabelledSet, passages: Artifact | None = None) -> Iterator[Row | Reject]:
    """Yields the rows of a set of any kind but retrieval, with our names of the fields.

    `passages` are the run's, for a set that is made of them.

    Raises:
        UserError: The set does not exist, or is of no kind of file that is read here.
    """
    names = {field: labelled.fields.get(field, field) for field in FIELDS[labelled.kind]}
    for row in _read(labelled, passages):
        if len(row) == 3:
            yield row
        else:
            where, fields = row
            yield where, {ours: fields.get(theirs) for ours, theirs in names.items()}


class RetrievalRows(NamedTuple):
    """A retrieval set: the lines of its qrels with their place, and rows with `_id` and `text`."""

    place: str
    qrels: Iterable[bytes]
    queries: Iterable[Row | Reject]
    corpus: Iterable[Row | Reject]


def retrieval_rows(labelled: LabelledSet) -> RetrievalRows:
    """Returns a retrieval set's parts: of a BEIR folder, or of the hub, laid out as mteb's are.

    There the qrels are the configuration `default`, and `queries` and `corpus` are others; of a
    configuration C the three are `C-qrels`, `C-queries` and `C-corpus`.

    Raises:
        UserError: One of them is missing.
    """
    if not labelled.path.startswith(HUB):
        storage = open_storage(labelled.path)
        corpus, queries, qrels = _beir_files(labelled)
        texts = (jsonl_rows(storage, file) for file in (queries, corpus))
        return RetrievalRows(qrels, file_lines(storage, qrels), *texts)
    name, config, _ = labelled.hub_name
    prefix = f"{config}-" if config else ""
    judged = _hub_rows(labelled, f"{prefix}qrels" if config else "default", labelled.split, _JUDGED)
    lines = ("\t".join(str(row.get(column)) for column in _JUDGED) for _, row in judged)
    texts = (_hub_texts(labelled, f"{prefix}{part}") for part in ("queries", "corpus"))
    return RetrievalRows(name, map(str.encode, lines), *texts)


_JUDGED = ["query-id", "corpus-id", "score"]


def _hub_texts(labelled: LabelledSet, config: str) -> Iterator[Row]:
    for where, row in _hub_rows(labelled, config, None, ["_id", "id", "title", "text"]):
        yield where, {"_id": row.get("id"), **row}


def _beir_files(labelled: LabelledSet) -> tuple[str, str, str]:
    """Returns the paths of a BEIR folder's corpus, queries and qrels.

    The queries of a split may lie in a file of their own, `queries_SPLIT.jsonl`.
    """
    storage = open_storage(labelled.path)
    names = ("corpus.jsonl", "queries.jsonl", f"qrels/{labelled.split}.tsv")
    corpus, queries, qrels = (find_file(storage, name) for name in names)
    queries = find_file(storage, f"queries_{labelled.split}.jsonl") or queries
    if corpus and queries and qrels:
        return corpus, queries, qrels
    paths = (corpus, queries, qrels)
    missing = [name for name, path in zip(names, paths, strict=True) if not path]
    raise UserError(
        f"labelled set {labelled.name!r}: {labelled.path} has no {', '.join(missing)}; a retrieval"
        " set is a BEIR folder: correct its path or split"
    )


def _read(labelled: LabelledSet, passages: Artifact | None) -> Iterator[Row | Reject]:
    if labelled.path == RUN_PASSAGES:
        assert passages is not None
        for table in passages.tables(["id", "title", "text"]):
            yield from ((row["id"], row) for row in table.to_pylist())
    elif labelled.path.startswith(HUB):
        _, config, split = labelled.hub_name
        yield from _hub_rows(labelled, config, split or "train", _columns(labelled))
    elif labelled.kind == "bitext":
        yield from _bitext_rows(labelled)
    else:
        storage, name = _file(labelled)
        format_ = file_format(name, _FORMATS)
        if format_ == "parquet":
            yield from _parquet_rows(labelled, storage, name)
        else:
            yield from (tsv_rows if format_ == "tsv" else jsonl_rows)(storage, name)


def _file(labelled: LabelledSet) -> tuple[Storage, str]:
    """Returns the folder and the name of the set's file."""
    parent, slash, name = labelled.path.rpartition("/")
    storage = open_storage(parent or slash or ".")
    if not file_format(name, _FORMATS):
        raise UserError(
            f"labelled set {labelled.name!r}: {labelled.path} is no {_ACCEPTED} file:"
            f" correct its path, or write {HUB}{labelled.path} for a folder that `datasets` reads"
        )
    if not storage.exists(name):
        raise UserError(
            f"labelled set {labelled.name!r}: {labelled.path} does not exist: correct its path"
        )
    return storage, name


def _bitext_files(labelled: LabelledSet) -> tuple[Storage, str, str]:
    """Returns the folder and the names of its two texts."""
    storage = open_storage(labelled.path)
    one, other = (f"{labelled.fields.get(field, field)}.txt" for field in FIELDS["bitext"])
    missing = [file for file in (one, other) if not storage.exists(file)]
    if missing:
        raise UserError(
            f"labelled set {labelled.name!r}: {labelled.path} has no {', '.join(missing)}: correct"
            " its path, or name its texts as in fields: {sentence1: en, sentence2: de}"
        )
    return storage, one, other


def _bitext_rows(labelled: LabelledSet) -> Iterator[Row | Reject]:
    storage, *files = _bitext_files(labelled)
    one, other = (storage.read_bytes(file).removesuffix(b"\n").split(b"\n") for file in files)
    if len(one) != len(other):
        raise UserError(
            f"labelled set {labelled.name!r}: {files[0]} has {len(one)} lines and {files[1]}"
            f" {len(other)}: lines of one number have to be translations of each other"
        )
    names = [file.removesuffix(".txt") for file in files]
    for number, pair in enumerate(zip(one, other, strict=True), start=1):
        where = f"{files[0]}:{number}"
        try:
            yield where, {name: line.decode() for name, line in zip(names, pair, strict=True)}
        except UnicodeDecodeError:
            yield where, "not UTF-8", b" | ".join(pair)[:200].decode("utf-8", "replace")


def _columns(labelled: LabelledSet) -> list[str]:
    """Returns what the set's columns are called in its file."""
    return [labelled.fields.get(field, field) for field in FIELDS[labelled.kind]]


def _parquet_rows(labelled: LabelledSet, storage: Storage, path: str) -> Iterator[Row | Reject]:
    content, columns = storage.read_bytes(path), _columns(labelled)
    for name, kind in parquet_columns(content, path).items():
        if name in columns and not is_plain(kind):
            raise UserError(
                f"labelled set {labelled.name!r}: column {name!r} of {path} holds {kind}; accepted"
                " are texts, numbers and lists of them"
            )
    yield from parquet_rows(content, columns, path, utf8_name(path))


def _hub_rows(
    labelled: LabelledSet, config: str, split: str | None, columns: list[str]
) -> Iterator[Row]:
    """Reads a data set of the hub, or a folder, with `datasets`; labels get their names.

    Only files of the data set itself, in formats that hold nothing but values, and only those of
    the columns that are there: whoever made it need not be trusted. A split of None is the only one
    of the configuration, or else the set's own.
    """
    from datasets import ClassLabel, disable_progress_bars, load_dataset_builder

    disable_progress_bars()  # the run has its own
    name = labelled.hub_name[0]
    try:
        builder = load_dataset_builder(name, config or None, revision=labelled.revision)
        _check_builder(name, builder)
        builder.download_and_prepare()
        if split is None:
            only, *more = builder.info.splits
            split = labelled.split if more else only
        dataset = builder.as_dataset(split=split)
        columns = [each for each in columns if each in dataset.column_names]
        dataset = dataset.select_columns(columns)
        for column in columns:
            if not _is_plain_feature(dataset.features[column]):
                raise ValueError(f"column {column!r} holds {dataset.features[column]}")
    except Exception as error:  # whatever a stranger's files raise in a library of many readers
        raise UserError(
            f"labelled set {labelled.name!r}: {labelled.path} cannot be loaded:"
            f" {' '.join(str(error).split())[:500]}"
        ) from error
    labels = {
        column: feature.names
        for column, feature in dataset.features.items()
        if isinstance(feature, ClassLabel)
    }
    for number, row in enumerate(dataset, start=1):
        for column, names in labels.items():
            value = row[column]
            # -1 is the hub's "no label".
            row[column] = names[value] if value is not None and value >= 0 else None
        yield f"{name}:{number}", row


def _check_builder(name: str, builder: Any) -> None:
    """Raises UserError where a data set's files lie outside it, or may hold more than values."""
    from datasets import DownloadManager

    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in _HUB_FORMATS:
        raise UserError(f"its files are of the format {kind}; accepted are {_HUB_FORMATS[:-1]}")
    files = builder.config.data_files or {}
    for file in chain.from_iterable(files.values()):
        if Path(name).is_dir():
            inside = Path(file).resolve().is_relative_to(Path(name).resolve())
        else:
            inside = str(file).startswith(f"hf://datasets/{name}@")
        if not inside:
            raise UserError(f"it names the file {file}, which is not its own")
    if kind == "parquet":
        for file in chain.from_iterable(DownloadManager().download(files).values()):
            open_parquet(Path(file).read_bytes(), str(file))


def _is_plain_feature(feature: Any) -> bool:
    """Says whether a column of a data set holds texts, numbers or lists of them."""
    from datasets import ClassLabel, LargeList, List, Value

    if isinstance(feature, List | LargeList):
        return _is_plain_feature(feature.feature)
    return isinstance(feature, Value | ClassLabel)
