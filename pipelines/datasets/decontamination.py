"""Decontamination: no training text may repeat a query that the run is judged by.

A benchmark's texts may be millions. Beside the texts themselves, an index of them holds numbers
alone, in arrays: 8 bytes for each different word of a text, and 12 for each run of words (32 while
they are sorted).
"""

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from pydantic import Field

from actors.words import compared_words
from cluster.artifacts import Json, fingerprint
from cluster.config import Config
from pipelines.fingerprints import fingerprinted

REPEATS = "repeats an evaluation query"
NEARLY_REPEATS = "nearly repeats an evaluation query"
SHARES_WORDS = "shares words with an evaluation query"
REASONS = (REPEATS, NEARLY_REPEATS, SHARES_WORDS)
_UNKNOWN = -1  # a word that no query has
_MAX_REMEMBERED = 1 << 16  # texts, for rows that repeat one another's


class DecontaminationConfig(Config):
    """What counts as repeating an evaluation query: for generated queries and labelled sets."""

    max_overlap: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="drop texts whose words overlap more (Jaccard) with an evaluation query",
    )
    max_shared_words: int = Field(
        default=8,
        ge=3,
        description="drop texts that share a run of so many words with an evaluation query",
    )


class Decontamination:
    """Finds texts that repeat an evaluation query."""

    def __init__(
        self, evaluation_queries: Sequence[str], config: DecontaminationConfig | None = None
    ) -> None:
        """Indexes the queries by word, and by runs of words."""
        self._config = config or DecontaminationConfig()
        self._queries = list(evaluation_queries)
        self._ids: dict[str, int] = {}  # of every word of the queries
        held, num_held, runs, num_runs = array("I"), array("I"), array("q"), array("I")
        for query in self._queries:
            in_order = [
                self._ids.setdefault(word, len(self._ids)) for word in compared_words(query)
            ]
            distinct, hashes = set(in_order), [hash(run) for run in self._runs_of(in_order)]
            held.extend(distinct)
            num_held.append(len(distinct))
            runs.extend(hashes)
            num_runs.append(len(hashes))
        self._words, self._num_words = np.asarray(held), np.asarray(num_held)
        self._words_end = np.cumsum(self._num_words, dtype=np.int64)
        by_word, self._holders = _sorted_with_owner(self._words, self._num_words)
        ids = np.arange(len(self._ids) + 1, dtype=np.uint32)
        self._holders_start = np.searchsorted(by_word, ids)
        self._runs, self._run_owners = _sorted_with_owner(np.asarray(runs), np.asarray(num_runs))
        self._judged: dict[str, tuple[str, str] | None] = {}

    def __len__(self) -> int:
        return len(self._queries)

    def fingerprint(self) -> dict[str, Json]:
        """Returns what decides on a text: the rules, and a hash of the queries."""
        return {**fingerprinted(self._config), "judged_by": fingerprint(self._queries)}

    def repeated(self, text: str) -> tuple[str, str] | None:
        """Returns which of `REASONS` forbids training on a text, and the query, or None."""
        if text not in self._judged:
            if len(self._judged) == _MAX_REMEMBERED:
                self._judged.clear()
            self._judged[text] = self._judge(text)
        return self._judged[text]

    def highest_overlap(self, texts: Iterable[str]) -> float:
        """Returns the highest overlap of any of the texts with an evaluation query, in 0..1."""
        highest = 0.0
        for text in texts:
            highest = max(highest, self.most_similar(text, highest)[0])
        return highest

    def most_similar(self, text: str, above: float = 0.0) -> tuple[float, str]:
        """Returns the highest |words in both| / |words in either|, and with which query.

        Of equally similar queries it is the last in alphabetical order. Whoever shares so many of
        the given words shares one of the rarest few, and few queries hold those (prefix filtering:
        Bayardo et al., "Scaling up all pairs similarity search", 2007). Where no query has a share
        higher than `above`, returns 0 and no query.
        """
        given = words(text)
        least = max(1, math.ceil(above * len(given) - 1e-9))  # words that both must hold
        most = len(given) / above if above else math.inf  # words that the query may have
        ids = {word: self._ids[word] for word in given if word in self._ids}
        holders = {
            word: self._holders[self._holders_start[id_] : self._holders_start[id_ + 1]]
            for word, id_ in ids.items()
        }
        rarest = sorted(given, key=lambda word: (len(holders.get(word, ())), word))
        numbers = [holders[word] for word in rarest[: len(given) - least + 1] if word in holders]
        if not numbers:
            return 0.0, ""
        candidates = np.unique(np.concatenate(numbers))
        sizes = self._num_words[candidates]
        candidates = candidates[(sizes >= least) & (sizes <= most)]
        known, num_given = frozenset(ids.values()), len(given)
        overlaps = ((self._overlap(known, num_given, n), self._queries[n]) for n in candidates)
        return max((each for each in overlaps if each[0] > above), default=(0.0, ""))

    def shared_run(self, text: str) -> str | None:
        """Returns a query that has a run of words in common with the text, or None."""
        runs = [run for run in self._runs_of(self._in_order(text)) if _UNKNOWN not in run]
        hashes = np.array([hash(run) for run in runs], np.int64)
        starts = np.searchsorted(self._runs, hashes)
        ends = np.searchsorted(self._runs, hashes, side="right")
        for place in np.flatnonzero(starts < ends):
            for number in np.unique(self._run_owners[starts[place] : ends[place]])[::-1]:
                query: str = self._queries[number]
                if runs[place] in self._runs_of(self._in_order(query)):  # hashes may be equal
                    return query
        return None

    def _judge(self, text: str) -> tuple[str, str] | None:
        # Equal words are refused at any threshold, also at 1.
        overlap, query = self.most_similar(text, min(self._config.max_overlap, 1 - 1e-9))
        if overlap:
            return REPEATS if overlap == 1 else NEARLY_REPEATS, query
        shared = self.shared_run(text)
        return None if shared is None else (SHARES_WORDS, shared)

    def _overlap(self, known: frozenset[int], num_given: int, number: int) -> float:
        end, size = int(self._words_end[number]), int(self._num_words[number])
        num_both = sum(id_ in known for id_ in self._words[end - size : end].tolist())
        return num_both / (num_given + size - num_both)

    def _in_order(self, text: str) -> list[int]:
        return [self._ids.get(word, _UNKNOWN) for word in compared_words(text)]

    def _runs_of(self, in_order: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Yields every run of `max_shared_words` words."""
        length = self._config.max_shared_words
        for start in range(len(in_order) - length + 1):
            yield tuple(in_order[start : start + length])


def _sorted_with_owner(values: np.ndarray, num_values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts values of which each query has some, the next query's next; returns whose each is."""
    order = np.argsort(values, kind="stable")
    owners = np.repeat(np.arange(len(num_values), dtype=np.uint32), num_values)
    return values[order], owners[order]


def words(text: str) -> frozenset[str]:
    """Returns the text's words without case."""
    return frozenset(compared_words(text))
