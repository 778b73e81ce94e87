"""The order of training: batches of one set each, drawn by weight, known before a text is read."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# A row that repeats its batch waits for the next one; so many batches' rows are looked at.
_LOOK_AHEAD = 4
_NUMBERS_AT_ONCE = 1 << 16  # a number is 8 bytes in an array, and 40 in a list


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What sampling needs to know of a set.

    Attributes:
        name: Seeds the order of the set's rows.
        weight: Share of batches, against the other sets.
        keys: Integers ``[rows, keys of a row]``; rows of a batch share none where avoidable.
        groups: Integers ``[rows]``: all groups are drawn equally often; None: rows are.
    """

    name: str
    weight: float
    keys: np.ndarray
    groups: np.ndarray | None = None


def draw_batches(
    sets: list[Rows], batch_size: int, num_batches: int, seed: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each batch as the place of its set and its rows' places in it.

    Sets are drawn by weight; a set's rows (of each group) come all once before any comes again,
    but for those that wait for a batch that does not repeat them.
    """
    draw = np.random.default_rng(seed)
    weights = np.array([rows.weight for rows in sets])
    chosen = draw.choice(len(sets), size=num_batches, p=weights / weights.sum())
    streams = [_batches_of(rows, min(batch_size, len(rows.keys)), seed) for rows in sets]
    for place in chosen.tolist():
        yield place, next(streams[place])


def _batches_of(rows: Rows, size: int, seed: int) -> Iterator[np.ndarray]:
    stream = _stream(rows, seed)
    waiting: deque[int] = deque()
    while True:
        batch: list[int] = []
        repeated: deque[int] = deque()
        seen: set[int] = set()
        while len(batch) < size and len(repeated) < _LOOK_AHEAD * size:
            row = waiting.popleft() if waiting else next(stream)
            keys = rows.keys[row].tolist()
            if seen.isdisjoint(keys):
                batch.append(row)
                seen.update(keys)
            else:
                repeated.append(row)
        while len(batch) < size:
            batch.append(repeated.popleft())
        waiting = repeated + waiting
        yield np.array(batch)


def _stream(rows: Rows, seed: int) -> Iterator[int]:
    draw = np.random.default_rng([seed, *rows.name.encode()])
    if rows.groups is None:
        yield from _passes(np.arange(len(rows.keys)), draw)
    else:
        members = [np.flatnonzero(rows.groups == group) for group in np.unique(rows.groups)]
        streams = [_passes(places, draw) for places in members]
        while True:
            yield next(streams[draw.integers(len(streams))])


def _passes(places: np.ndarray, draw: np.random.Generator) -> Iterator[int]:
    while True:
        order = draw.permutation(places)
        for start in range(0, len(order), _NUMBERS_AT_ONCE):
            yield from order[start : start + _NUMBERS_AT_ONCE].tolist()
