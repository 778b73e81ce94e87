"""Rows of labelled sets, from files, S3 or the hub: each a dict, or a reject with its reason."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from cluster.artifacts import Json
from cluster.errors import Reject, UserError
from cluster.storage import Storage, open_storage
from pipelines.corpus.sources import is_text, read_jsonl
from pipelines.mixture.config import FIELDS, HUB, RUN_PASSAGES, LabelledSet

if TYPE_CHECKING:
    from cluster.artifacts import Artifact

Row = tuple[str, dict[str, Any]]  # where it is, and its fields by our names
_SUFFIXES = (".jsonl", ".ndjson", ".tsv", ".parquet")


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
        return [[file, storage.version(file)] for file in beir_files(labelled)]
    if labelled.kind == "bitext":
        storage, *files = _bitext_files(labelled)
        return [[file, storage.version(file)] for file in files]
    storage, name = _file(labelled)
    return storage.version(name)


def read_rows(labelled: LabelledSet, passages: Artifact | None = None) -> Iterator[Row | Reject]:
    """Yields the rows of a set of any kind but retrieval, with our names of the fields.

    Args:
        labelled: The set.
        passages: The run's passages, for a set that is made of them.

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


def beir_files(labelled: LabelledSet) -> tuple[str, str, str]:
    """Returns the paths of a BEIR folder's corpus, queries and qrels.

    The queries of a split may lie in a file of their own, `queries_SPLIT.jsonl`.

    Raises:
        UserError: One of them is missing.
    """
    storage = open_storage(labelled.path)
    queries = f"queries_{labelled.split}.jsonl"
    if not storage.exists(queries):
        queries = "queries.jsonl"
    paths = ("corpus.jsonl", queries, f"qrels/{labelled.split}.tsv")
    missing = [path for path in paths if not storage.exists(path)]
    if missing:
        raise UserError(
            f"labelled set {labelled.name!r}: {labelled.path} has no {', '.join(missing)}; a"
            " retrieval set is a BEIR folder: correct its path or split"
        )
    return paths


def jsonl_rows(storage: Storage, path: str) -> Iterator[Row | Reject]:
    """Yields the objects of a file of JSON lines."""
    for row in read_jsonl(storage, path):
        if len(row) == 3:
            yield row
        elif not isinstance(row[1], dict):
            yield row[0], "no JSON object", str(row[1])
        elif is_text(row[1]):
            yield row
        else:
            yield row[0], "half a character", json.dumps(row[1])[:200]


def tsv_rows(storage: Storage, path: str) -> Iterator[Row | Reject]:
    """Yields the rows of a file with a line of column names, and tabs between; no quoting."""
    header: list[str] = []
    for number, line in enumerate(io.BytesIO(storage.read_bytes(path)), start=1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            yield where, "not UTF-8", line[:200].decode("utf-8", "replace")
            continue
        values = text.split("\t")
        if not header:
            header = values
        elif len(values) == len(header):
            yield where, dict(zip(header, values, strict=True))
        elif text.strip():
            yield where, f"not {len(header)} columns", text[:200]


def _read(labelled: LabelledSet, passages: Artifact | None) -> Iterator[Row | Reject]:
    if labelled.path == RUN_PASSAGES:
        assert passages is not None
        for table in passages.tables(["id", "title", "text"]):
            yield from ((row["id"], row) for row in table.to_pylist())
    elif labelled.path.startswith(HUB):
        yield from _hub_rows(labelled)
    elif labelled.kind == "bitext":
        yield from _bitext_rows(labelled)
    else:
        storage, name = _file(labelled)
        if name.endswith(".parquet"):
            yield from _parquet_rows(storage, name)
        else:
            yield from (tsv_rows if name.endswith(".tsv") else jsonl_rows)(storage, name)


def _file(labelled: LabelledSet) -> tuple[Storage, str]:
    """Returns the folder and the name of the set's file."""
    parent, slash, name = labelled.path.rpartition("/")
    storage = open_storage(parent or slash or ".")
    if not name.endswith(_SUFFIXES):
        raise UserError(
            f"labelled set {labelled.name!r}: {labelled.path} is no {', '.join(_SUFFIXES)} file:"
            f" correct its path, or write {HUB}{labelled.path} for a folder that `datasets` reads"
        )
    if not storage.exists(name):
        raise UserError(
            f"labelled set {labelled.name!r}: {labelled.path} does not exist: correct its path"
        )
    return storage, PurePosixPath(name).as_posix()


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


def _parquet_rows(storage: Storage, path: str) -> Iterator[Row]:
    number = 0
    for batch in pq.ParquetFile(io.BytesIO(storage.read_bytes(path))).iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{path}:{number}", row


def _hub_rows(labelled: LabelledSet) -> Iterator[Row]:
    """Reads a data set of the hub, or a folder, with `datasets`; labels get their names."""
    from datasets import ClassLabel, disable_progress_bars, load_dataset
    from datasets.exceptions import DatasetsError

    disable_progress_bars()  # the run has its own
    name, config, split, *_ = [*labelled.path.removeprefix(HUB).split(":"), "", ""]
    try:
        dataset = load_dataset(
            name, config or None, split=split or "train", revision=labelled.revision
        )
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise UserError(
            f"labelled set {labelled.name!r}: {labelled.path} cannot be loaded:"
            f" {' '.join(str(error).split())}"
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
