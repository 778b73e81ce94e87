"""A retrieval test set in memory: passages, queries and which passage answers which query."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from cluster.errors import UserError

logger = logging.getLogger(__name__)


class TitledText(NamedTuple):
    """A passage of a test set; the title is empty where there is none."""

    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class RetrievalDataset:
    """Passages, queries and which passage answers which query.

    Attributes:
        name: Shown in tables.
        split: Name of the qrels.
        passages: TitledText id -> passage.
        queries: Query id -> text; only those with qrels are evaluated.
        qrels: Query id -> passage id -> relevance, 0 for judged and not relevant.
        candidates: Query id -> ids of the only passages to rank for it (reranking); None to search
            them all.
        remarks: What its reader has to say of it.
    """

    name: str
    split: str = "test"
    passages: Mapping[str, TitledText]
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


def _is_own(query: str, passage: TitledText) -> bool:
    """Says whether a query is the passage that has its id."""
    words = query.split()
    return words in (passage.text.split(), f"{passage.title} {passage.text}".split())
