"""Retrieval test sets on disk, read so that a broken one is named by file and line.

mteb reads its data from the hub and takes whatever is there; a person's own BEIR folder more often
has a mistake in it than not, and a wrong qrels file looks just like a weak model.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from cluster.errors import Reject, UserError
from cluster.json_lines import GZIP, json_lines, text_lines, unpacked
from pipelines.evaluation.qrels import Qrels, read_qrels

logger = logging.getLogger(__name__)
Value = TypeVar("Value")


class Passage(NamedTuple):
    """A passage of a test corpus; the title is empty where there is none."""

    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class RetrievalDataset:
    """Passages, queries and which passage answers which query.

    Attributes:
        name: Shown in tables.
        split: Name of the qrels.
        passages: Passage id -> passage.
        queries: Query id -> text; only those with qrels are evaluated.
        qrels: Query id -> passage id -> relevance, 0 for judged and not relevant.
        candidates: Query id -> ids of the only passages to rank for it (reranking); None to search
            them all.
        remarks: What its reader has to tell of it.
    """

    name: str
    split: str = "test"
    passages: Mapping[str, Passage]
    queries: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, int]]
    candidates: Mapping[str, Sequence[str]] | None = None
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what in ("passages", "queries", "qrels"):
            if not getattr(self, what):
                raise UserError(f"test set {self.name!r} has no {what}; give at least one")
        if not any(score > 0 for judged in self.qrels.values() for score in judged.values()):
            raise UserError(
                f"test set {self.name!r}: no passage is relevant, each score of the qrels is 0 or "
                "less; give at least one above"
            )
        unknown = sorted(self.qrels.keys() - self.queries.keys())
        if unknown:
            raise UserError(
                f"test set {self.name!r}: {len(unknown)} queries of the qrels are not among the "
                f"queries, such as {unknown[0]!r}; add them or take their qrels out"
            )
        judged, missing = self._judged()
        if missing == judged:
            raise UserError(
                f"test set {self.name!r}: no passage of the qrels is in the corpus (the qrels name "
                f"{min(judged)!r}, the corpus {next(iter(self.passages))!r}); use the same ids"
            )
        for note in self.notes:
            logger.warning("test set %r: %s", self.name, note)

    def _judged(self) -> tuple[set[str], set[str]]:
        """Returns the passages that are judged, and those of them that the corpus lacks."""
        judged = {passage for relevant in self.qrels.values() for passage in relevant}
        return judged, judged - self.passages.keys()

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever reads its scores has to know."""
        judged, missing = self._judged()
        # As in mteb and BEIR: such a passage counts as one that no model finds.
        lacks = (
            f"{len(missing)} of {len(judged)} judged passages are not in the corpus, such as "
            f"{min(missing, default='')!r}"
        )
        finds_itself = "a query's own passage is left out of what it finds, as in mteb's ArguAna"
        return (
            *self.remarks,
            *((lacks,) if missing else ()),
            *((finds_itself,) if self.leaves_out_own else ()),
        )

    @cached_property
    def leaves_out_own(self) -> bool:
        """Whether the queries are passages of the corpus, which would find themselves.

        mteb sets `ignore_identical_ids` by hand for each of its test sets, since in most of them
        equal ids mean nothing; here the ids' texts are compared. Not where somebody judged a query
        to be the answer to itself.
        """
        own = [query for query in self.qrels if query in self.passages]
        same = sum(_is_own(self.queries[query], self.passages[query]) for query in own)
        wanted = any(self.qrels[query].get(query, 0) > 0 for query in own)
        return self.candidates is None and same > len(own) / 2 and not wanted

    @property
    def kind(self) -> str:
        """``retrieval`` or ``rerank``."""
        return "retrieval" if self.candidates is None else "rerank"

    @property
    def counts(self) -> dict[str, int]:
        """What a table says of its size."""
        return {"num_queries": len(self.qrels), "num_passages": len(self.passages)}

    @property
    def num_texts(self) -> int:
        """Texts that a model has to encode."""
        return len(self.qrels) + len(self.passages)

    def judged_texts(self) -> list[str]:
        """Returns the texts that training must not have seen: the queries."""
        return list(self.queries.values())

    def revision(self) -> str:
        """Returns a hash of the content."""
        own = [{"leaves_out_own": True}] if self.leaves_out_own else []
        return content_hash([self.passages, self.queries, self.qrels, self.candidates, *own])


def content_hash(parts: Sequence[Mapping[str, object] | None]) -> str:
    """Returns a hash of mappings of plain values, row by row to keep memory small."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"\n")
        for item in (part or {}).items():
            digest.update(json.dumps(item).encode())
    return digest.hexdigest()[:16]


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
        passages[row_id] = Passage(_text(row, "title", at), _text(row, "text", at))
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


def _is_own(query: str, passage: Passage) -> bool:
    """Says whether a query is the passage that has its id."""
    words = query.split()
    return words in (passage.text.split(), f"{passage.title} {passage.text}".split())
