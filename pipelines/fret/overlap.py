"""Decontamination: no training query may repeat a query that the run is judged by."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

_WORD = re.compile(r"\w+")


def words(text: str) -> frozenset[str]:
    """Returns the text's lower-case words."""
    return frozenset(_WORD.findall(text.casefold()))


class OverlapIndex:
    """Finds the most similar of a set of texts by Jaccard overlap of words."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Indexes the texts by word."""
        self._sets = [words(text) for text in texts]
        self._holders: dict[str, list[int]] = defaultdict(list)
        for number, text_words in enumerate(self._sets):
            for word in text_words:
                self._holders[word].append(number)

    def __len__(self) -> int:
        return len(self._sets)

    def highest(self, text: str) -> float:
        """Returns the highest overlap in 0..1: |words in both| / |words in either|."""
        given = words(text)
        shared = Counter(number for word in given for number in self._holders.get(word, ()))
        return max(
            (
                count / (len(given) + len(self._sets[number]) - count)
                for number, count in shared.items()
            ),
            default=0.0,
        )
