"""Training through Ray Train: workers, restarts, live progress, and one line when it fails."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from traceback import format_exception

from cluster.errors import TokayError
from cluster.ray_errors import reported_error
from cluster.steps import Progress
from cluster.storage import Storage, open_storage
from pipelines.training.checkpoint import WORK
from pipelines.training.config import TrainerConfig
from pipelines.training.metrics import MetricsRow, read_metrics, recent_loss
from pipelines.training.trainer import Job
from pipelines.training.worker import train_worker

_LOOK_EVERY_S = 1.0


def train(job: Job, *, scratch: str, progress: Progress | None = None) -> list[MetricsRow]:
    """Trains the student on all batches, going on from the last checkpoint in the job's output.

    Ray must be connected. The output gets ``encoder/``, ``metrics.jsonl`` and, while it runs,
    ``work/checkpoints/``. Every node reaches the job's folders, and `scratch`, a folder for Ray
    Train's own files. `progress` receives the number of batches done.

    Returns:
        A row for each batch: batch, dataset, loss, learning_rate, gradient_norm, examples_per_s,
        tokens_per_s, padding_share (of rank 0's passes); where there is a gradient cache,
        gradient_cache_tokens, and out_of_memory 1 where it was made smaller; and where it was
        validated, validation_loss and validation_ndcg_at_10.

    Raises:
        UserError: The student does not load, or does not fit in a worker's memory.
        TokayError: A worker failed more than ``max_failures`` times.
    """
    from ray.train import (
        FailureConfig,
        LoggingConfig,
        RunConfig,
        ScalingConfig,
        TrainingFailedError,
    )
    from ray.train.torch import TorchTrainer

    config, storage = job.config, open_storage(job.output)
    num_workers: int | tuple[int, int] = config.num_workers
    if config.min_workers is not None:  # the fewest and the most
        num_workers = config.min_workers, config.num_workers
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=config.use_gpu,
            resources_per_worker=_worker_resources(config),
        ),
        run_config=RunConfig(
            name=f"training-{uuid.uuid4().hex[:8]}",
            storage_path=open_storage(scratch).uri,
            failure_config=FailureConfig(max_failures=config.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    with _followed(storage, job.num_batches, progress):
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise _cause(error) from error
    storage.delete(WORK)
    return read_metrics(storage)


def _worker_resources(config: TrainerConfig) -> dict[str, float]:
    resources = {"GPU": 1.0} if config.use_gpu else {"CPU": 1.0}
    if config.node_resource:
        resources[config.node_resource] = 1.0
    return resources


def _cause(error: BaseException) -> TokayError:
    """Returns the reason of the first worker that has one of ours, or else of the first."""
    failures = sorted(getattr(error, "worker_failures", {}).items(), reverse=True)
    # Not of the error's own text, which Ray cuts in its middle.
    reports = [line for _, failure in failures for line in format_exception(failure)]
    where = f" on worker {failures[-1][0]}" if failures else ""
    return reported_error("".join(reports) or str(error), f"training failed{where}")


def _note(rows: Sequence[MetricsRow]) -> str:
    """Returns the loss, and how much of a batch is in memory at once where it is not all of it."""
    note = f"loss {recent_loss(rows):.3f}"
    tokens = rows[-1].get("gradient_cache_tokens") if rows else None
    times = sum(row.get("out_of_memory", 0) for row in rows)
    if times:
        note += f", ran out of memory in {times} batch{'es' if times > 1 else ''}"
    return note + (f", gradient cache of {tokens:,} tokens" if tokens else "")


@contextmanager
def _followed(storage: Storage, total: int, progress: Progress | None) -> Iterator[None]:
    """Reports to `progress` what rank 0 has written, until the block ends."""
    if progress is None:
        yield
        return
    done = threading.Event()
    shown = 0

    def report() -> None:
        nonlocal shown
        rows = read_metrics(storage)
        if len(rows) != shown:
            shown = len(rows)
            progress.update(len(rows), total, _note(rows))

    def follow() -> None:
        while not done.wait(_LOOK_EVERY_S):
            report()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
        report()
    finally:
        done.set()
        thread.join()
