"""The data sets of a mixture, as numbers: which of their rows are drawn, and which held out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.lib.recfunctions import structured_to_unstructured

from pipelines.mixture.config import SetsConfig
from pipelines.mixture.sampling import Rows

EXAMPLES_PER_SHARD = 8192

# What a row is drawn by, 32 bytes: its number among all that are stored, and numbers that are
# equal for equal tasks, queries and positives.
KEYS = np.dtype(
    [("row", np.int64), ("task", np.uint64), ("query", np.uint64), ("positive", np.uint64)]
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set of the mixture.

    Attributes:
        name: Its name.
        weight: Share of batches, against the other sets.
        keys: Of `KEYS`, what its rows are drawn by.
        uniform_tasks: Whether all tasks are drawn equally often.
    """

    name: str
    weight: float
    keys: np.ndarray
    uniform_tasks: bool = False

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self) -> Rows:
        """Returns what sampling needs to know."""
        keys = structured_to_unstructured(self.keys[["query", "positive"]])
        groups = _by_first(self.keys["task"]) if self.uniform_tasks else None
        return Rows(name=self.name, weight=self.weight, keys=keys, groups=groups)


def set_weight(weight: float | None, num_rows: int, config: SetsConfig) -> float:
    """Returns the set's own weight, or rows^(1/temperature)."""
    return float(num_rows ** (1 / config.temperature)) if weight is None else weight


def draw_rows(keys: np.ndarray, max_rows: int | None, name: str, seed: int) -> np.ndarray:
    """Returns the rows, in their order; a draw of them where there are more than `max_rows`."""
    if max_rows is None or len(keys) <= max_rows:
        return keys
    draw = np.random.default_rng([seed, *f"rows of {name}".encode()])
    return keys[np.sort(draw.permutation(len(keys))[:max_rows])]


def hold_out(sources: list[Source], config: SetsConfig) -> list[Source]:
    """Draws the rows for validation, of each set by its weight and at most a fifth of it."""
    total = sum(source.weight for source in sources)
    held_out = []
    for source in sources:
        share = round(config.validation_examples * source.weight / total)
        size = min(share, len(source) // 5)
        keys = draw_rows(source.keys, size, f"held out {source.name}", config.seed)
        held_out.append(replace(source, keys=keys))
    return held_out


def without(source: Source, held_out: Source) -> Source:
    """Returns a set without the rows that share a query with those held out."""
    if not len(held_out):
        return source
    shared = np.isin(source.keys["query"], held_out.keys["query"])
    return replace(source, keys=source.keys[~shared])


def batches_in_order(sizes: list[int], batch_size: int) -> list[tuple[int, np.ndarray]]:
    """Returns batches of all rows of sets of these sizes.

    Each is the place of its set and its rows' places in it.
    """
    return [
        (place, np.arange(start, min(start + batch_size, size)))
        for place, size in enumerate(sizes)
        for start in range(0, size, batch_size)
    ]


def _by_first(values: np.ndarray) -> np.ndarray:
    """Returns equal numbers for equal values, from 0 on in the order in which they first come."""
    _, first, codes = np.unique(values, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[codes]
