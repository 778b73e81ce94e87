"""A step's whole work as one Ray task, on a node that has what it needs: the driver only listens.

For steps that hold a model and are no transformation of shards. The driver may sit on a small head
without a GPU; what it gets is the metrics, and how far the task is.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster.actor_health import actor_begins, clear_actors, report_waiting
from cluster.artifacts import Artifact, Json
from cluster.errors import StorageError, TokayError
from cluster.ray_errors import reported_error
from cluster.stages import StageResources
from cluster.steps import Progress, StepContext
from cluster.storage import Storage

_KIND, _PROGRESS = "task", "work/progress.json"
_LOOK_EVERY_S = 1.0

Work = Callable[[StepContext], dict[str, Json]]


def run_in_task(work: Work, context: StepContext, resources: StageResources) -> dict[str, Json]:
    """Does a step's work in a Ray task; returns its metrics.

    The task has a process of its own, and a context with the same folder and inputs. It runs again
    if its node is lost, and a few times if it dies on one that is not: what it writes has to be the
    same then. Where Ray does not run, as in a unit test, this process does the work itself.

    Args:
        work: Is pickled; what it needs of a recipe, it brings along.
        context: The step's.
        resources: That the task asks for, as an actor of a stage would.

    Raises:
        TokayError: The work failed, with an error of ours or another; or its process died again and
            again.
    """
    import ray

    if not ray.is_initialized():
        return work(context)
    clear_actors(context.storage, _KIND)
    context.storage.delete(_PROGRESS)
    attempt: Any = ray.remote(
        num_cpus=resources.num_cpus,
        num_gpus=resources.num_gpus,
        resources=resources.custom,
        max_calls=1,  # its memory is free when it ends
        max_retries=-1,  # `actor_begins` counts the deaths
    )(_attempt)
    reference = attempt.remote(
        work, context.storage, context.inputs, resources.num_cpus, str(Path.cwd())
    )
    told: tuple[float, float | None, str] = (0, None, "")
    try:
        with report_waiting(context, _KIND, 1, resources.needs, lambda: told[:2]):
            while not ray.wait([reference], timeout=_LOOK_EVERY_S)[0]:
                if (now := _read_progress(context.storage) or told) != told:
                    told = now
                    context.progress.update(*told)
    except BaseException:
        # Never once it has ended: Ray 2.60 ends the driver where both meet in its books.
        ray.cancel(reference)
        raise
    try:
        metrics: dict[str, Json] = ray.get(reference)
        return metrics
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, TokayError):
            raise cause from error
        raise reported_error(str(error), "the step's Ray task failed") from error


def _attempt(
    work: Work, storage: Storage, inputs: dict[str, Artifact], num_cpus: float, folder: str
) -> dict[str, Json]:
    actor_begins(storage, _KIND)
    with suppress(OSError):  # of a node without this folder
        os.chdir(folder)  # a relative path of a recipe is the driver's
    if num_cpus <= 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        # Set by Ray. Steps run one at a time, so this one may have the cores of its node.
        os.environ["OMP_NUM_THREADS"] = str(os.cpu_count())
    with _written_progress(storage) as progress:
        context = StepContext(storage=storage, inputs=inputs, progress=progress)
        try:
            return work(context)
        finally:
            context.log.flush()


class _Latest:
    """Progress of which the last report alone is kept."""

    def __init__(self) -> None:
        self.report: tuple[float, float | None, str] | None = None

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        self.report = done, total, note


@contextmanager
def _written_progress(storage: Storage) -> Iterator[Progress]:
    """Gives a progress that is written where the driver looks for it, until the block ends."""
    latest, ended = _Latest(), threading.Event()

    def write() -> None:
        written = None
        while not ended.wait(_LOOK_EVERY_S):
            if (report := latest.report) != written:
                with suppress(StorageError):  # the work will fail with it, if it lasts
                    storage.write_bytes(_PROGRESS, json.dumps(report).encode())
                    written = report

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield latest
    finally:
        ended.set()
        thread.join()


def _read_progress(storage: Storage) -> tuple[float, float | None, str] | None:
    try:
        done, total, note = json.loads(storage.read_bytes(_PROGRESS))
    except (FileNotFoundError, StorageError):  # as above
        return None
    return done, total, note
