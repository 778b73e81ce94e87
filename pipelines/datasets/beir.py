"""Retrieval test sets on disk, read so that a broken one is named by file and line.

mteb reads its data from the hub and takes whatever is there; a person's own BEIR folder more often
has a mistake in it than not, and a wrong qrels file looks just like a weak model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from cluster.errors import Reject, UserError
from cluster.json_lines import GZIP, json_lines, text_lines
from cluster.row_files import file_lines, find_file
from cluster.storage import Storage, join, open_storage
from pipelines.datasets.qrels import Qrels, read_qrels
from pipelines.datasets.retrieval import RetrievalDataset, TitledText

Value = TypeVar("Value")


def read_beir(folder: str | Path, split: str = "test") -> RetrievalDataset:
    """Reads a folder in BEIR's layout: ``corpus.jsonl``, ``queries.jsonl``, ``qrels/SPLIT.tsv``.

    Each may be packed, such as ``corpus.jsonl.gz``.

    Raises:
        UserError: A file is missing or malformed; the message names the file, the line and
            what to do.
    """
    storage = open_storage(folder)
    if not any(storage.entries()):
        raise UserError(
            f"BEIR folder {folder} does not exist or is empty; give one with corpus.jsonl in it"
        )
    qrels_path = find_file(storage, f"qrels/{split}.tsv")
    if qrels_path is None:
        splits = split_names(storage, "qrels/", ".tsv")
        raise UserError(
            f"{storage.uri} has no split {split!r}: it has {', '.join(splits)}; name one of them"
            if splits
            else f"{folder} has no qrels: add qrels/{split}.tsv with query-id, corpus-id, score"
        )
    passages = {}
    for at, row_id, row in _rows(storage, "corpus.jsonl"):
        if row_id in passages:
            raise UserError(f"{at}: passage {row_id!r} is there twice; give each its own _id")
        passages[row_id] = TitledText(_text(row, "title", at), _text(row, "text", at))
    queries = {}
    for at, row_id, row in _rows(storage, "queries.jsonl"):
        if row_id in queries:
            raise UserError(f"{at}: query {row_id!r} is there twice; give each its own _id")
        queries[row_id] = _text(row, "text", at)
    judged = read_qrels(file_lines(storage, qrels_path), join(storage.uri, qrels_path))
    qrels = _by_query(judged, queries)
    return RetrievalDataset(
        name=Path(folder).resolve().name,
        split=split,
        passages=passages,
        queries=queries,
        # Where nothing at all is relevant, the test set says so itself.
        qrels={query: row for query, row in qrels.items() if any(row.values())} or qrels,
        remarks=_remarks(judged, qrels),
    )


def split_names(storage: Storage, prefix: str, ending: str) -> list[str]:
    """Returns what stands between `prefix` and `ending` in the names of files, packed or not."""
    names = [path.removesuffix(GZIP).removeprefix(prefix) for path in storage.list()]
    return sorted({n.removesuffix(ending) for n in names if n.endswith(ending) and "/" not in n})


def read_lines(storage: Storage, path: str) -> Iterator[tuple[str, str]]:
    """Yields ``file:line`` and the line, blank ones left out."""
    return _accepted(text_lines(_lines(storage, path), join(storage.uri, path)))


def read_objects(storage: Storage, path: str) -> Iterator[tuple[str, Any]]:
    """Yields ``file:line`` and the JSON value of each line."""
    return _accepted(json_lines(_lines(storage, path), join(storage.uri, path)))


def _lines(storage: Storage, path: str) -> Iterator[bytes]:
    there = find_file(storage, path)
    if there is None:
        raise UserError(f"{join(storage.uri, path)} is missing; a test set needs it")
    return file_lines(storage, there)


def _accepted(rows: Iterator[tuple[str, Value] | Reject]) -> Iterator[tuple[str, Value]]:
    for row in rows:
        if len(row) == 3:
            raise _unreadable(row)
        yield row


def _unreadable(reject: Reject) -> UserError:
    """Returns what is said of a line of a test set that cannot be read."""
    where, reason, text = reject
    return UserError(f"{where}: {reason}: {text.strip()[:80]!r}; correct the line")


def _rows(storage: Storage, path: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields ``file:line``, the id and the object of each line."""
    for at, row in read_objects(storage, path):
        if not isinstance(row, dict) or not isinstance(row.get("_id"), str | int):
            raise UserError(f'{at}: no "_id"; write {{"_id": "...", "text": "..."}}')
        yield at, str(row["_id"]), row


def _text(row: dict[str, Any], field: str, at: str) -> str:
    value = row.get(field)
    if value is None and field == "title":
        return ""
    if not isinstance(value, str):
        raise UserError(f'{at}: "{field}" is {type(value).__name__}, it must be a string')
    return value


def _by_query(judged: Qrels, queries: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Returns the judgements by query; raises UserError for a line that is none."""
    for reject in judged.rejects:
        raise _unreadable(reject)
    qrels: dict[str, dict[str, int]] = {}
    for (query, passage), (score, where) in judged.judgements.items():
        if query not in queries:
            raise UserError(
                f"{where}: query {query!r} is not in queries.jsonl; add it or take the line out"
            )
        qrels.setdefault(query, {})[passage] = score
    return qrels


def _remarks(judged: Qrels, qrels: Mapping[str, Mapping[str, int]]) -> tuple[str, ...]:
    remarks = []
    if judged.num_below_zero:
        remarks.append(f"{judged.num_below_zero} judgements below zero count as not relevant")
    if judged.num_repeated:
        remarks.append(f"{judged.num_repeated} judgements are there more than once and count once")
    without = [query for query, row in qrels.items() if not any(row.values())]
    if without:
        remarks.append(
            f"{len(without)} of {len(qrels)} queries have no relevant passage, such as "
            f"{without[0]!r}, and are left out"
        )
    return tuple(remarks)
