"""Queries that repeat an earlier one, found by an exchange: the same ones whatever the tasks.

The order is that of the candidates. A query repeats an earlier one if their texts without case
are equal. It nearly repeats one if a band of their MinHash sketches is equal, the Jaccard
similarity of their word trigrams reaches the threshold, and the earlier one does not nearly repeat
another itself. Of those that have a band in common, a query is compared with the earlier ones, in
their order, until 64 are near: one beyond them could matter only if all of those were dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.artifacts import Artifact
from cluster.exchange import PARTITION, Exchange
from cluster.file_list import shard_path
from cluster.files import FileEntry
from cluster.storage import Storage, write_table
from pipelines.corpus.near_duplicates import _jaccard, _trigrams
from pipelines.fret.labelling import DROPPED, Source

REPEATS, NEARLY_REPEATS = "repeats another query", "nearly repeats another query"
_MAX_NEAR = 64
_NUM_HASHES = 128

_BANDS = pa.schema(
    [
        ("band", pa.uint64()),  # which one it is, and what it holds
        ("is_first", pa.bool_()),  # of the bands of its query
        ("place", pa.int64()),
        ("text", pa.string()),
    ]
)
# Of a query that is like an earlier one; null: the texts are equal.
_ALIKE = pa.schema([("place", pa.int64()), ("earlier", pa.int64())])


@dataclass(frozen=True, kw_only=True)
class FindRepeated(Exchange):
    """Queries that have a band in common meet, and are compared.

    Attributes:
        threshold: The Jaccard similarity from which queries are near.
    """

    order: tuple[str, ...] = ("band", "place")
    threshold: float

    def split(self, source: Source) -> pa.Table:
        """Returns the bands of each query that nothing else has dropped."""
        from datasketch import MinHash, MinHashLSH

        _, group = source
        rows = group.read(["place", "query", "dropped_by"])
        rows = rows.filter(rows["dropped_by"].is_null())
        places, texts = rows["place"].to_numpy(), [q.casefold() for q in rows["query"].to_pylist()]
        # The index is asked for a little less than the threshold, because it errs to both sides.
        ranges = MinHashLSH(threshold=0.9 * self.threshold, num_perm=_NUM_HASHES).hashranges
        sketches = MinHash.generator(
            (
                [trigram.encode("utf-8", "surrogatepass") for trigram in _trigrams(text)]
                for text in texts
            ),
            num_perm=_NUM_HASHES,
            seed=1,
            scheme="affine32",
        )
        bands = [
            int.from_bytes(
                blake2b(b"%d " % start + sketch.hashvalues[start:end].tobytes()).digest()[:8]
            )
            for sketch in sketches
            for start, end in ranges
        ]
        of_query = np.repeat(np.arange(len(texts)), len(ranges))
        numbers = np.array(bands, np.uint64)
        table = pa.table(
            [
                pa.array(numbers),
                pa.array(np.arange(len(bands)) % len(ranges) == 0),
                pa.array(places[of_query]),
                pa.array(texts, pa.string()).take(pa.array(of_query)),
            ],
            schema=_BANDS,
        )
        partitions = (numbers % np.uint64(self.num_partitions)).astype(np.int64)
        return table.append_column(PARTITION, pa.array(partitions))

    def merge(self, rows: pa.Table) -> tuple[pa.Table, dict[str, int]]:
        """Returns which queries are like which earlier ones."""
        bands = rows["band"].to_numpy()
        same = bands[1:] == bands[:-1]
        shared = np.append(False, same) | np.append(same, False)  # most bands are of one query
        alike = [
            pair
            for _, own in groupby(rows.filter(pa.array(shared)).to_pylist(), key=itemgetter("band"))
            for pair in self._alike(own)
        ]
        return pa.Table.from_pylist(alike, schema=_ALIKE), {}

    def _alike(self, band: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        texts: set[str] = set()
        earlier: list[tuple[int, set[str]]] = []
        for row in band:
            if row["text"] in texts:  # then all their bands are equal, and one says it for all
                if row["is_first"]:
                    yield {"place": row["place"], "earlier": None}
                continue
            texts.add(row["text"])
            trigrams, num_near = _trigrams(row["text"]), 0
            for place, others in earlier:
                if num_near < _MAX_NEAR and _jaccard(trigrams, others) >= self.threshold:
                    num_near += 1
                    yield {"place": row["place"], "earlier": place}
            earlier.append((row["place"], trigrams))


def drop_repeated(alike: Artifact, target: Storage) -> list[FileEntry]:
    """Writes which queries are dropped for what they are like, and why; nothing if none is."""
    tables = [_ALIKE.empty_table(), *alike.tables()]
    rows = pa.concat_tables(tables).sort_by([("place", "ascending"), ("earlier", "ascending")])
    equal = rows["place"].filter(rows["earlier"].is_null()).to_pylist()
    near = rows.filter(rows["earlier"].is_valid())
    dropped: set[int] = set()
    pairs = zip(near["place"].to_pylist(), near["earlier"].to_pylist(), strict=True)
    for place, own in groupby(pairs, key=itemgetter(0)):
        if any(earlier not in dropped for _, earlier in own):
            dropped.add(place)
    places = pa.array([*equal, *sorted(dropped)], pa.int64())
    if not len(places):
        return []
    reasons = [REPEATS] * len(equal) + [NEARLY_REPEATS] * len(dropped)
    table = pa.table([places, pa.array(reasons)], schema=DROPPED).sort_by("place")
    return [write_table(target, shard_path(0), table)]
