"""Decontamination: no training query may repeat a query that the run is judged by."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

_WORD = re.compile(r"\w+")


def words(text: str) -> frozenset[str]:
    """Returns the text's lower-case words."""
    return frozenset(_WORD.findall(text.casefold()))


def runs(text: str, length: int) -> Iterator[str]:
    """Yields every run of `length` words of the text."""
    found = _WORD.findall(text.casefold())
    for start in range(len(found) - length + 1):
        yield " ".join(found[start : start + length])


class OverlapIndex:
    """Finds the most similar of a set of texts by Jaccard overlap of words, and shared runs."""

    def __init__(self, texts: Iterable[str], run_length: int) -> None:
        """Indexes the texts by word, and by runs of so many words."""
        self._texts = list(texts)
        self._sets = [words(text) for text in self._texts]
        self._run_length = run_length
        self._runs = {run: text for text in self._texts for run in runs(text, run_length)}
        self._holders: dict[str, list[int]] = defaultdict(list)
        for number, text_words in enumerate(self._sets):
            for word in text_words:
                self._holders[word].append(number)

    def __len__(self) -> int:
        return len(self._sets)

    def highest(self, text: str) -> tuple[float, str]:
        """Returns the highest |words in both| / |words in either|, in 0..1, and with what."""
        given = words(text)
        shared = Counter(number for word in given for number in self._holders.get(word, ()))
        return max(
            (
                (count / (len(given) + len(self._sets[number]) - count), self._texts[number])
                for number, count in shared.items()
            ),
            default=(0.0, ""),
        )

    def shared_run(self, text: str) -> str | None:
        """Returns an indexed text that has a run of words in common with this one, or None."""
        found = (self._runs.get(run) for run in runs(text, self._run_length))
        return next((text for text in found if text is not None), None)
