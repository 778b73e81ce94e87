"""Stages: transformations of shards by actors, streamed by Ray Data and resumed shard by shard.

Ray Data moves references to shards, not rows: an actor reads its input shard, works, and commits
one output shard of the same number. So a shard is the unit of work, of resume and of retry; the
object store stays empty; and a shard computed twice (a lost node, a killed run) is the same file.
"""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
from pydantic import Field

from cluster.actor_health import MAX_DEATHS, actor_begins, clear_actors, report_waiting
from cluster.artifacts import Artifact, Json, describe_file, write_rejects
from cluster.config import Config
from cluster.errors import EngineDied, Reject, TokayError, TooManyRejects
from cluster.file_list import FileList, shard_number, shard_path
from cluster.files import FileEntry
from cluster.ray_errors import reported_error
from cluster.steps import StepContext
from cluster.storage import Storage, read_table, write_table

TALLY = b"tokay.tally"
_ACTORS = "stage"


class StageResources(Config):
    """What each actor of a stage needs; changes no number, so it is in no fingerprint."""

    num_actors: int = Field(
        default=1,
        ge=1,
        description="at most; the pool starts with one, with node_resource with all",
    )
    num_cpus: float = Field(default=1.0, ge=0, description="an actor")
    num_gpus: float = Field(default=0.0, ge=0, description="an actor")
    node_resource: str | None = Field(
        default=None, description="custom resource of the nodes that may have such actors"
    )
    shards_in_flight: int = Field(
        default=2, ge=1, description="shards at work at once in an actor, so that it never idles"
    )

    @property
    def custom(self) -> dict[str, float]:
        """The custom resources of an actor."""
        return {self.node_resource: 0.001} if self.node_resource else {}

    @property
    def needs(self) -> dict[str, float]:
        """All that an actor asks for, by Ray's names."""
        return {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.custom}


@dataclass(frozen=True, kw_only=True)
class StageOutput:
    """What became of a shard's rows: each is in `rows` or, with its reason, in `rejects`.

    Attributes:
        rows: Results.
        rejects: (id, reason, text) of each refused row.
        unusable: (id, reason, text) of what stays in `rows`, marked as unfit for what follows.
        metrics: Counts to be summed over shards.
        highest: Figures of which the highest of all shards is kept.
    """

    rows: pa.Table
    rejects: list[Reject] = field(default_factory=list)
    unusable: list[Reject] = field(default_factory=list)
    metrics: Mapping[str, float] = field(default_factory=dict)
    highest: Mapping[str, float] = field(default_factory=dict)


StageFunction = Callable[[pa.Table], Awaitable[StageOutput]]


@dataclass(frozen=True, kw_only=True)
class Stage(ABC):
    """A frozen, picklable description of one transformation.

    Attributes:
        columns: The columns it reads.
        resources: What each actor needs.
    """

    columns: tuple[str, ...]
    resources: StageResources

    @property
    def rows_per_row(self) -> int:
        """Output rows, rejects among them, for each input row."""
        return 1

    @abstractmethod
    def load(self) -> StageFunction:
        """Loads models, once in each actor, and returns the transformation of a shard."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """How much a stage may refuse, what is unusable included, before it stops.

    Attributes:
        share: Of `num_all`.
        num_all: What the stage makes in all.
        remedy: What the person may do, for the error.
    """

    share: float
    num_all: int
    remedy: str


def run_stage(
    stage: Stage, source: Artifact, context: StepContext, limit: Limit | None = None
) -> dict[str, Json]:
    """Transforms every shard of `source` that has no output yet; returns metrics.

    Raises:
        TokayError: An actor failed for good or died again and again, or a stage lost rows.
        TooManyRejects: More rows were refused than `limit` allows; what is done stays.
    """
    import ray
    from ray.data import ActorPoolStrategy

    tally = _Tally()
    done = _done(context, tally)
    todo = source.shards.without(done)
    num_done = source.num_rows - todo.num_rows
    tally.check(limit, context)
    context.progress.update(num_done, source.num_rows, "starting actors" if todo else "")
    if todo:
        resources = stage.resources
        max_actors = min(resources.num_actors, len(todo))
        # Ray Data asks for nodes by CPUs and GPUs alone; actors that wait name theirs.
        min_actors = max_actors if resources.node_resource else 1
        references = ray.data.from_items(
            [{"shard": json.dumps(asdict(shard))} for shard in todo],
            override_num_blocks=len(todo),
        )
        results = references.map_batches(
            _ShardWorker,
            fn_constructor_args=(stage, source, context.storage),
            batch_size=1,
            compute=ActorPoolStrategy(
                min_size=min_actors,
                max_size=max_actors,
                max_tasks_in_flight_per_actor=2 * resources.shards_in_flight,
                max_concurrent_calls_per_actor=resources.shards_in_flight,
            ),
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
            resources=resources.custom,
        )
        clear_actors(context.storage, _ACTORS)
        try:
            with report_waiting(
                context, _ACTORS, min_actors, resources.needs, lambda: (num_done, source.num_rows)
            ):
                for result in results.iter_rows():
                    files = [FileEntry(**file) for file in json.loads(result["files"])]
                    context.log.append(files, result["tally"])
                    num_done += result["num_rows"]
                    context.progress.update(num_done, source.num_rows)
                    tally.add(result["tally"])
                    tally.check(limit, context)
        except ray.exceptions.RayError as error:
            raise reported_error(str(error), "an actor failed") from error
        finally:
            context.log.flush()
    return {**tally.metrics, **tally.highest}


def _done(context: StepContext, tally: _Tally) -> FileList:
    """Returns the finished shards, and counts what they tallied.

    The log knows them, but for those that were written in the last moments before a crash.
    """
    storage, unknown = context.storage, list[FileEntry]()
    known, tallies = context.log.resume()
    for content in tallies:
        tally.add(content)
    for file, number in known.locate(storage.scan("shards")):
        if number is None:
            files = [describe_file(storage, file.path)]
            unknown += files
            rejects = shard_path(shard_number(file.path), "rejects")
            if storage.exists(rejects):
                files = [describe_file(storage, rejects), *files]
            metadata = read_table(storage, file.path, []).schema.metadata or {}
            context.log.append(files, metadata.get(TALLY, b"{}"))
            tally.add(metadata.get(TALLY, b"{}"))
    return known.plus(unknown)


class _Tally:
    """Metrics of a stage's shards, the reasons for which it refused rows, and some of them."""

    def __init__(self) -> None:
        self.metrics: Counter[str] = Counter()
        self.highest: dict[str, float] = {}
        self.reasons: Counter[str] = Counter()
        self.examples: list[Reject] = []

    @staticmethod
    def of(output: StageOutput) -> bytes:
        """Returns the tally of one shard, as JSON."""
        refused = [*output.rejects, *output.unusable]
        reasons = Counter(reason for _, reason, _ in refused)
        rows = {
            "metrics": dict(output.metrics),
            "highest": dict(output.highest),
            "reasons": reasons,
            "examples": refused[:3],
        }
        return json.dumps(rows, allow_nan=False).encode()

    def add(self, content: bytes) -> None:
        """Adds the tally of one shard."""
        rows = json.loads(content)
        self.metrics.update(rows.get("metrics", {}))
        for name, value in rows.get("highest", {}).items():
            self.highest[name] = max(value, self.highest.get(name, value))
        self.reasons.update(rows.get("reasons", {}))
        self.examples += [tuple(row) for row in rows.get("examples", [])][: 3 - len(self.examples)]

    def check(self, limit: Limit | None, context: StepContext) -> None:
        """Raises TooManyRejects once the limit is broken, whatever the shards still to come."""
        if limit is not None and self.reasons.total() > limit.share * limit.num_all:
            raise TooManyRejects.of(
                context.storage.uri.rpartition("/")[2],
                self.reasons,
                self.examples,
                f"accepted is a share of {limit.share} of {limit.num_all}: {limit.remedy}",
            )


class _ShardWorker:
    """The actor: loads the stage once, then turns shard after shard."""

    def __init__(self, stage: Stage, source: Artifact, target: Storage) -> None:
        actor_begins(target, _ACTORS)
        self.stage, self.source, self.target = stage, source, target
        self.transform = stage.load()
        self.num_deaths = 0
        self.reloading = asyncio.Lock()

    async def __call__(self, batch: dict[str, Any]) -> Any:
        """Commits the output of the one shard in `batch`; its rejects first, itself last."""
        shard = FileEntry(**json.loads(batch["shard"][0]))
        number = shard_number(shard.path)
        # In threads, so that other shards in flight go on meanwhile.
        table = await asyncio.to_thread(self.source.shard, shard, list(self.stage.columns))
        output = await self._transformed(table)
        expected = table.num_rows * self.stage.rows_per_row
        if output.rows.num_rows + len(output.rejects) != expected:
            raise TokayError(
                f"{type(self.stage).__name__} lost rows of {shard.path}: {expected} expected,"
                f" {output.rows.num_rows} out, {len(output.rejects)} refused"
            )
        files = await asyncio.to_thread(write_rejects, self.target, output.rejects, number)
        tally = _Tally.of(output)
        rows = output.rows.replace_schema_metadata({TALLY: tally})
        files.append(await asyncio.to_thread(write_table, self.target, shard_path(number), rows))
        described = json.dumps([asdict(file) for file in files]).encode()
        yield {"num_rows": [table.num_rows], "tally": [tally], "files": [described]}

    async def _transformed(self, table: pa.Table) -> StageOutput:
        """Transforms a shard; loads the stage again when its engine has died, MAX_DEATHS times."""
        while True:
            transform = self.transform
            try:
                return await transform(table)
            except EngineDied:
                async with self.reloading:
                    if self.transform is transform:  # the first of the shards in flight reloads
                        self.num_deaths += 1
                        if self.num_deaths > MAX_DEATHS:
                            raise
                        self.transform = self.stage.load()
