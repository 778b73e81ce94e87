"""The data sets of a mixture, as tables: which of their rows are drawn, and which held out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.mixture.config import SetsConfig
from pipelines.mixture.sampling import Rows

EXAMPLES_PER_SHARD = 8192
VALIDATION = "validation/shards"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set of the mixture.

    Attributes:
        name: Its name.
        weight: Share of batches, against the other sets.
        texts: What its rows are drawn by: the columns task, query_id and positive_id, and others.
        symmetric: Whether targets are formatted like queries.
        uniform_tasks: Whether all tasks are drawn equally often.
    """

    name: str
    weight: float
    texts: pa.Table
    symmetric: bool = False
    uniform_tasks: bool = False

    def rows(self) -> Rows:
        """Returns what sampling needs to know."""
        groups = _codes(self.texts["task"]) if self.uniform_tasks else None
        return Rows(name=self.name, weight=self.weight, keys=self.keys(), groups=groups)

    def keys(self) -> np.ndarray:
        """Returns a number for the query and one for the positive of each row: ``[rows, 2]``."""
        ids = [self.texts["query_id"], self.texts["positive_id"]]
        if self.symmetric:  # one example's query may be another's positive
            both = _codes(pa.chunked_array([chunk for column in ids for chunk in column.chunks]))
            return both.reshape(2, -1).T
        queries, positives = map(_codes, ids)
        return np.stack([queries, len(queries) + positives], axis=1)


def set_weight(weight: float | None, texts: pa.Table, config: SetsConfig) -> float:
    """Returns the set's own weight, or rows^(1/temperature)."""
    return float(texts.num_rows ** (1 / config.temperature)) if weight is None else weight


def draw_rows(texts: pa.Table, max_rows: int | None, name: str, seed: int) -> pa.Table:
    """Returns the rows, in their order; a draw of them where there are more than `max_rows`."""
    if max_rows is None or texts.num_rows <= max_rows:
        return texts
    draw = np.random.default_rng([seed, *f"rows of {name}".encode()])
    return texts.take(pa.array(np.sort(draw.permutation(texts.num_rows)[:max_rows])))


def hold_out(sources: list[Source], config: SetsConfig) -> list[Source]:
    """Draws the rows for validation, of each set by its weight and at most a fifth of it."""
    total = sum(source.weight for source in sources)
    held_out = []
    for source in sources:
        share = round(config.validation_examples * source.weight / total)
        size = min(share, source.texts.num_rows // 5)
        texts = draw_rows(source.texts, size, f"held out {source.name}", config.seed)
        held_out.append(replace(source, texts=texts))
    return held_out


def without(source: Source, held_out: Source) -> Source:
    """Returns a set without the rows that share a query with those held out."""
    if not held_out.texts.num_rows:
        return source
    shared = pc.is_in(source.texts["query_id"], held_out.texts["query_id"].combine_chunks())
    return replace(source, texts=source.texts.filter(pc.invert(shared)).combine_chunks())


def batches_in_order(sources: list[Source], batch_size: int) -> list[tuple[int, np.ndarray]]:
    """Returns batches of all rows, each as the place of its source and its rows' places in it."""
    return [
        (place, np.arange(start, min(start + batch_size, source.texts.num_rows)))
        for place, source in enumerate(sources)
        for start in range(0, source.texts.num_rows, batch_size)
    ]


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """Returns equal numbers for equal values."""
    codes: np.ndarray = column.combine_chunks().dictionary_encode().indices.to_numpy()
    return codes.astype(np.int64)
