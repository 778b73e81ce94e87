"""A mixture's rows on the storage: tasks write them, and take them to their batches.

What the driver reads of them is what they are drawn by, some tens of bytes a row. Then an exchange
tokenises those that are drawn, and writes the batches in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import pyarrow as pa

from cluster.artifacts import Artifact, unfinished_artifact
from cluster.exchange import PARTITION, Exchange, Shared, run_described, run_exchange, run_tasks
from cluster.file_list import shard_number, shard_path
from cluster.files import FileEntry
from cluster.shard_groups import ShardGroup, shard_groups
from cluster.steps import StepContext
from cluster.storage import Storage, join, open_storage
from pipelines.corpus.held_out import draw_numbers
from pipelines.mixture.sources import KEYS

SHARDS_A_SET = 1_000_000  # the shards of set s have numbers from s times this on
TEXTS_PER_GROUP = 64  # of a shard's rows: the fewest that a training worker decodes
Batches = Sequence[tuple[int, np.ndarray]]  # of each its set, and its rows' places in that

_VALIDATION = "validation"
_KEYS = {"task": "task_key", "query": "query_key", "positive": "positive_key"}
_READERS = 8
_SOURCE_BYTES = 16 << 20


def part(context: StepContext, name: str) -> StepContext:
    """Returns the context of a part of the work, which has a folder and a log of its own."""
    return replace(context, storage=open_storage(join(context.storage.uri, "work", name)))


def write_rows(
    work: Callable[..., tuple[list[FileEntry], Any]],
    arguments: Sequence[tuple[Any, ...]],
    context: StepContext,
) -> tuple[Artifact, list[Any]]:
    """Has tasks write rows, as far as an earlier run has not.

    Args:
        work: As for `run_described`; the shards of set s are numbered from s `SHARDS_A_SET` on.
        arguments: Of each task; the last is the storage to write to.
        context: Of this part of the work.

    Returns:
        The rows, and what each task tells.
    """
    told: list[Any] = [None] * len(arguments)
    context.progress.update(0, len(arguments), "reading")
    for done, (number, tells) in enumerate(run_described(work, arguments, context.log), start=1):
        told[number] = tells
        context.progress.update(done, len(arguments), "reading")
    return unfinished_artifact(context.storage, context.log.files()), told


def with_keys(
    table: pa.Table, *, tasks: list[str], queries: list[str], positives: list[str], symmetric: bool
) -> pa.Table:
    """Adds what each row is drawn by: numbers that are equal where these texts are.

    Where rows are `symmetric`, the query of one may be the positive of another.
    """
    numbers = {
        "task": draw_numbers("task", tasks),
        "query": draw_numbers("query", queries),
        "positive": draw_numbers("query" if symmetric else "positive", positives),
    }
    for name, column in _KEYS.items():
        table = table.append_column(column, pa.array(numbers[name], pa.uint64()))
    return table


def read_keys(rows: Artifact, num_sets: int) -> list[np.ndarray]:
    """Returns what the rows of each set are drawn by, of `KEYS`; they are numbered as one table."""
    shards = rows.shards
    first = np.cumsum([0, *(shard.num_rows or 0 for shard in shards)])

    def read(number: int) -> tuple[int, np.ndarray]:
        shard = shards[number]
        table = rows.shard(shard, list(_KEYS.values()))
        keys = np.empty(table.num_rows, KEYS)
        keys["row"] = np.arange(first[number], first[number + 1])
        for name, column in _KEYS.items():
            keys[name] = table[column].to_numpy()
        return shard_number(shard.path) // SHARDS_A_SET, keys

    parts: list[list[np.ndarray]] = [[np.empty(0, KEYS)] for _ in range(num_sets)]
    with ThreadPoolExecutor(_READERS) as pool:
        for number, keys in pool.map(read, range(len(shards))):
            parts[number].append(keys)
    return [np.concatenate(each) for each in parts]


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where rows stand in the training; arrays of equal length, sorted by row.

    Attributes:
        rows: Numbers of the rows, int64.
        batches: In which batch each of them stands, int32.
        places: And where in it, int32.
    """

    rows: np.ndarray
    batches: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, batches: Batches, numbers: Sequence[np.ndarray], first: int = 0) -> Places:
        """Returns the places of the rows of all batches.

        `numbers` has the number of each row of each set; `first` is the place in a batch of the
        first of its rows.
        """
        parts = [numbers[of_set][own] for of_set, own in batches]
        sizes = [len(own) for own in parts]
        rows = np.concatenate([np.empty(0, np.int64), *parts])
        order = np.argsort(rows, kind="stable")
        of_batch = np.repeat(np.arange(len(batches), dtype=np.int32), sizes)[order]
        places = [np.empty(0, np.int32), *(np.arange(size, dtype=np.int32) for size in sizes)]
        return cls(rows=rows[order], batches=of_batch, places=np.concatenate(places)[order] + first)

    def between(self, first: int, num_rows: int) -> Places:
        """Returns those of a range of rows."""
        start, stop = np.searchsorted(self.rows, [first, first + num_rows])
        return self.take(slice(start, stop))

    def take(self, which: np.ndarray | slice) -> Places:
        """Returns some of them."""
        return Places(rows=self.rows[which], batches=self.batches[which], places=self.places[which])

    def sources(self, rows: Artifact) -> list[ShardGroup]:
        """Returns the groups of shards that hold such rows; the smaller, the more often they come.

        So a task holds no more, however many epochs there are.
        """
        return groups_with(self.rows, shard_groups(rows, _SOURCE_BYTES // self.times))

    @property
    def times(self) -> int:
        """How often a row comes, rounded up."""
        return max(1, -(-len(self.rows) // max(1, len(np.unique(self.rows)))))


@dataclass(frozen=True, kw_only=True)
class WriteBatches(Exchange):
    """Stored rows meet in their batches, all the rows of a batch in one shard.

    Attributes:
        batches_each: So many batches are a partition.
        places: The `Places` of all rows.
        schema: Of what is written.
    """

    order: tuple[str, ...] = ("batch", "place")
    batches_each: int
    places: Shared
    schema: pa.Schema

    @classmethod
    def of(cls, batches: Batches, batches_each: int, places: Places, **fields: Any) -> Self:
        """Returns an exchange with as many partitions as these batches need."""
        return cls(
            num_partitions=-(-len(batches) // batches_each),
            batches_each=batches_each,
            places=Shared.of(places),
            **fields,
        )

    def placed(
        self, source: ShardGroup, places: Places, made: Callable[[pa.Table], pa.Table]
    ) -> pa.Table:
        """Returns the rows of a source, at all their places.

        `made` makes what is written of some rows of one shard, each once.
        """
        tables, first = [], source.first_row
        for shard in source.shards:
            own = places.between(first, shard.num_rows or 0)
            used, which = np.unique(own.rows, return_inverse=True)
            if len(used):
                rows = source.artifact.shard(shard).take(pa.array(used - first))
                tables.append(self.at(made(rows).take(pa.array(which)), own))
            first += shard.num_rows or 0
        return pa.concat_tables(tables)

    def at(self, rows: pa.Table, places: Places) -> pa.Table:
        """Returns rows with their places."""
        columns = {
            "row": places.rows,
            "batch": places.batches,
            "place": places.places,
            PARTITION: places.batches.astype(np.int64) // self.batches_each,
        }
        for name, column in columns.items():
            rows = rows.append_column(name, pa.array(column))
        return rows

    def merge(self, rows: pa.Table) -> tuple[pa.Table, dict[str, int]]:
        """Returns rows of the schema."""
        return rows.select(self.schema.names).cast(self.schema), {"num_rows": rows.num_rows}


def groups_with(rows: np.ndarray, groups: Iterable[ShardGroup]) -> list[ShardGroup]:
    """Returns the groups of shards that hold some of the rows, whose sorted numbers are given."""
    spans = ((g, np.searchsorted(rows, [g.first_row, g.first_row + g.num_rows])) for g in groups)
    return [group for group, (start, stop) in spans if start < stop]


def write_validation(exchange: Exchange, sources: Sequence[Any], context: StepContext) -> None:
    """Writes the batches of an exchange beside the step's shards."""
    own = part(context, _VALIDATION)
    run_exchange(exchange, sources, own)
    context.log.append(copy_files(own, context, "shards", f"{_VALIDATION}/shards"))


def copy_files(source: StepContext, target: StepContext, kind: str, folder: str) -> list[FileEntry]:
    """Copies the shards or rejects of a part of the work to a folder, numbered anew in order."""
    files = [file for file in source.log.files() if file.path.startswith(f"{kind}/")]
    copies = (
        (source.storage, target.storage, file, shard_path(number, folder))
        for number, file in enumerate(files)
    )
    return list(run_tasks(_copy, copies))


def _copy(source: Storage, target: Storage, file: FileEntry, path: str) -> FileEntry:
    target.write_bytes(path, source.read_bytes(file.path))
    return replace(file, path=path)
