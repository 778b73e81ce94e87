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
from pathlib import Path
from typing import NamedTuple

from cluster.errors import UserError
from pipelines.corpus.sources import is_text

logger = logging.getLogger(__name__)


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
    """

    name: str
    split: str = "test"
    passages: Mapping[str, Passage]
    queries: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, int]]
    candidates: Mapping[str, Sequence[str]] | None = None

    def __post_init__(self) -> None:
        for what in ("passages", "queries", "qrels"):
            if not getattr(self, what):
                raise UserError(f"test set {self.name!r} has no {what}; give at least one")
        unknown = sorted(self.qrels.keys() - self.queries.keys())
        if unknown:
            raise UserError(
                f"test set {self.name!r}: {len(unknown)} queries of the qrels are not among the "
                f"queries, such as {unknown[0]!r}; add them or take their qrels out"
            )
        judged = {passage for relevant in self.qrels.values() for passage in relevant}
        missing = judged - self.passages.keys()
        if missing == judged:
            raise UserError(
                f"test set {self.name!r}: no passage of the qrels is in the corpus (the qrels name "
                f"{min(judged)!r}, the corpus {next(iter(self.passages))!r}); use the same ids"
            )
        if missing:
            # As in mteb and BEIR: such a passage counts as one that no model finds.
            logger.warning(
                "test set %r: %d of %d judged passages are not in the corpus, such as %r",
                *(self.name, len(missing), len(judged), min(missing)),
            )

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
        return content_hash([self.passages, self.queries, self.qrels, self.candidates])


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

    Raises:
        UserError: A file is missing or malformed; the message names the file, the line and the
            mend.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"BEIR folder {folder} does not exist; give one with corpus.jsonl in it")
    qrels_path = root / "qrels" / f"{split}.tsv"
    if not qrels_path.is_file():
        splits = sorted(path.stem for path in (root / "qrels").glob("*.tsv"))
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
    return RetrievalDataset(
        name=root.resolve().name,
        split=split,
        passages=passages,
        queries=queries,
        qrels=_read_qrels(qrels_path, queries),
    )


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields ``file:line`` and the line, blank ones left out."""
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", line
    except FileNotFoundError:
        raise UserError(f"{path} is missing; a test set needs it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason}); convert it") from None


def read_objects(path: Path) -> Iterator[tuple[str, object]]:
    """Yields ``file:line`` and the JSON value of each line."""
    for at, line in read_lines(path):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{at}: not JSON ({error.msg}, column {error.colno}); write one object a line"
            ) from None
        if "\\u" in line and not is_text(value):
            raise UserError(f"{at}: half a character, such as \\ud83d alone; take it out")
        yield at, value


def _rows(path: Path) -> Iterator[tuple[str, str, dict[str, object]]]:
    """Yields ``file:line``, the id and the object of each line."""
    for at, row in read_objects(path):
        if not isinstance(row, dict) or not isinstance(row.get("_id"), str | int):
            raise UserError(f'{at}: no "_id"; write {{"_id": "...", "text": "..."}}')
        yield at, str(row["_id"]), row


def _text(row: dict[str, object], field: str, at: str) -> str:
    value = row.get(field)
    if value is None and field == "title":
        return ""
    if not isinstance(value, str):
        raise UserError(f'{at}: "{field}" is {type(value).__name__}, it must be a string')
    return value


def _read_qrels(path: Path, queries: Mapping[str, str]) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for number, (at, line) in enumerate(read_lines(path)):
        columns = line.rstrip("\r\n").split("\t")
        try:
            query, passage, score = columns
            relevance = int(score)
        except ValueError:
            if number == 0 and len(columns) == 3:
                continue  # the header
            raise UserError(
                f"{at}: {line.strip()!r} is not query-id, corpus-id and a whole-number score "
                "with tabs between; mend the line"
            ) from None
        if query not in queries:
            raise UserError(
                f"{at}: query {query!r} is not in queries.jsonl; add it or take the line out"
            )
        qrels.setdefault(query, {})[passage] = relevance
    return qrels
