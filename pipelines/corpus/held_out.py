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
from typing import Literal

import pyarrow as pa

from actors.words import compared_words, letter_share, num_words, sentence_starts
from cluster.artifacts import Artifact
from pipelines.corpus.cutting import Passage
from pipelines.corpus.filters.length import MIN_WORDS
from pipelines.ids import document_name

HELD_OUT = "held out for the gate"  # why training may not use a query
FILE = "held_out.json"  # of the step `seeds`: the documents' names
MAX_HELD_OUT_SHARE = 0.25  # of the documents
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


def hold_out(
    passages: Sequence[Passage], *, num_queries: int, num_passages: int, seed: int
) -> list[str]:
    """Draws documents until theirs are so many own queries and passages.

    They are drawn by a hash of their names, so that more hold the fewer, and are a quarter of all
    documents at most.

    Returns:
        The documents' names, in the order in which they were drawn.
    """
    by_document: dict[str, list[Passage]] = defaultdict(list)
    for passage in passages:
        by_document[document_name(passage.source)].append(passage)
    repeated = repeated_titles(passages)
    order = sorted(by_document, key=lambda name: draw(f"{seed} held out {name}"))
    chosen: list[str] = []
    queries, size = 0, 0
    for name in order[: int(MAX_HELD_OUT_SHARE * len(order))]:
        if queries >= num_queries and size >= num_passages:
            break
        chosen.append(name)
        queries += len(own_queries(by_document[name], repeated))
        size += len(by_document[name])
    return chosen


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


def _is_fit(own: OwnQuery) -> bool:
    passage = own.passage
    return (
        reads_as_query(own.query, MIN_QUERY_WORDS, MAX_QUERY_WORDS)
        and num_words(passage.text) >= MIN_WORDS
        and _in_order(own.query) not in _in_order(f"{passage.title} {passage.text}")
    )


def _in_order(text: str) -> str:
    return f" {' '.join(compared_words(text))} "
