"""Passages that repeat earlier ones, of a corpus of any size: found by exchanges of their places.

A place is a part's number and the row there, so places have the order of the corpus. Of equal ids
the first is kept; near-duplicates are those of the rule in `near_duplicates`. Three exchanges:

1. Ids and the bands of sketches meet, with their places. Of each bucket come pairs: its first row,
   and another one. A bucket of n rows gives n - 1 of them. Equal ids are settled by that.
2. Pairs go where the text of their first row lies, and get the hashes of its trigrams.
3. Those go, once for all rows there, to where the other texts lie, and are compared with them.

So no text travels, and of trigrams those alone that are compared. What is found does not depend on
the number of partitions, nor on the parts: it is a function of the rows and their order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.exchange import PARTITION, Exchange, run_exchange
from cluster.file_list import shard_path
from cluster.parquet import open_parquet
from cluster.steps import StepContext
from cluster.storage import Storage, join, open_storage, read_table
from pipelines.corpus.near_duplicates import (
    band_hashes,
    first_places,
    jaccard,
    num_bands,
    trigram_hashes,
)
from pipelines.corpus.parts import Part

_MAX_KEYS = 4_000_000  # of a partition of the first exchange: 100 MB
_MAX_PAIRS = 100_000  # of a partition of the others: 120 MB, if all have trigrams of their own
_ROW_BITS = 32

_PAIRS = pa.schema(
    [
        ("row", pa.int64()),  # its place
        ("first", pa.int64()),  # that of the row that it may repeat
        ("is_id", pa.bool_()),  # they have one id, and need not be compared
        ("trigrams", pa.list_(pa.uint64())),  # of the first, once for each partition that needs it
    ]
)


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """Where the rows are listed that repeat earlier ones.

    Attributes:
        storage: Holds lists of places, each for a range of parts.
        paths: Of the list for each part; None where it repeats nothing.
        num_duplicates: Rows with the id of an earlier one.
        num_near_duplicates: Others, that nearly repeat one.
    """

    storage: Storage
    paths: Sequence[str | None]
    num_duplicates: int = 0
    num_near_duplicates: int = 0


def find_repeats(
    parts: Sequence[Part],
    num_passages: int,
    storage: Storage,
    threshold: float | None,
    context: StepContext,
) -> Repeats:
    """Finds the rows that repeat earlier ones.

    Args:
        parts: Of the corpus.
        num_passages: In all of them.
        storage: Holds the parts.
        threshold: Of the Jaccard similarity of near-duplicates; None looks for equal ids alone.
        context: The step's; the exchanges work in folders below its `work`.
    """
    bands = num_bands(threshold) if threshold is not None else None
    num_keys = num_passages * (1 + (bands[0] if bands else 0))
    meetings = _Meetings(
        num_partitions=1 + num_keys // _MAX_KEYS,
        order=("high", "low", "is_id", "place"),
        storage=storage,
        bands=bands,
    )
    paths = tuple(part.path for part in parts)
    counts, pairs = _run(meetings, list(enumerate(paths)), "meetings", context)
    if not pairs:
        return Repeats(storage=storage, paths=[None] * len(parts))
    num_partitions = min(len(parts), 1 + counts["num_pairs"] // _MAX_PAIRS)
    compared: list[tuple[Storage, str]] = []
    if threshold is not None:
        firsts = _Firsts(
            num_partitions=num_partitions, order=("first", "row"), storage=storage, paths=paths
        )
        _, compared = _run(firsts, pairs, "firsts", context)
    repeated = _Repeated(
        num_partitions=num_partitions,
        order=("row", "first"),
        storage=storage,
        paths=paths,
        threshold=threshold or 1.0,
    )
    sources = [(*each, True) for each in pairs] + [(*each, False) for each in compared]
    counts, lists = _run(repeated, sources, "repeats", context)
    found = {path for _, path in lists}
    of_parts = [shard_path(repeated.partition(number)) for number in range(len(parts))]
    return Repeats(
        storage=lists[0][0] if lists else storage,
        paths=[path if path in found else None for path in of_parts],
        num_duplicates=counts["num_duplicates"],
        num_near_duplicates=counts["num_near_duplicates"],
    )


def read_repeats(storage: Storage, path: str, part: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of a part that repeat others, in order, and whether by their ids."""
    table = read_table(storage, path)
    rows = table["row"].to_numpy()
    start, end = np.searchsorted(rows, [part << _ROW_BITS, (part + 1) << _ROW_BITS])
    return rows[start:end] - (part << _ROW_BITS), table["is_id"].to_numpy()[start:end]


def _run(
    exchange: Exchange, sources: Sequence[Any], name: str, context: StepContext
) -> tuple[Counter[str], list[tuple[Storage, str]]]:
    """Runs an exchange in a folder of its own; returns its counts and what it wrote."""
    storage = open_storage(join(context.storage.uri, "work", name))
    own = StepContext(storage=storage, inputs={}, progress=context.progress)
    try:
        counts = run_exchange(exchange, sources, own)
    finally:
        own.log.flush()
    return counts, [(storage, file.path) for file in own.log.files()]


@dataclass(frozen=True, kw_only=True)
class _Meetings(Exchange):
    """Rows with the same id, or the same band, meet.

    Attributes:
        storage: Holds the parts.
        bands: How many, and the values in each; None: only ids meet.
    """

    storage: Storage
    bands: tuple[int, int] | None

    def split(self, source: tuple[int, str]) -> pa.Table:
        """Returns the keys of a part's passages, of 128 bits, with their places."""
        part, path = source
        table = read_table(self.storage, path, ["id", "text", "reason"])
        is_passage = pc.is_null(table["reason"])
        places = np.flatnonzero(is_passage.to_numpy()) + (part << _ROW_BITS)
        table = table.filter(is_passage)
        ids = bytes.fromhex("".join(table["id"].to_pylist()))
        high, low = np.frombuffer(ids, ">u8").astype(np.uint64).reshape(-1, 2).T
        is_id = np.ones(len(places), bool)
        if self.bands is not None:
            hashes = band_hashes(table["text"].to_pylist(), *self.bands)
            num_bands = hashes.shape[1]
            high = np.concatenate([high, hashes.ravel()])
            low = np.concatenate([low, np.tile(np.arange(num_bands, dtype=np.uint64), len(places))])
            is_id = np.concatenate([is_id, np.zeros(hashes.size, bool)])
            places = np.concatenate([places, np.repeat(places, num_bands)])
        to = (high >> np.uint64(32)) * np.uint64(self.num_partitions) >> np.uint64(32)
        columns = {"high": high, "low": low, "is_id": is_id.astype(np.uint8), "place": places}
        return pa.table({**columns, PARTITION: to.astype(np.int64)})

    def merge(self, rows: pa.Table) -> tuple[pa.Table, Mapping[str, int]]:
        """Pairs each row of a bucket with its first one."""
        high, low, is_id, places = (column.to_numpy() for column in rows.columns)
        firsts = first_places(places, high, low, is_id)
        met = firsts != places
        pairs = np.stack([places[met], firsts[met], is_id[met]])
        pairs = np.unique(pairs, axis=1)
        return _pairs(pairs[0], pairs[1], pairs[2] == 1), {"num_pairs": pairs.shape[1]}


@dataclass(frozen=True, kw_only=True)
class _OfParts(Exchange):
    """An exchange with neighbouring parts in each partition.

    Attributes:
        storage: Holds the parts.
        paths: Theirs, in order.
    """

    storage: Storage
    paths: tuple[str, ...]

    def partition(self, part: Any) -> Any:
        """Returns the partition of a part, or those of an array of them."""
        return part * self.num_partitions // len(self.paths)

    def to(self, pairs: pa.Table, place: str) -> pa.Table:
        """Sends pairs to where the row lies whose place this column holds."""
        parts = pairs[place].to_numpy() >> _ROW_BITS
        return pairs.append_column(PARTITION, pa.array(self.partition(parts), pa.int64()))

    def trigrams(self, places: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yields places, which are sorted, and the hashes of the trigrams of the text at each."""
        for number, in_part in groupby(places.tolist(), key=lambda place: place >> _ROW_BITS):
            path = self.paths[number]
            with self.storage.open(path) as content:
                file = open_parquet(content, join(self.storage.uri, path))
                groups = range(file.num_row_groups)
                sizes = [file.metadata.row_group(group).num_rows for group in groups]
                starts = np.cumsum([number << _ROW_BITS, *sizes])
                for group, in_group in groupby(
                    in_part, key=lambda place: int(np.searchsorted(starts, place, "right")) - 1
                ):
                    texts = file.read_row_group(group, columns=["text"])["text"]
                    for place in in_group:
                        text = texts[place - int(starts[group])].as_py()
                        yield place, trigram_hashes(text)


@dataclass(frozen=True, kw_only=True)
class _Firsts(_OfParts):
    """Pairs get the trigrams of their first row, where it lies."""

    def split(self, source: tuple[Storage, str]) -> pa.Table:
        """Returns pairs that must be compared."""
        table = read_table(*source)
        return self.to(table.filter(pc.invert(table["is_id"])), "first")

    def merge(self, rows: pa.Table) -> tuple[pa.Table, Mapping[str, int]]:
        """Gives trigrams to the first of the pairs that go to the same partition."""
        pairs = np.stack([rows["first"].to_numpy(), rows["row"].to_numpy()])
        firsts, rows_ = np.unique(pairs, axis=1)  # a pair meets in several bands
        to = self.partition(rows_ >> _ROW_BITS)
        needs = np.ones(len(firsts), bool)
        needs[1:] = (firsts[1:] != firsts[:-1]) | (to[1:] != to[:-1])
        known = self.trigrams(np.unique(firsts))
        place, hashes = -1, np.empty(0)
        trigrams: list[np.ndarray | None] = []
        for first, needed in zip(firsts.tolist(), needs.tolist(), strict=True):
            while place < first:
                place, hashes = next(known)
            trigrams.append(hashes if needed else None)
        return _pairs(rows_, firsts, np.zeros(len(firsts), bool), trigrams), {}


@dataclass(frozen=True, kw_only=True)
class _Repeated(_OfParts):
    """Rows are compared with the first ones, where they lie.

    Attributes:
        threshold: Of the Jaccard similarity.
    """

    threshold: float

    def split(self, source: tuple[Storage, str, bool]) -> pa.Table:
        """Returns the pairs that are met by their ids, or those that are not."""
        storage, path, by_id = source
        table = read_table(storage, path)
        return self.to(table.filter(pc.equal(table["is_id"], by_id)), "row")

    def merge(self, rows: pa.Table) -> tuple[pa.Table, Mapping[str, int]]:
        """Returns the rows that repeat another one, in order, and whether by their ids."""
        places, firsts, is_id = (rows[name].to_numpy() for name in ("row", "first", "is_id"))
        copies = np.unique(places[is_id])
        known = _trigrams_of_firsts(rows)
        compared = ~(is_id | np.isin(places, copies))
        places, firsts = places[compared], firsts[compared]
        near = []
        for place, hashes in self.trigrams(np.unique(places)):
            start, end = np.searchsorted(places, [place, place + 1])
            if any(
                jaccard(known[first], hashes) >= self.threshold
                for first in firsts[start:end].tolist()
            ):
                near.append(place)
        found = np.concatenate([copies, np.array(near, np.int64)])
        order = np.argsort(found)
        table = pa.table(
            {"row": found[order], "is_id": (np.arange(len(found)) < len(copies))[order]}
        )
        return table, {"num_duplicates": len(copies), "num_near_duplicates": len(near)}


def _trigrams_of_firsts(rows: pa.Table) -> dict[int, np.ndarray]:
    rows = rows.filter(rows["trigrams"].is_valid())
    lists = rows["trigrams"].combine_chunks()
    ends, values = lists.offsets.to_numpy(), lists.values.to_numpy()
    return {
        first: values[ends[number] : ends[number + 1]]
        for number, first in enumerate(rows["first"].to_pylist())
    }


def _pairs(
    rows: np.ndarray, firsts: np.ndarray, is_id: np.ndarray, trigrams: Any = None
) -> pa.Table:
    columns = [rows, firsts, is_id, trigrams or [None] * len(rows)]
    return pa.table(columns, schema=_PAIRS)
