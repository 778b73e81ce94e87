"""The step `queries` as a run has it, timed without the engine's start: what benchmarks compare."""

import time
from dataclasses import dataclass
from pathlib import Path

from cluster.artifacts import Artifact
from cluster.session import connect, disconnect
from cluster.stages import Stage, StageFunction, run_stage
from cluster.steps import StepContext
from cluster.storage import open_storage
from pipelines.fret.prompts import load_prompts
from pipelines.fret.queries import WriteQueries, query_prompts
from pipelines.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Stamped(Stage):
    """A stage that notes when its engine is up."""

    stage: Stage
    stamp: str

    def load(self) -> StageFunction:
        transform = self.stage.load()
        Path(self.stamp).write_text(str(time.time()), encoding="utf-8")
        return transform


class Quiet:
    """Progress that nobody watches."""

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        pass


def write_step(recipe: Recipe, seeds: Artifact, folder: Path) -> tuple[float, int]:
    """Runs the step in `folder`: Ray Data, an actor, shards read from and committed to disk.

    Returns its seconds from the moment the engine is up to the last shard's commit, and the tokens
    that were written.
    """
    stamp = folder / "engine-is-up"
    write = WriteQueries(
        config=recipe.queries,
        prompts=query_prompts(recipe.queries, load_prompts()),
        llm=recipe.llm,
        engine=recipe.resources.engine,
        resources=recipe.resources.llm,
    )
    stage = Stamped(stage=write, stamp=str(stamp), columns=write.columns, resources=write.resources)
    folder.mkdir(parents=True)
    storage = open_storage(str(folder))
    connect(folder / "logs")
    metrics = run_stage(stage, seeds, StepContext(storage=storage, inputs={}, progress=Quiet()))
    disconnect()
    end = max(file.stat().st_mtime for file in folder.glob("shards/*.parquet"))
    return end - float(stamp.read_text(encoding="utf-8")), int(metrics["num_written_tokens"])
