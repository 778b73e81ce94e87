"""Documents that no training query comes from, and the queries that they bring with them.

The step `gate` judges the student by them: by what the LLM writes for some of their passages, and,
for no LLM's time, by their titles and by their passages' first sentences.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import itemgetter
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from actors.words import compared_words, letter_share, num_words, sentence_starts
from cluster.artifacts import Artifact
from cluster.exchange import run_tasks
from cluster.shard_groups import ShardGroup, shard_groups
from pipelines.corpus.cutting import Passage
from pipelines.corpus.filters.length import MIN_WORDS
from pipelines.ids import document_name

HELD_OUT = "held out for the gate"  # why training may not use a query
FILE = "held_out.json"  # of the step `seeds`: the documents' names
MAX_HELD_OUT_SHARE = 0.25  # of the documents
_MAX_DOCUMENTS = 1 << 20  # of which those that are held out are a quarter at most
MIN_QUERY_WORDS = 3
MAX_QUERY_WORDS = 40
MIN_LETTER_SHARE = 0.6


@dataclass(frozen=True, kw_only=True)
class OwnQuery:
    """A query that a passage brings with it.

    Attributes:
        kind: What it was.
        query: The title, or the first sentence.
        passage: The passage without it, which the query has to find: it would find the whole one
            by its own words.
    """

    kind: Literal["title", "first sentence"]
    query: str
    passage: Passage


def draw(text: str) -> bytes:
    """Returns what decides, in place of chance, who is drawn: of several, the smallest are."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def draw_numbers(prefix: str, texts: Iterable[str]) -> np.ndarray:
    """Returns a number of 64 bits for each text, uint64 ``[texts]``: who is drawn has the smallest.

    They are in the order of `draw`, which the chance of two equal ones, 2^-64, does not disturb.
    """
    beginnings = (draw(f"{prefix} {text}")[:8] for text in texts)
    return np.frombuffer(b"".join(beginnings), ">u8").astype(np.uint64)


def hold_out(passages: Artifact, *, num_queries: int, num_passages: int, seed: int) -> list[str]:
    """Draws documents until theirs are so many own queries and passages.

    They are drawn by a hash of their names, so that more hold the fewer, and are a quarter of all
    documents at most, and 262,144. Tasks read the passages; nothing is held but 8 bytes for each of
    a million documents, and what is counted of those that are looked at.

    Returns:
        The documents' names, in the order in which they were drawn.
    """
    order = _smallest_documents(passages, seed)
    order = order[: int(MAX_HELD_OUT_SHARE * len(order))]
    looked_at: list[_Counted] = []
    size = num_queries + num_passages
    while True:
        wanted = order[len(looked_at) : size]
        looked_at += _count_documents(passages, seed, wanted)
        chosen = _enough(looked_at, num_queries, num_passages)
        if chosen is not None or size >= len(order):
            return [each.name for each in (looked_at if chosen is None else chosen)]
        size *= 2


def held_out_documents(seeds: Artifact) -> frozenset[str]:
    """Returns the documents that the step `seeds` held out; none where there is no gate."""
    if not seeds.storage.exists(FILE):
        return frozenset()
    return frozenset(json.loads(seeds.storage.read_bytes(FILE)))


@dataclass(frozen=True)
class TrainingPassages(Artifact):
    """The passages of a corpus that queries for training may come from: all not held out."""

    held_out: frozenset[str] = frozenset()

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Yields the shards one by one, without the passages of documents that are held out."""
        for shard in self.shards:
            names = map(document_name, self.shard(shard, ["source"])["source"].to_pylist())
            yield self.shard(shard, columns).filter([name not in self.held_out for name in names])


def read_passages(passages: Artifact) -> Iterator[Passage]:
    """Yields the passages of a corpus, a shard in memory at a time."""
    for table in passages.tables():
        yield from map(Passage.of_row, table.to_pylist())


def repeated_titles(passages: Iterable[Passage]) -> frozenset[str]:
    """Returns the titles, without case, of more than one document: they name none of them."""
    documents = {(passage.title.casefold(), document_name(passage.source)) for passage in passages}
    counts = Counter(title for title, _ in documents)
    return frozenset(title for title, count in counts.items() if count > 1)


def own_queries(document: Sequence[Passage], repeated: frozenset[str]) -> list[OwnQuery]:
    """Returns the queries that a document's passages bring with them, in the passages' order.

    They are its title, unless it is among the `repeated`, and each passage's first sentence. One
    that is no query in its length or letters is left out, and one that its passage holds twice, or
    that leaves too little of it.
    """
    found = []
    for number, passage in enumerate(document):
        body = behind_title(passage)
        if number == 0 and passage.title.casefold() not in repeated:
            rest = replace(passage, title="", text=body)
            found.append(OwnQuery(kind="title", query=passage.title, passage=rest))
        _, end = next(sentence_spans(body))
        rest = replace(passage, text=body[end:].strip())
        found.append(OwnQuery(kind="first sentence", query=body[:end].strip(), passage=rest))
    return [each for each in found if _is_fit(each)]


def sentence_spans(text: str) -> Iterator[tuple[int, int]]:
    """Yields the start and end of each sentence, and at least one; none goes beyond its line.

    >>> list(sentence_spans("What bees do\\nThey dance. So it is."))
    [(0, 12), (13, 25), (25, 34)]
    """
    line_start = 0
    for line in text.split("\n"):
        starts = [line_start + start for start in sentence_starts(line)]
        line_end = line_start + len(line)
        yield from pairwise([*starts, line_end])
        line_start = line_end + 1


def reads_as_query(text: str, min_words: int, max_words: int) -> bool:
    """Whether a text is fit to be a query, by its number of words and its share of letters."""
    return min_words <= num_words(text) <= max_words and letter_share(text) >= MIN_LETTER_SHARE


def behind_title(passage: Passage) -> str:
    """Returns the text without the title, with which many corpora begin it."""
    title, text = passage.title, passage.text
    if title and text[: len(title)].casefold() == title.casefold():
        text = text[len(title) :].lstrip(" .:-\n")
    return text


@dataclass(kw_only=True)
class _Counted:
    """What a document has.

    Attributes:
        name: Its own.
        title: Without case, that of its first passage; None where it is no query.
        size: Passages.
        num_sentences: First sentences that are queries.
    """

    name: str
    title: str | None
    size: int
    num_sentences: int


def _enough(
    documents: Sequence[_Counted], num_queries: int, num_passages: int
) -> list[_Counted] | None:
    """Returns the first documents that have so much; None if all of them have less."""
    queries, size = 0, 0
    for number, each in enumerate(documents):
        if queries >= num_queries and size >= num_passages:
            return list(documents[:number])
        queries += each.num_sentences + (each.title is not None)
        size += each.size
    return list(documents) if queries >= num_queries and size >= num_passages else None


def _smallest_documents(passages: Artifact, seed: int) -> np.ndarray:
    """Returns the sorted draws of all documents or, of more, of the million that come first."""
    found = np.empty(0, np.uint64)

    def arguments() -> Iterator[tuple[Any, ...]]:
        for group in shard_groups(passages):
            is_full = len(found) == _MAX_DOCUMENTS
            yield group, seed, found[-1] if is_full else np.uint64(2**64 - 1)

    for draws in run_tasks(_documents_below, arguments()):
        found = np.unique(np.concatenate([found, draws]))[:_MAX_DOCUMENTS]
    return found


def _documents_below(group: ShardGroup, seed: int, highest: np.uint64) -> np.ndarray:
    names = {
        document_name(source)
        for table in group.tables(["source"])
        for source in table["source"].to_pylist()
    }
    draws = draw_numbers(_prefix(seed), names)
    return np.unique(draws[draws <= highest])


def _count_documents(passages: Artifact, seed: int, wanted: np.ndarray) -> list[_Counted]:
    """Returns what the documents with these draws have, in the order of the draws."""
    if not len(wanted):
        return []
    reads = ((group, seed, wanted) for group in shard_groups(passages))
    documents: dict[str, _Counted] = {}
    for _, parts in sorted(run_tasks(_count_parts, reads), key=itemgetter(0)):
        for part in parts:
            known = documents.setdefault(part.name, part)
            if known is not part:  # it goes on in another group of shards
                known.size += part.size
                known.num_sentences += part.num_sentences
    titles = frozenset(each.title for each in documents.values() if each.title is not None)
    holders: dict[str, set[str]] = defaultdict(set)
    reads_titles = ((group, titles) for group in shard_groups(passages))
    for found in run_tasks(_title_holders, reads_titles):
        for title, names in found.items():
            holders[title] |= names
    for each in documents.values():
        if each.title is not None and len(holders[each.title]) > 1:
            each.title = None
    names = list(documents)
    return [documents[names[place]] for place in np.argsort(draw_numbers(_prefix(seed), names))]


def _count_parts(group: ShardGroup, seed: int, wanted: np.ndarray) -> tuple[int, list[_Counted]]:
    """Counts what the documents with the wanted draws have in a group; returns its number too."""
    parts: dict[str, list[Passage]] = defaultdict(list)
    for shard, table in zip(group.shards, group.tables(["source"]), strict=True):
        names = list(map(document_name, table["source"].to_pylist()))
        theirs = np.isin(draw_numbers(_prefix(seed), names), wanted)
        if theirs.any():
            for row in group.artifact.shard(shard).filter(pa.array(theirs)).to_pylist():
                parts[document_name(row["source"])].append(Passage.of_row(row))
    counted = []
    for name, document in parts.items():
        kinds = Counter(own.kind for own in own_queries(document, frozenset()))
        counted.append(
            _Counted(
                name=name,
                title=document[0].title.casefold() if kinds["title"] else None,
                size=len(document),
                num_sentences=kinds["first sentence"],
            )
        )
    return group.number, counted


def _title_holders(group: ShardGroup, titles: frozenset[str]) -> dict[str, set[str]]:
    """Returns the documents that have each of the titles; two at most, which are enough to tell."""
    holders: dict[str, set[str]] = defaultdict(set)
    for table in group.tables(["title", "source"]):
        for title, source in zip(*(column.to_pylist() for column in table.columns), strict=True):
            title = title.casefold()
            if title in titles and len(holders[title]) < 2:
                holders[title].add(document_name(source))
    return holders


def _prefix(seed: int) -> str:
    return f"{seed} held out"


def _is_fit(own: OwnQuery) -> bool:
    passage = own.passage
    return (
        reads_as_query(own.query, MIN_QUERY_WORDS, MAX_QUERY_WORDS)
        and num_words(passage.text) >= MIN_WORDS
        and _in_order(own.query) not in _in_order(f"{passage.title} {passage.text}")
    )


def _in_order(text: str) -> str:
    return f" {' '.join(compared_words(text))} "
