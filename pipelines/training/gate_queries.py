"""The queries that the step `gate` judges a student by, and how high each finds its passage."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from actors.text_encoder import CHUNK_TEXTS
from cluster.artifacts import Artifact
from pipelines.corpus.cutting import Passage
from pipelines.corpus.held_out import (
    HELD_OUT,
    OwnQuery,
    draw,
    held_out_documents,
    own_queries,
    read_passages,
    repeated_titles,
)
from pipelines.ids import document_name

if TYPE_CHECKING:
    from actors.encoder import Encoder

WRITTEN = "written by the LLM"
OWN_TASK = "search result"  # as of labelled sets made of titles
_CUT = 10  # of nDCG@10
_QUERIES_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class HeldOutQuery:
    """A query of a held-out document.

    Attributes:
        kind: `WRITTEN`, ``title`` or ``first sentence``.
        query: Its text.
        task: For the query template.
        passage: What it has to find, without the query where it was a part of it.
    """

    kind: str
    query: str
    task: str
    passage: Passage

    @property
    def document(self) -> str:
        """The name of its document."""
        return document_name(self.passage.source)


@dataclass(frozen=True, kw_only=True)
class KnownItems:
    """Queries, each with the one passage that it has to find among those of a pool.

    Attributes:
        queries: Any number; those that the LLM wrote, then titles and first sentences.
        num_deciding: So many of them, the first, decide.
        pool: The passages that are searched; the queries' own are among them.
    """

    queries: Sequence[HeldOutQuery]
    num_deciding: int
    pool: Sequence[Passage]

    @property
    def num_texts(self) -> int:
        """Texts that a model has to encode."""
        num_cut = sum(each.kind != WRITTEN for each in self.queries)
        return len(self.queries) + num_cut + len(self.pool)


def read_known_items(
    passages: Artifact, seeds: Artifact, queries: Artifact, *, num_queries: int, max_passages: int
) -> KnownItems:
    """Reads the held-out queries of a run, and draws the pool that they search.

    The pool is the same for the same corpus: passages are drawn by their ids, which are hashes.
    """
    names = held_out_documents(seeds)
    documents: dict[str, list[Passage]] = defaultdict(list)
    for passage in read_passages(passages):
        if (name := document_name(passage.source)) in names:
            documents[name].append(passage)
    by_id = {passage.id: passage for document in documents.values() for passage in document}
    written = [
        HeldOutQuery(
            kind=WRITTEN, query=row["query"], task=row["task"], passage=by_id[row["seed_id"]]
        )
        for table in queries.tables(["seed_id", "task", "query", "dropped_by"])
        for row in table.filter(pc.equal(table["dropped_by"], HELD_OUT)).to_pylist()
    ]
    titles = {passage.title.casefold() for passage in by_id.values()}
    same_titles: list[Passage] = []

    def corpus() -> Iterator[Passage]:
        for passage in read_passages(passages):
            if passage.title.casefold() in titles:
                same_titles.append(passage)
            yield passage

    drawn = heapq.nsmallest(max_passages, corpus(), key=lambda passage: draw(passage.id))
    repeated = repeated_titles(same_titles)
    own = [own_queries(document, repeated) for document in documents.values()]
    chosen = held_out_queries(written, own, num_queries)
    targets = {query.passage.id: by_id[query.passage.id] for query in chosen}
    others = [passage for passage in drawn if passage.id not in targets]
    pool = [*targets.values(), *others[: max(0, max_passages - len(targets))]]
    num_written = sum(each.kind == WRITTEN for each in chosen)
    num_deciding = min(len(chosen), max(num_written, num_queries))
    return KnownItems(queries=chosen, num_deciding=num_deciding, pool=pool)


def held_out_queries(
    written: Sequence[HeldOutQuery], own: Sequence[Sequence[OwnQuery]], num_queries: int
) -> list[HeldOutQuery]:
    """Chooses the queries of a gate: all that the LLM wrote, then titles and first sentences.

    Each document gives one of its own before any gives a second, so that no long document has a
    say for many. A query that is there twice, without case, names no passage, and is left out.

    Args:
        written: What the LLM wrote.
        own: For each document, the queries that it brings with it.
        num_queries: As many of the documents' own, if there are as many.
    """
    drawn = [sorted(each, key=lambda one: draw(f"{one.kind} {one.passage.id}")) for each in own]
    rounds = chain.from_iterable(zip_longest(*drawn))
    brought = [
        HeldOutQuery(kind=one.kind, query=one.query, task=OWN_TASK, passage=one.passage)
        for one in rounds
        if one is not None
    ]
    counts: dict[str, int] = defaultdict(int)
    for query in (*written, *brought):
        counts[query.query.casefold()] += 1
    written, brought = (
        [each for each in queries if counts[each.query.casefold()] == 1]
        for queries in (written, brought)
    )
    return [*written, *brought[:num_queries]]


def known_item_ndcg(
    encoder: Encoder, items: KnownItems, on_progress: Callable[[int], None] = lambda _: None
) -> np.ndarray:
    """Returns each query's nDCG@10, where its own passage alone is relevant.

    That is ``1 / log2(1 + rank)`` down to rank 10, and 0 below. A passage that is as similar as the
    own one is ranked above it. A title is searched for among the passages of other documents: those
    of its own carry it too.

    Args:
        encoder: The model.
        items: Queries and passages.
        on_progress: Called with the number of texts just encoded.

    Returns:
        float64 ``[queries]``.
    """

    def encode(texts: list[str]) -> np.ndarray:
        parts = [np.zeros((0, encoder.dimensions), np.float32)]
        for start in range(0, len(texts), CHUNK_TEXTS):
            parts.append(encoder.encode(texts[start : start + CHUNK_TEXTS]))
            on_progress(len(parts[-1]))
        return np.concatenate(parts)

    def passages(rows: Sequence[Passage]) -> np.ndarray:
        texts, titles = [row.text for row in rows], [row.title for row in rows]
        return encode(encoder.format_passages(texts, titles))

    ask = encoder.templates.format_query
    queries = encode([ask(each.query, task=each.task) for each in items.queries])
    pool = passages(items.pool)
    places: dict[str, int] = {}
    of_document: dict[str, list[int]] = defaultdict(list)
    for place, passage in enumerate(items.pool):
        places[passage.id] = place
        of_document[document_name(passage.source)].append(place)
    own = np.zeros_like(queries)
    cut = [row for row, each in enumerate(items.queries) if each.kind != WRITTEN]
    own[cut] = passages([items.queries[row].passage for row in cut])
    whole = [row for row, each in enumerate(items.queries) if each.kind == WRITTEN]
    own[whole] = pool[[places[items.queries[row].passage.id] for row in whole]]
    scores = np.zeros(len(queries))
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        part = slice(start, start + _QUERIES_AT_ONCE)
        similarities = queries[part] @ pool.T
        for row, each in enumerate(items.queries[part]):
            same = of_document[each.document] if each.kind == "title" else places[each.passage.id]
            similarities[row, same] = -np.inf
        own_similarity = (queries[part] * own[part]).sum(axis=1, keepdims=True)
        ranks = 1 + (similarities >= own_similarity).sum(axis=1)
        scores[part] = np.where(ranks <= _CUT, 1 / np.log2(1 + ranks), 0)
    return scores
