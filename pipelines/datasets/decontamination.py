"""Decontamination: no training text may repeat a query that the run is judged by."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from pydantic import Field

from actors.words import compared_words
from cluster.artifacts import Json, fingerprint
from cluster.config import Config
from pipelines.fingerprints import fingerprinted

REPEATS = "repeats an evaluation query"
NEARLY_REPEATS = "nearly repeats an evaluation query"
SHARES_WORDS = "shares words with an evaluation query"
REASONS = (REPEATS, NEARLY_REPEATS, SHARES_WORDS)


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
        self._words = [words(query) for query in self._queries]
        self._holders: dict[str, list[int]] = defaultdict(list)
        for number, query_words in enumerate(self._words):
            for word in query_words:
                self._holders[word].append(number)
        self._runs = {run: query for query in self._queries for run in self._runs_of(query)}
        self._judged: dict[str, tuple[str, str] | None] = {}

    def __len__(self) -> int:
        return len(self._queries)

    def fingerprint(self) -> dict[str, Json]:
        """Returns what decides on a text: the rules, and a hash of the queries."""
        return {**fingerprinted(self._config), "judged_by": fingerprint(self._queries)}

    def repeated(self, text: str) -> tuple[str, str] | None:
        """Returns which of `REASONS` forbids training on a text, and the query, or None."""
        if text not in self._judged:
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
        rarest = sorted(given, key=lambda word: (len(self._holders.get(word, ())), word))
        candidates = {
            number
            for word in rarest[: len(given) - least + 1]
            for number in self._holders.get(word, ())
            if least <= len(self._words[number]) <= most
        }
        overlaps = ((self._overlap(given, n), self._queries[n]) for n in candidates)
        return max((each for each in overlaps if each[0] > above), default=(0.0, ""))

    def shared_run(self, text: str) -> str | None:
        """Returns a query that has a run of words in common with the text, or None."""
        return next((self._runs[run] for run in self._runs_of(text) if run in self._runs), None)

    def _judge(self, text: str) -> tuple[str, str] | None:
        # Equal words are refused at any threshold, also at 1.
        overlap, query = self.most_similar(text, min(self._config.max_overlap, 1 - 1e-9))
        if overlap:
            return REPEATS if overlap == 1 else NEARLY_REPEATS, query
        shared = self.shared_run(text)
        return None if shared is None else (SHARES_WORDS, shared)

    def _overlap(self, given: frozenset[str], number: int) -> float:
        num_both = len(given & self._words[number])
        return num_both / (len(given) + len(self._words[number]) - num_both)

    def _runs_of(self, text: str) -> Iterator[str]:
        """Yields every run of `max_shared_words` words of the text."""
        in_order, length = compared_words(text), self._config.max_shared_words
        for start in range(len(in_order) - length + 1):
            yield " ".join(in_order[start : start + length])


def words(text: str) -> frozenset[str]:
    """Returns the text's words without case."""
    return frozenset(compared_words(text))
