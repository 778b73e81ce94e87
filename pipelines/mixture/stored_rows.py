"""A mixture's rows on the storage: in memory is what they are drawn by, and where each is written.

A set's rows are written as they are read, and tokenised once it is known which of them are drawn.
Then an exchange takes them to their batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.artifacts import Artifact, unfinished_artifact
from cluster.exchange import PARTITION, Exchange, Shared
from cluster.file_list import FileList, shard_path
from cluster.files import FileEntry
from cluster.shard_groups import ShardGroup
from cluster.storage import Storage, join, open_storage, write_table
from pipelines.records import EXAMPLE

if TYPE_CHECKING:
    from pipelines.mixture.formats import Formatter

_DRAWN_BY = ["task", "query_id", "positive_id"]
_OF_EXAMPLE = pa.schema([field for field in EXAMPLE if field.name != "batch"])


@dataclass(frozen=True)
class StoredRows:
    """Rows of one set, formatted or also tokenised, in the order in which they were read."""

    artifact: Artifact

    @classmethod
    def write(cls, storage: Storage, tables: Iterable[pa.Table]) -> tuple[StoredRows, pa.Table]:
        """Writes tables of `formats.TEXTS`; returns also what rows are drawn by, and their numbers.

        The second has the columns task, query_id, positive_id and row.
        """
        files: list[FileEntry] = []
        drawn_by, num_rows = [], 0
        for table in tables:
            files.append(write_table(storage, shard_path(len(files)), table))
            numbers = pa.array(np.arange(num_rows, num_rows + table.num_rows))
            drawn_by.append(table.select(_DRAWN_BY).append_column("row", numbers))
            num_rows += table.num_rows
        stored = cls(unfinished_artifact(storage, FileList.of(files)))
        return stored, pa.concat_tables(drawn_by).combine_chunks()

    def tokenised(
        self, rows: np.ndarray, *, symmetric: bool, formatter: Formatter, storage: Storage
    ) -> StoredRows:
        """Tokenises and writes some rows, whose sorted numbers are given."""
        files: list[FileEntry] = []
        first = 0
        for shard in self.artifact.shards:
            start, stop = np.searchsorted(rows, [first, first + (shard.num_rows or 0)])
            if start < stop:
                some = self.artifact.shard(shard).take(pa.array(rows[start:stop] - first))
                some = formatter.with_tokens(some, symmetric=symmetric).cast(_OF_EXAMPLE)
                files.append(write_table(storage, shard_path(len(files)), some))
            first += shard.num_rows or 0
        return StoredRows(unfinished_artifact(storage, FileList.of(files)))


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where rows of one set stand in the training; arrays of equal length, sorted by row.

    Attributes:
        rows: Numbers of the rows, int64.
        batches: In which batch each of them stands, int32.
        places: And where in it, int32.
    """

    rows: np.ndarray
    batches: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, numbers: np.ndarray, batches: Sequence[tuple[int, np.ndarray]]) -> Places:
        """Returns the places of a set's rows by its batches, each with its number and its rows.

        `numbers` has the number of each row under which it is stored.
        """
        rows = np.concatenate([np.empty(0, np.int64), *(own for _, own in batches)])
        sizes = [len(own) for _, own in batches]
        of_batch = np.repeat(np.array([number for number, _ in batches], np.int32), sizes)
        places = np.concatenate(
            [np.empty(0, np.int32), *(np.arange(s, dtype=np.int32) for s in sizes)]
        )
        order = np.argsort(numbers[rows], kind="stable")
        return cls(rows=numbers[rows][order], batches=of_batch[order], places=places[order])

    def among(self, used: np.ndarray) -> Places:
        """Returns them with the rows' numbers among the sorted `used`."""
        rows = np.searchsorted(used, self.rows)
        return Places(rows=rows, batches=self.batches, places=self.places)


@dataclass(frozen=True, kw_only=True)
class WriteBatches(Exchange):
    """Tokenised rows meet in their batches.

    Attributes:
        batches_each: So many batches are a partition.
        places: A `Places` for each set.
    """

    order: tuple[str, ...] = ("batch", "place")
    batches_each: int
    places: Shared

    def split(self, source: tuple[int, ShardGroup]) -> pa.Table:
        """Returns a set's rows as often as they are drawn."""
        number, group = source
        table, places = group.read(), self.places.get()[number]
        span = [group.first_row, group.first_row + table.num_rows]
        start, stop = np.searchsorted(places.rows, span)
        batches = places.batches[start:stop]
        columns = {
            "batch": batches,
            "place": places.places[start:stop],
            PARTITION: batches.astype(np.int64) // self.batches_each,
        }
        table = table.take(pa.array(places.rows[start:stop] - group.first_row))
        for name, column in columns.items():
            table = table.append_column(name, pa.array(column))
        return table

    def merge(self, rows: pa.Table) -> tuple[pa.Table, dict[str, int]]:
        """Returns rows of `EXAMPLE`."""
        table = rows.select(EXAMPLE.names).cast(EXAMPLE)
        return table, {"num_batches": pc.count_distinct(table["batch"]).as_py()}


def part(storage: Storage, *names: str) -> Storage:
    """Returns a folder for what is written on the way."""
    return open_storage(join(storage.uri, "work", *names))
