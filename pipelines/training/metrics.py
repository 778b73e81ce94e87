"""What training says while it runs: metrics.jsonl, and TensorBoard, MLflow or W&B beside it."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from cluster.errors import UserError
from cluster.storage import Storage

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
_FLUSH_S = 1.0

# Numbers, and the name of the batch's data set.
MetricsRow = dict[str, Any]


class Tracker(Protocol):
    """Where rows go beside metrics.jsonl."""

    def log(self, row: MetricsRow) -> None:
        """Takes one batch's row."""

    def flush(self) -> None:
        """Makes the rows so far readable to others."""


class MetricsLog:
    """The rows of metrics.jsonl, each batch once, readable while the training runs."""

    def __init__(self, storage: Storage, done: int, tracking: Iterable[str]) -> None:
        """Goes on after `done` batches; trackers begin anew with the rows that are kept."""
        self._storage = storage
        self._rows = [row for row in read_metrics(storage) if row["batch"] < done]
        self._trackers = [_TRACKERS[name](storage) for name in tracking]
        for row in self._rows:
            self._track(row)
        self._flushed = 0.0
        self._pause_s = _FLUSH_S

    def append(self, row: MetricsRow, *, flush: bool) -> None:
        """Adds a row, and writes the file now and then; storage has no append."""
        self._rows.append(row)
        self._track(row)
        start = time.monotonic()
        if flush or start - self._flushed > self._pause_s:
            lines = "".join(json.dumps(row) + "\n" for row in self._rows)
            self._storage.write_bytes(METRICS, lines.encode())
            for tracker in self._trackers:
                tracker.flush()
            self._flushed = time.monotonic()
            self._pause_s = max(_FLUSH_S, 50 * (self._flushed - start))

    def _track(self, row: MetricsRow) -> None:
        for tracker in self._trackers:
            tracker.log(row)


def read_metrics(storage: Storage) -> list[MetricsRow]:
    """Returns what metrics.jsonl holds, nothing if it is not there yet."""
    try:
        content = storage.read_bytes(METRICS)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in content.splitlines()]


def scalars(row: MetricsRow) -> dict[str, float]:
    """Returns a row's numbers as ``training/NAME``, the loss also by data set."""
    found = {
        f"training/{name}": value
        for name, value in row.items()
        if name not in ("batch", "dataset") and value is not None
    }
    return found | {f"loss/{row['dataset']}": row["loss"]}


class _TensorBoard:
    """Event files, written here and copied to the storage."""

    def __init__(self, storage: Storage) -> None:
        from tensorboardX import SummaryWriter

        storage.delete(TENSORBOARD)
        self._storage = storage
        self._folder = tempfile.TemporaryDirectory()
        self._writer = SummaryWriter(self._folder.name)

    def log(self, row: MetricsRow) -> None:
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row["batch"])

    def flush(self) -> None:
        self._writer.flush()
        for file in Path(self._folder.name).iterdir():
            self._storage.upload(file, f"{TENSORBOARD}/{file.name}")


class _MLflow:
    """A run of the server that MLFLOW_TRACKING_URI names."""

    def __init__(self, storage: Storage) -> None:
        try:
            import mlflow  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:
            raise _missing("mlflow") from error
        self._mlflow = mlflow
        mlflow.start_run(run_name=storage.uri)

    def log(self, row: MetricsRow) -> None:
        self._mlflow.log_metrics(scalars(row), step=row["batch"])

    def flush(self) -> None:
        """MLflow has them already."""


class _Wandb:
    """A run of Weights & Biases, whose key WANDB_API_KEY holds."""

    def __init__(self, storage: Storage) -> None:
        try:
            import wandb  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:
            raise _missing("wandb") from error
        self._run = wandb.init(project="tokay", name=storage.uri)

    def log(self, row: MetricsRow) -> None:
        self._run.log(scalars(row), step=row["batch"])

    def flush(self) -> None:
        """Weights & Biases has them already."""


_TRACKERS: dict[str, Any] = {"tensorboard": _TensorBoard, "mlflow": _MLflow, "wandb": _Wandb}


def _missing(package: str) -> UserError:
    return UserError(
        f"training.tracking names {package}, which is not installed on the training nodes:"
        f" pip install {package}, or take it out"
    )


def recent_loss(rows: Sequence[MetricsRow], num_batches: int = 20) -> float:
    """Returns the mean loss of the last batches."""
    tail = [row["loss"] for row in rows[-num_batches:]]
    return float(sum(tail) / len(tail))
