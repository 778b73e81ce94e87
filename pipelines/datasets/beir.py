"""Retrieval test sets on disk, read so that a broken one is named by file and line.

mteb reads its data from the hub and takes whatever is there; a person's own BEIR folder more often
has a mistake in it than not, and a wrong qrels file looks just like a weak model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from cluster.errors import Reject, UserError
from cluster.json_lines import GZIP, json_lines, text_lines, unpacked
from pipelines.datasets.qrels import Qrels, read_qrels
from pipelines.datasets.retrieval import RetrievalDataset, TitledText

logger = logging.getLogger(__name__)
Value = TypeVar("Value")


def read_beir(folder: str | Path, split: str = "test") -> RetrievalDataset:
    """Reads a folder in BEIR's layout: ``corpus.jsonl``, ``queries.jsonl``, ``qrels/SPLIT.tsv``.

    Each may be packed, such as ``corpus.jsonl.gz``.

    Raises:
        UserError: A file is missing or malformed; the message names the file, the line and the
            mend.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"BEIR folder {folder} does not exist; give one with corpus.jsonl in it")
    qrels_path = find(root / "qrels" / f"{split}.tsv")
    if not qrels_path.is_file():
        splits = split_names(root / "qrels", ".tsv")
        raise UserError(
            f"{root} has no split {split!r}: it has {', '.join(splits)}; name one of them"
            if splits
            else f"{root} has no qrels: add qrels/{split}.tsv with query-id, corpus-id, score"
        )
    passages = {}
    for at, row_id, row in _rows(root / "corpus.jsonl"):
        if row_id in passages:
            raise UserError(f"{at}: passage {row_id!r} is there twice; give each its own _id")
        passages[row_id] = TitledText(_text(row, "title", at), _text(row, "text", at))
    queries = {}
    for at, row_id, row in _rows(root / "queries.jsonl"):
        if row_id in queries:
            raise UserError(f"{at}: query {row_id!r} is there twice; give each its own _id")
        queries[row_id] = _text(row, "text", at)
    found = read_qrels(unpacked(_open(qrels_path), str(qrels_path)), str(qrels_path))
    qrels = _by_query(found, queries)
    return RetrievalDataset(
        name=root.resolve().name,
        split=split,
        passages=passages,
        queries=queries,
        # Where nothing at all is relevant, the test set says so itself.
        qrels={query: judged for query, judged in qrels.items() if any(judged.values())} or qrels,
        remarks=_remarks(found, qrels),
    )


def find(path: Path) -> Path:
    """Returns the path of a file, or of the packed one where that alone is there."""
    packed = path.with_name(path.name + GZIP)
    return packed if packed.is_file() and not path.is_file() else path


def split_names(folder: Path, ending: str) -> list[str]:
    """Returns the names of a folder's files that end so, packed or not, without the ending."""
    names = {path.name.removesuffix(GZIP) for path in folder.glob("*") if path.is_file()}
    return sorted(name.removesuffix(ending) for name in names if name.endswith(ending))


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields ``file:line`` and the line, blank ones left out."""
    path = find(path)
    return _accepted(text_lines(unpacked(_open(path), str(path)), str(path)))


def read_objects(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields ``file:line`` and the JSON value of each line."""
    path = find(path)
    return _accepted(json_lines(unpacked(_open(path), str(path)), str(path)))


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; a test set needs it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _accepted(rows: Iterator[tuple[str, Value] | Reject]) -> Iterator[tuple[str, Value]]:
    for row in rows:
        if len(row) == 3:
            raise refusal(row)
        yield row


def refusal(reject: Reject) -> UserError:
    """Returns what is said of a line of a test set that cannot be read."""
    where, reason, text = reject
    return UserError(f"{where}: {reason}: {text.strip()[:80]!r}; mend the line")


def _rows(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields ``file:line``, the id and the object of each line."""
    for at, row in read_objects(path):
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


def _by_query(found: Qrels, queries: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Returns the judgements by query; raises UserError for a line that is none."""
    for reject in found.rejects:
        raise refusal(reject)
    qrels: dict[str, dict[str, int]] = {}
    for (query, passage), (score, where) in found.judgements.items():
        if query not in queries:
            raise UserError(
                f"{where}: query {query!r} is not in queries.jsonl; add it or take the line out"
            )
        qrels.setdefault(query, {})[passage] = score
    return qrels


def _remarks(found: Qrels, qrels: Mapping[str, Mapping[str, int]]) -> tuple[str, ...]:
    told = []
    if found.num_below_zero:
        told.append(f"{found.num_below_zero} judgements below zero count as not relevant")
    if found.num_repeated:
        told.append(f"{found.num_repeated} judgements are there more than once and count once")
    without = [query for query, judged in qrels.items() if not any(judged.values())]
    if without:
        told.append(
            f"{len(without)} of {len(qrels)} queries have no relevant passage, such as "
            f"{without[0]!r}, and are left out"
        )
    return tuple(told)
