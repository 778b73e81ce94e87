"""The one way in which rows meet: an exchange through files, by plain Ray tasks.

One task a source sorts its rows by partition into a spill file; one task a partition reads its part
of every spill and writes one shard. Both are resumed file by file. What comes out depends on the
sources and the number of partitions alone: not on workers, nor on what finished first. The driver
holds a few numbers for each task; a task, its source or its partition.
"""

from __future__ import annotations

import io
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import StorageError
from cluster.file_list import shard_path
from cluster.files import FileEntry
from cluster.parquet import parquet_table
from cluster.ray_errors import reported_error
from cluster.shard_log import ShardLog
from cluster.steps import StepContext
from cluster.storage import Storage, join, open_storage, write_table

PARTITION = "partition"  # the column that says where a row goes
_READERS = 8  # spills that a task reads at once
_OFFSET_BYTES = 8


@dataclass(frozen=True)
class Shared:
    """A value that goes once to each node, whose tasks all read it there."""

    _held: Any

    @classmethod
    def of(cls, value: Any) -> Shared:
        """Puts the value where tasks find it."""
        import ray

        return cls(ray.put(value) if ray.is_initialized() else value)

    def get(self) -> Any:
        """Returns the value, made anew each time; arrays stay where they lie, and are read-only."""
        import ray

        return ray.get(self._held) if isinstance(self._held, ray.ObjectRef) else self._held


@dataclass(frozen=True, kw_only=True)
class Exchange(ABC):
    """A frozen, picklable description of one exchange.

    Attributes:
        num_partitions: Of which each becomes a shard, unless it is empty.
        order: Columns by which a partition is sorted; rows that are alike in all of them stay in
            the order of the sources.
        num_cpus: That each task asks for.
        rows_per_group: Of a shard, for readers of some of its rows; None: all are one group.
    """

    num_partitions: int
    order: tuple[str, ...]
    num_cpus: float = 1.0
    rows_per_group: int | None = None

    @abstractmethod
    def split(self, source: Any) -> pa.Table:
        """Reads a source; its rows have a column `partition`, of which they keep no trace."""

    @abstractmethod
    def merge(self, rows: pa.Table) -> tuple[pa.Table, Mapping[str, int]]:
        """Makes a shard of a partition's sorted rows; returns it with counts, to be added up."""


def run_exchange(exchange: Exchange, sources: Sequence[Any], context: StepContext) -> Counter[str]:
    """Writes a shard for each partition that has rows; returns the counts of all.

    Raises:
        TokayError: A task failed for good.
    """
    spills = open_storage(
        join(context.storage.uri, f"work/exchange-{len(sources)}x{exchange.num_partitions}")
    )
    spilled = {file.path for file in spills.scan()}
    to_split = [n for n in range(len(sources)) if _spill_path(n) not in spilled]
    num_all, counts = len(sources) + exchange.num_partitions, Counter[str]()
    num_done = len(sources) - len(to_split)

    def tell() -> None:
        note = ", ".join(f"{count:,} {name.removeprefix('num_')}" for name, count in counts.items())
        context.progress.update(num_done, num_all, note)

    tell()
    splits = ((exchange, n, sources[n], spills) for n in to_split)
    for _ in run_tasks(_split, splits, exchange.num_cpus):
        num_done += 1
        tell()
    merged, tallies = context.log.resume()
    for tally in tallies:
        counts.update(json.loads(tally))
    to_merge = [n for n in range(exchange.num_partitions) if merged.find(shard_path(n)) is None]
    num_done += exchange.num_partitions - len(to_merge)
    merges = ((exchange, n, len(sources), spills, context.storage) for n in to_merge)
    for written in run_tasks(_merge, merges, exchange.num_cpus):
        if written is not None:
            entry, tally = written
            context.log.append([entry], json.dumps(tally).encode())
            counts.update(tally)
        num_done += 1
        tell()
    return counts


def run_described(
    work: Callable[..., tuple[list[FileEntry], Any]],
    arguments: Sequence[tuple[Any, ...]],
    log: ShardLog,
    num_cpus: float = 1.0,
) -> Iterator[tuple[int, Any]]:
    """Runs Ray tasks that write files; yields each one's number and what it tells, as they end.

    What tasks of an earlier run have told comes first; those whose files are all there do not run
    again.

    Args:
        work: Takes one of `arguments`; returns the descriptions of what it wrote to `shards/` or
            `rejects/`, at least one, and JSON that is kept with them.
        arguments: Of each task.
        log: Of the folder that the tasks write to; it is resumed here.
        num_cpus: That each task asks for.

    Raises:
        TokayError: A task failed for good.
    """
    done, tallies = log.resume()
    told: dict[int, Any] = {}
    for tally in map(json.loads, tallies):
        if all(done.find(path) for path in tally["paths"]):
            told[tally["task"]] = tally["told"]
    yield from told.items()
    rest = ((work, n, given) for n, given in enumerate(arguments) if n not in told)
    try:
        for number, files, tells in run_tasks(_described, rest, num_cpus):
            tally = {"task": number, "paths": [file.path for file in files], "told": tells}
            log.append(files, json.dumps(tally).encode())
            yield number, tells
    finally:
        log.flush()


def run_tasks(
    work: Callable[..., Any], arguments: Iterator[tuple[Any, ...]], num_cpus: float = 1.0
) -> Iterator[Any]:
    """Yields what Ray tasks return, as they end; twice as many are asked for as have a place.

    A task whose process or node is lost runs again, three times at most. Where Ray does not run, as
    in a unit test, this process does the work itself.

    Raises:
        TokayError: A task failed.
    """
    import ray

    if not ray.is_initialized():
        yield from (work(*given) for given in arguments)
        return
    task = ray.remote(work).options(num_cpus=num_cpus, scheduling_strategy="SPREAD")
    running: list[Any] = []
    try:
        while True:
            places = 2 * int(max(ray.cluster_resources().get("CPU", 1) / (num_cpus or 1), 1))
            while len(running) < places and (given := next(arguments, None)) is not None:
                running.append(task.remote(*given))
            if not running:
                return
            ended, running = ray.wait(running, num_returns=1)
            yield ray.get(ended[0])
    except ray.exceptions.RayError as error:
        raise reported_error(str(error), "a task failed") from error
    finally:
        if running:  # none of those that have ended: see `step_task`
            for reference in ray.wait(running, num_returns=len(running), timeout=0)[1]:
                ray.cancel(reference, force=False)


def _described(
    work: Callable[..., tuple[list[FileEntry], Any]], number: int, given: tuple[Any, ...]
) -> tuple[int, list[FileEntry], Any]:
    return number, *work(*given)


def _split(exchange: Exchange, number: int, source: Any, spills: Storage) -> None:
    """Writes a source's rows by partition: Parquet after Parquet, and where each of them ends."""
    import pyarrow.parquet as pq

    rows = exchange.split(source)
    places, num_partitions = rows[PARTITION].combine_chunks().to_numpy(), exchange.num_partitions
    if len(places) and not 0 <= places.min() <= places.max() < num_partitions:
        raise ValueError(f"partitions {places.min()} to {places.max()} of {num_partitions}")
    rows = rows.drop_columns([PARTITION]).take(np.argsort(places, kind="stable"))
    starts = np.cumsum([0, *np.bincount(places, minlength=num_partitions)])
    ends = np.zeros(num_partitions + 1, "<i8")
    num_bytes = 0
    with spills.writing(_spill_path(number)) as file:
        for partition, (start, stop) in enumerate(pairwise(starts)):
            if stop > start:
                part = io.BytesIO()
                pq.write_table(rows.slice(start, stop - start), part, compression="zstd")
                num_bytes += file.write(part.getbuffer())
            ends[partition + 1] = num_bytes
        file.write(ends.tobytes())


def _merge(
    exchange: Exchange, partition: int, num_sources: int, spills: Storage, target: Storage
) -> tuple[FileEntry, dict[str, int]] | None:
    """Writes the shard of a partition; returns its description, or None where it has no rows."""

    def read(number: int) -> pa.Table | None:
        return _read_spill(spills, _spill_path(number), partition, exchange.num_partitions)

    with ThreadPoolExecutor(_READERS) as pool:
        parts = [part for part in pool.map(read, range(num_sources)) if part is not None]
    if not parts:
        return None
    rows = pa.concat_tables(parts)
    keys = [(name, "ascending") for name in exchange.order]
    # Arrow's sort is stable: what is alike stays in the order of the sources.
    table, counts = exchange.merge(rows.take(pc.sort_indices(rows, keys)))
    if not table.num_rows:
        return None
    written = write_table(target, shard_path(partition), table, exchange.rows_per_group)
    return written, dict(counts)


def _read_spill(spills: Storage, path: str, partition: int, num_partitions: int) -> pa.Table | None:
    """Reads one partition of a spill file, by range; None where it has no rows there."""
    place = join(spills.uri, path)
    with spills.open(path) as file:
        table_bytes = _OFFSET_BYTES * (num_partitions + 1)
        size = file.seek(-table_bytes, io.SEEK_END)
        file.seek(_OFFSET_BYTES * partition, io.SEEK_CUR)
        start, end = np.frombuffer(file.read(2 * _OFFSET_BYTES), "<i8")
        if not 0 <= start <= end <= size:
            raise StorageError(f"{place} is no spill of {num_partitions} partitions")
        file.seek(start)
        content = file.read(int(end - start))
    return parquet_table(content, None, place) if content else None


def _spill_path(number: int) -> str:
    return f"{number:09d}.spill"
