"""Queries that repeat an earlier one, found by an exchange: the same ones whatever the tasks.

The order is that of the candidates. A query repeats an earlier one if their texts without case
are equal, and nearly repeats one by the rule of `pipelines.corpus.near_duplicates`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
from pipelines.corpus.near_duplicates import band_hashes, jaccard, num_bands, trigram_hashes
from pipelines.fret.labelling import DROPPED, Source

REPEATS, NEARLY_REPEATS = "repeats another query", "nearly repeats another query"

_BANDS = pa.schema(
    [
        ("band", pa.uint64()),  # which one it is, and what it holds
        ("is_first", pa.bool_()),  # of the bands of its query
        ("place", pa.int64()),
        ("text", pa.string()),
    ]
)
_ALIKE = pa.schema([("place", pa.int64()), ("is_equal", pa.bool_())])


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
        _, group = source
        rows = group.read(["place", "query", "dropped_by"])
        rows = rows.filter(rows["dropped_by"].is_null())
        places, texts = rows["place"].to_numpy(), [q.casefold() for q in rows["query"].to_pylist()]
        bands = band_hashes(texts, *num_bands(self.threshold))
        num_queries, num_each = bands.shape
        of_query, numbers = np.repeat(np.arange(num_queries), num_each), bands.ravel()
        table = pa.table(
            [
                pa.array(numbers),
                pa.array(np.arange(len(numbers)) % num_each == 0),
                pa.array(places[of_query]),
                pa.array(texts, pa.string()).take(pa.array(of_query)),
            ],
            schema=_BANDS,
        )
        partitions = (numbers % np.uint64(self.num_partitions)).astype(np.int64)
        return table.append_column(PARTITION, pa.array(partitions))

    def merge(self, rows: pa.Table) -> tuple[pa.Table, dict[str, int]]:
        """Returns the queries that are like an earlier one."""
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
        first = next(band)
        texts, trigrams = {first["text"]}, trigram_hashes(first["text"])
        for row in band:
            if row["text"] in texts:  # then all their bands are equal, and one says it for all
                if row["is_first"]:
                    yield {"place": row["place"], "is_equal": True}
                continue
            texts.add(row["text"])
            if jaccard(trigrams, trigram_hashes(row["text"])) >= self.threshold:
                yield {"place": row["place"], "is_equal": False}


def drop_repeated(alike: Artifact, target: Storage) -> list[FileEntry]:
    """Writes which queries are dropped for what they are like, and why; nothing if none is."""
    rows = pa.concat_tables([_ALIKE.empty_table(), *alike.tables()])
    equal = set(rows["place"].filter(rows["is_equal"]).to_pylist())
    places = sorted({*rows["place"].to_pylist()})
    if not places:
        return []
    reasons = [REPEATS if place in equal else NEARLY_REPEATS for place in places]
    table = pa.table([pa.array(places, pa.int64()), pa.array(reasons)], schema=DROPPED)
    return [write_table(target, shard_path(0), table)]
