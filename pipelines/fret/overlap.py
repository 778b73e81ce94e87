"""Decontamination: no training query may repeat a query that the run is judged by."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np

from pipelines.words import compared_words


def words(text: str) -> frozenset[str]:
    """Returns the text's words without case."""
    return frozenset(compared_words(text))


def runs(text: str, length: int) -> Iterator[str]:
    """Yields every run of `length` words of the text."""
    found = compared_words(text)
    for start in range(len(found) - length + 1):
        yield " ".join(found[start : start + length])


class OverlapIndex:
    """Finds the most similar of a set of texts by Jaccard overlap of words, and shared runs."""

    def __init__(self, texts: Iterable[str], run_length: int) -> None:
        """Indexes the texts by word, and by runs of so many words."""
        self._texts = list(texts)
        self._run_length = run_length
        self._runs = {run: text for text in self._texts for run in runs(text, run_length)}
        holders: dict[str, list[int]] = defaultdict(list)
        for number, text in enumerate(self._texts):
            for word in words(text):
                holders[word].append(number)
        self._holders = {word: np.array(numbers) for word, numbers in holders.items()}
        self._num_words = np.array([len(words(text)) for text in self._texts])

    def __len__(self) -> int:
        return len(self._texts)

    def highest(self, text: str) -> tuple[float, str]:
        """Returns the highest |words in both| / |words in either|, in 0..1, and with what.

        Of equally similar texts it is the last in alphabetical order.
        """
        given = words(text)
        held = [self._holders[word] for word in given if word in self._holders]
        if not held:
            return 0.0, ""
        num_both = np.bincount(np.concatenate(held), minlength=len(self._texts))
        overlaps = num_both / (len(given) + self._num_words - num_both)
        best = overlaps.max()
        return float(best), max(self._texts[n] for n in np.flatnonzero(overlaps == best))

    def shared_run(self, text: str) -> str | None:
        """Returns an indexed text that has a run of words in common with this one, or None."""
        found = (self._runs.get(run) for run in runs(text, self._run_length))
        return next((text for text in found if text is not None), None)
