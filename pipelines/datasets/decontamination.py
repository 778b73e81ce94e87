"""Decontamination of labelled sets: no training text may repeat a query that the run is judged by.

The rules are FRet's: the same words, nearly the same words, or a long run of words in common.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

from pipelines.fret.overlap import OverlapIndex, words


class Decontamination:
    """Finds texts that repeat an evaluation query."""

    def __init__(
        self, evaluation_queries: Sequence[str], *, max_overlap: float, max_shared_words: int
    ) -> None:
        """Indexes the queries; the thresholds are those of `FretConfig`."""
        self._queries = list(evaluation_queries)
        self._max_overlap = max_overlap
        self._runs = OverlapIndex(self._queries, max_shared_words)
        self._words = [words(query) for query in self._queries]
        self._holders: dict[str, list[int]] = defaultdict(list)
        for number, query_words in enumerate(self._words):
            for word in query_words:
                self._holders[word].append(number)
        self._judged: dict[str, tuple[str, str] | None] = {}

    def __len__(self) -> int:
        return len(self._queries)

    def repeated(self, text: str) -> tuple[str, str] | None:
        """Returns why a text may not be trained on and the query that it repeats, or None."""
        if text not in self._judged:
            self._judged[text] = self._judge(text)
        return self._judged[text]

    def _judge(self, text: str) -> tuple[str, str] | None:
        overlap, query = self._most_similar(words(text))
        if overlap == 1:
            return "repeats an evaluation query", query
        if overlap > self._max_overlap:
            return "nearly repeats an evaluation query", query
        shared = self._runs.shared_run(text)
        return None if shared is None else ("shares words with an evaluation query", shared)

    def _most_similar(self, given: frozenset[str]) -> tuple[float, str]:
        """Returns the highest Jaccard overlap of words above the threshold, and with what.

        Who shares so many of the given words shares one of the rarest few, and few queries hold
        those (prefix filtering: Bayardo et al., "Scaling up all pairs similarity search", 2007).
        """
        least = math.ceil(self._max_overlap * len(given) - 1e-9)  # words that both must hold
        most = len(given) / self._max_overlap  # words that the query may have
        rarest = sorted(given, key=lambda word: (len(self._holders.get(word, ())), word))
        found = {
            number
            for word in rarest[: len(given) - least + 1]
            for number in self._holders.get(word, ())
            if least <= len(self._words[number]) <= most
        }
        overlap, number = max(((self._overlap(given, n), n) for n in found), default=(0.0, -1))
        return (overlap, self._queries[number]) if number >= 0 else (0.0, "")

    def _overlap(self, given: frozenset[str], number: int) -> float:
        num_both = len(given & self._words[number])
        return num_both / (len(given) + len(self._words[number]) - num_both)
