"""The step `seeds`: the passages that the LLM writes queries about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from cluster.artifacts import Artifact, Json
from cluster.config import Config
from cluster.exchange import Shared, run_tasks
from cluster.file_list import shard_path
from cluster.files import FileEntry
from cluster.plain_json import dump_json
from cluster.shard_groups import ShardGroup, shard_groups
from cluster.steps import Step, StepContext
from cluster.storage import Storage, write_table
from pipelines.corpus.held_out import FILE, draw_numbers, hold_out
from pipelines.fingerprints import fingerprinted
from pipelines.ids import document_name
from pipelines.records import SEED

if TYPE_CHECKING:
    from pipelines.recipe.recipe import Recipe

TITLE = "sample seed passages"
_SHARDS_A_TASK = 16


class SeedsConfig(Config):
    """Which passages the LLM writes about."""

    num_seeds: int = Field(default=1000, ge=1)
    seed: int = 0
    rows_per_shard: int = Field(
        default=32, ge=1, description="the unit of work, of resume and of retry"
    )


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """What is held out for the step `gate`.

    Attributes:
        num_queries: Titles and first sentences that the documents must have.
        num_seeds: Passages that the LLM writes queries for.
    """

    num_queries: int
    num_seeds: int


def step(recipe: Recipe) -> Step:
    """Returns the step."""
    held_out = recipe.gate.hold_out if recipe.gate else None
    return Step(
        name="seeds",
        config=fingerprinted(recipe.seeds)
        | ({"held_out": [held_out.num_queries, held_out.num_seeds]} if held_out else {}),
        inputs=("passages",),
        work=lambda context: choose_seeds(recipe.seeds, held_out, context),
    )


def choose_seeds(
    config: SeedsConfig, held_out: HoldOut | None, context: StepContext
) -> dict[str, Json]:
    """Samples seed passages uniformly, by a hash, so that more seeds contain the fewer.

    Neighbours in the corpus stay neighbours, because passages of one document share candidates.
    Of the documents that are held out come seeds of their own, and no others; their names are kept
    beside the shards.

    Tasks read the passages twice: first for the draws, of which 12 bytes a seed are held, and then
    to write those that were drawn.
    """
    passages = context.input("passages")
    documents: list[str] = []
    if held_out is not None:
        documents = hold_out(
            passages,
            num_queries=held_out.num_queries,
            num_passages=held_out.num_seeds,
            seed=config.seed,
        )
        context.storage.write_bytes(FILE, dump_json(documents).encode())
    others = _Smallest(config.num_seeds)
    theirs = _Smallest(held_out.num_seeds if held_out else 0)
    draws = _Draws(passages=passages, seed=config.seed, held_out=Shared.of(frozenset(documents)))
    groups = ((draws, group, others.highest, theirs.highest) for group in shard_groups(passages))
    num_read = 0
    for drawn, drawn_of_theirs, num_rows in run_tasks(_draw_from, groups):
        others.add(drawn)
        theirs.add(drawn_of_theirs)
        num_read += num_rows
        context.progress.update(num_read, passages.num_rows, "drawing")
    _write(config, draws, others, theirs, context)
    counts = {"num_held_out_seeds": len(theirs), "num_held_out_documents": len(documents)}
    return {"num_seeds": len(others)} | (counts if held_out else {})


_DRAWN = np.dtype([("draw", np.uint64), ("shard", np.uint32)])


class _Smallest:
    """Keeps the smallest draws, and which shard each of them is of."""

    def __init__(self, num: int) -> None:
        self._num = num
        self._kept, self._more = np.empty(0, _DRAWN), list[np.ndarray]()
        self.highest = np.uint64(2**64 - 1 if num else 0)  # that may be among them

    def __len__(self) -> int:
        return len(self.drawn)

    @property
    def drawn(self) -> np.ndarray:
        """The draws, in no order."""
        self._cut()
        return self._kept

    def add(self, drawn: np.ndarray) -> None:
        self._more.append(drawn)
        if sum(map(len, self._more)) > self._num:
            self._cut()

    def _cut(self) -> None:
        kept, self._more = np.concatenate([self._kept, *self._more]), []
        if len(kept) > self._num > 0:
            self.highest = np.partition(kept["draw"], self._num - 1)[self._num - 1]
        self._kept = kept[kept["draw"] <= self.highest]


@dataclass(frozen=True, kw_only=True)
class _Draws:
    """The draw of each passage.

    Attributes:
        passages: The corpus.
        seed: Of the draw.
        held_out: The documents that are held out.
    """

    passages: Artifact
    seed: int
    held_out: Shared

    def of(self, rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Returns each row's draw, and whether its document is held out."""
        draws = draw_numbers(str(self.seed), rows["id"].to_pylist())
        names = self.held_out.get()
        if not names:
            return draws, np.zeros(len(draws), bool)
        documents = map(document_name, rows["source"].to_pylist())
        return draws, np.array([name in names for name in documents], bool)


def _draw_from(
    draws: _Draws, group: ShardGroup, highest: np.uint64, of_theirs: np.uint64
) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns the draws of a group that may be among the smallest, and how many rows it has."""
    others, theirs, num_rows = [], [], 0
    for number, rows in enumerate(group.tables(["id", "source"]), group.number):
        found, is_held_out = draws.of(rows)
        drawn = np.empty(len(found), _DRAWN)
        drawn["draw"], drawn["shard"] = found, number
        others.append(drawn[~is_held_out & (found <= highest)])
        theirs.append(drawn[is_held_out & (found <= of_theirs)])
        num_rows += len(found)
    return np.concatenate(others), np.concatenate(theirs), num_rows


def _write(
    config: SeedsConfig,
    draws: _Draws,
    others: _Smallest,
    theirs: _Smallest,
    context: StepContext,
) -> None:
    """Writes the shards by tasks, each a range of them, as far as the log does not have them."""
    shards, size = draws.passages.shards, config.rows_per_shard
    drawn = np.concatenate([others.drawn["shard"], theirs.drawn["shard"]])
    counts = np.bincount(drawn, minlength=len(shards))
    ends = np.cumsum(counts)
    done, _ = context.log.resume()
    num_shards = max(1, -(-len(drawn) // size))  # one without rows keeps the columns

    def ranges() -> Iterator[tuple[Any, ...]]:
        for first in range(0, num_shards, _SHARDS_A_TASK):
            last = min(first + _SHARDS_A_TASK, num_shards)
            if all(done.find(shard_path(number)) for number in range(first, last)):
                continue
            start, stop = first * size, min(last * size, len(drawn))
            # The passages' shards that these rows lie in; one without seeds has the columns too.
            source = min(int(np.searchsorted(ends, start, side="right")), len(shards) - 1)
            until = max(source, int(np.searchsorted(ends, stop)))
            part = _Part(
                first=first,
                num_rows=stop - start,
                num_skipped=start - int(ends[source] - counts[source]),
                sources=[shards[n] for n in range(source, until + 1) if counts[n] or n == source],
                highest=(others.highest, theirs.highest),
            )
            yield draws, part, size, context.storage

    num_done = len(done)
    for written in run_tasks(_write_part, ranges()):
        context.log.append(written)
        num_done += len(written)
        context.progress.update(num_done, num_shards, "writing")


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Seeds that one task writes.

    Attributes:
        first: The number of their first shard.
        num_rows: So many seeds.
        num_skipped: Seeds of the first of `sources` that come before them.
        sources: The passages' shards that hold them.
        highest: The highest draws of seeds, and of those that are held out.
    """

    first: int
    num_rows: int
    num_skipped: int
    sources: list[FileEntry]
    highest: tuple[np.uint64, np.uint64]

    def rows(self, draws: _Draws) -> Iterator[pa.Table]:
        """Yields them, in the order of the corpus, for each of the sources."""
        skipped, left = self.num_skipped, self.num_rows
        for source in self.sources:
            rows = draws.passages.shard(source)
            found, is_held_out = draws.of(rows)
            is_seed = found <= np.where(is_held_out, self.highest[1], self.highest[0])
            column = pa.array(is_held_out, pa.bool_())
            rows = rows.append_column(SEED.field("held_out"), column).filter(pa.array(is_seed))
            rows = rows.slice(skipped, left)
            skipped, left = 0, left - rows.num_rows
            yield rows


def _write_part(draws: _Draws, part: _Part, size: int, storage: Storage) -> list[FileEntry]:
    """Writes shards of `size` rows, with no more in memory than one and a shard of passages."""
    written: list[FileEntry] = []
    waiting: pa.Table | None = None

    def write(rows: pa.Table) -> None:
        path = shard_path(part.first + len(written))
        written.append(write_table(storage, path, rows))

    for rows in part.rows(draws):
        waiting = rows if waiting is None else pa.concat_tables([waiting, rows])
        while waiting.num_rows >= size:
            write(waiting.slice(0, size))
            waiting = waiting.slice(size)
    if waiting is not None and (waiting.num_rows or not written):
        write(waiting)
    return written
