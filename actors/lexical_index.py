"""BM25 over the words of all passages: what a query and a passage share by the letter.

An encoder may miss a name, a number or a rare word that stands in both; BM25 sees nothing else.
So the two err differently, and their scores together order passages better than either.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from actors.words import compared_words
from cluster.actor_health import actor_begins
from cluster.storage import Storage

# Those of Snowball's, by PyStemmer's names for them, that cut off a language's endings.
StemmedLanguage = Literal[
    "arabic",
    "armenian",
    "basque",
    "catalan",
    "czech",
    "danish",
    "dutch",
    "english",
    "esperanto",
    "estonian",
    "finnish",
    "french",
    "german",
    "greek",
    "hindi",
    "hungarian",
    "indonesian",
    "irish",
    "italian",
    "lithuanian",
    "nepali",
    "norwegian",
    "persian",
    "polish",
    "portuguese",
    "romanian",
    "russian",
    "serbian",
    "sesotho",
    "spanish",
    "swedish",
    "tamil",
    "turkish",
    "yiddish",
]


@dataclass(frozen=True, kw_only=True)
class LexicalHits:
    """What BM25 says of some queries.

    Attributes:
        rows: Numbers of texts, int64 ``[queries, n + k]``; -1: none, since only so many have a word
            of the query.
        scores: Theirs, float32 ``[queries, n + k]``; 0 of none.
        mean: Of the scores of all texts, those without a hit among them, float64 ``[queries]``.
        std: Their population standard deviation, float64 ``[queries]``.
    """

    rows: np.ndarray
    scores: np.ndarray
    mean: np.ndarray
    std: np.ndarray


class LexicalIndex:
    """Texts in the order they were given, scored by BM25 as Lucene has it.

    A text d with f occurrences of w, among N texts of which n have w, scores for a query q

        sum over w in q of  ln(1 + (N - n + 0.5) / (n + 0.5)) * f / (f + k1 (1 - b + b |d| / avg))

    where \\|d\\| is its length in words and avg the mean length ("Lucene (accurate)" in Kamphuis et
    al., "Which BM25 Do You Mean?", ECIR 2020). A word that a query repeats counts each time. Words
    are `actors.words.compared_words`: Unicode's, without case and punctuation.

    It holds 8 bytes for each different word of each text, some 0.7 kB for a passage of 160 words,
    and takes six times that while it is built. N, n and avg are of the whole corpus, and so one
    index holds all of it; to cut it into parts, these would have to be counted over all first.
    """

    def __init__(
        self,
        texts: Iterable[str],
        *,
        k1: float = 0.9,
        b: float = 0.4,
        stemmer: StemmedLanguage | None = None,
    ) -> None:
        """Reads and indexes the texts.

        Args:
            texts: At least one.
            k1: How slowly further occurrences of a word add to the score.
            b: How much a long text's score is lowered, from 0 to 1.
            stemmer: Language whose endings are cut off; None: words stay as they are.
        """
        import bm25s
        import Stemmer

        self._stemmer = Stemmer.Stemmer(stemmer) if stemmer else None
        self._numbers: dict[str, int] = {}  # of the words, in the order they came
        rows = [
            array("i", [self._numbers.setdefault(w, len(self._numbers)) for w in self._words(text)])
            for text in texts
        ]
        self._num_texts = len(rows)
        self._index = bm25s.BM25(k1=k1, b=b, method="lucene")
        if self._numbers:
            index = (rows, self._numbers)
            self._index.index(index, create_empty_token=False, show_progress=False)

    def scores(self, query: str) -> np.ndarray:
        """Returns the scores of all texts, float32 ``[texts]``; 0 without a word of the query."""
        numbers = [self._numbers[w] for w in self._words(query) if w in self._numbers]
        if not numbers:
            return np.zeros(self._num_texts, np.float32)
        scores: np.ndarray = self._index.get_scores_from_ids(numbers)
        return scores

    def search(self, queries: Sequence[str], k: int, beside: np.ndarray) -> LexicalHits:
        """Finds each query's k best texts, and scores them and some others.

        Args:
            queries: Without task or template.
            k: How many to find; equal scores come in the order of rows.
            beside: Rows of the others, int64 ``[queries, n]``; -1: none.

        Returns:
            Hits of `beside` and then of the k best texts, best first.
        """
        rows = np.hstack([beside, np.full((len(queries), k), -1)])
        scores = np.zeros(rows.shape, np.float32)
        mean, std = np.zeros((2, len(queries)))
        for number, query in enumerate(queries):
            of_all = self.scores(query)
            best = _best(of_all, k)
            rows[number, beside.shape[1] :][: len(best)] = best
            scores[number] = np.where(rows[number] < 0, 0, of_all[rows[number]])
            mean[number], std[number] = of_all.mean(dtype=float), of_all.std(dtype=float)
        return LexicalHits(rows=rows, scores=scores, mean=mean, std=std)

    def _words(self, text: str) -> list[str]:
        words: list[str] = compared_words(text)
        return self._stemmer.stemWords(words) if self._stemmer else words


class IndexedTexts(Protocol):
    """Texts and their ids, read one part at a time; picklable."""

    def parts(self) -> Iterator[tuple[np.ndarray, list[str]]]:
        """Reads the ids of a part, as bytes, and its texts."""


class LexicalIndexActor:
    """A `LexicalIndex` over all the run's passages, which it knows by their ids; a Ray actor."""

    def __init__(
        self,
        texts: IndexedTexts,
        kind: str,
        notes: Storage | None,
        *,
        k1: float,
        b: float,
        stemmer: StemmedLanguage | None,
    ) -> None:
        """Reads and indexes the texts.

        Args:
            texts: The texts and their ids.
            kind: As which it notes in the step's folder that it has begun.
            notes: The step's folder; None outside of Ray.
            k1: Of `LexicalIndex`.
            b: Of `LexicalIndex`.
            stemmer: Of `LexicalIndex`.
        """
        if notes is not None:
            actor_begins(notes, kind)
        ids: list[np.ndarray] = []

        def read() -> Iterator[str]:
            for part, its_texts in texts.parts():
                ids.append(part)
                yield from its_texts

        self._index = LexicalIndex(read(), k1=k1, b=b, stemmer=stemmer)
        self._ids = np.concatenate(ids)
        self._by_id = np.argsort(self._ids)

    def search(
        self, queries: Sequence[str], k: int, beside: np.ndarray
    ) -> tuple[np.ndarray, LexicalHits]:
        """Finds each query's k best passages, and scores them and some others.

        Args:
            queries: Without task or template.
            k: How many to find.
            beside: Ids of the others, which are all known, as bytes ``[queries, n]``; empty: none.

        Returns:
            Ids of `beside` and then of the k best, best first, bytes ``[queries, n + k]``, and what
            BM25 says of them.
        """
        places = np.searchsorted(self._ids, beside, sorter=self._by_id)
        rows = np.where(beside == b"", -1, self._by_id[places % len(self._ids)])
        hits = self._index.search(queries, k, rows)
        return np.where(hits.rows < 0, b"", self._ids[hits.rows]), hits


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """Returns the rows of the k highest scores above 0, of equal ones the first."""
    hits = np.flatnonzero(scores)
    if len(hits) > k:
        hits = hits[scores[hits] >= np.partition(scores[hits], -k)[-k]]
    order = np.argsort(-scores[hits], kind="stable")[:k]
    best: np.ndarray = hits[order]
    return best
