"""What training reports as it runs: metrics.jsonl, and TensorBoard, MLflow or W&B beside it."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from cluster.errors import UserError
from cluster.plain_json import dump_json
from cluster.storage import Storage

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
# Which run of each tracker this training has, to go on with it after a crash.
RUNS = "tracking.json"
_FLUSH_S = 1.0

# Numbers, and the name of the batch's data set.
MetricsRow = dict[str, Any]


class Tracker(Protocol):
    """Where rows go beside metrics.jsonl.

    Attributes:
        run_id: Identifies the run after a restart; None where every process begins a new one.
    """

    run_id: str | None

    def log(self, row: MetricsRow) -> None:
        """Takes one batch's row."""

    def flush(self) -> None:
        """Makes the rows so far readable to others."""

    def close(self) -> None:
        """Ends the run: no row will follow."""


class MetricsLog:
    """The rows of metrics.jsonl, each batch once, readable while the training runs."""

    def __init__(
        self,
        storage: Storage,
        done: int,
        tracking: Iterable[str],
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        """Goes on after `done` batches; rows of later ones are dropped.

        A tracker that has a run of this training goes on with it, and any other shows the training
        `parameters` in a new one. Each is given the rows that are kept, and skips those it has.

        Raises:
            UserError: A tracker is not installed, or does not know where its runs go.
        """
        self._storage = storage
        self._rows = [row for row in read_metrics(storage) if row["batch"] < done]
        self._trackers: list[Tracker] = []
        begun: dict[str, str] = json.loads(_content(storage, RUNS) or b"{}")
        runs = dict(begun)
        for name in tracking:
            tracker: Tracker = _TRACKERS[name](storage, flat(parameters or {}), begun.get(name))
            self._trackers.append(tracker)
            if tracker.run_id:
                runs[name] = tracker.run_id
            for row in self._rows:
                tracker.log(row)
        if runs != begun:
            storage.write_bytes(RUNS, dump_json(runs).encode())
        self._flushed = 0.0
        self._pause_s = _FLUSH_S

    def append(self, row: MetricsRow, *, flush: bool) -> None:
        """Adds a row, and writes the file now and then; storage has no append."""
        self._rows.append(row)
        for tracker in self._trackers:
            tracker.log(row)
        start = time.monotonic()
        if flush or start - self._flushed > self._pause_s:
            lines = "".join(dump_json(row) + "\n" for row in self._rows)
            self._storage.write_bytes(METRICS, lines.encode())
            for tracker in self._trackers:
                tracker.flush()
            self._flushed = time.monotonic()
            self._pause_s = max(_FLUSH_S, 50 * (self._flushed - start))

    def close(self) -> None:
        """Ends the trackers' runs; call when the training is done, and only then."""
        for tracker in self._trackers:
            tracker.flush()
            tracker.close()


def read_metrics(storage: Storage) -> list[MetricsRow]:
    """Returns the rows of metrics.jsonl, none if it is not there yet.

    A value that was not a number (the training diverged) is None.
    """
    return [json.loads(line) for line in _content(storage, METRICS).splitlines()]


def scalars(row: MetricsRow) -> dict[str, float]:
    """Returns a row's numbers as ``training/NAME``, the loss also by data set."""
    values = {
        f"training/{name}": value
        for name, value in row.items()
        if name not in ("batch", "dataset") and value is not None
    }
    return values if row["loss"] is None else values | {f"loss/{row['dataset']}": row["loss"]}


def flat(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns ``{"loss": {"temperature": 1}}`` as ``{"loss.temperature": 1}``."""
    flattened: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            flattened |= flat(value, f"{prefix}{name}.")
        else:
            flattened[prefix + name] = value
    return flattened


def _content(storage: Storage, path: str) -> bytes:
    """Returns a file's bytes, none if it is not there."""
    try:
        return storage.read_bytes(path)
    except FileNotFoundError:
        return b""


class _TensorBoard:
    """Event files, written here and copied to the storage."""

    run_id = None

    def __init__(self, storage: Storage, parameters: dict[str, Any], run_id: str | None) -> None:
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

    def close(self) -> None:
        self._writer.close()


_MLFLOW_BATCH = 1000  # metrics that its server takes at once
_NOT_MLFLOW = re.compile(r"[^\w\-. :/]")  # in a metric's name


class _MLflow:
    """A run of the server that MLFLOW_TRACKING_URI names, in MLFLOW_EXPERIMENT_NAME if set."""

    def __init__(self, storage: Storage, parameters: dict[str, Any], run_id: str | None) -> None:
        mlflow = _library("mlflow")
        if not mlflow.is_tracking_uri_set():
            raise UserError(
                "training.tracking names mlflow, and MLFLOW_TRACKING_URI is not set on the training"
                " nodes: set it, or take mlflow out"
            )
        self._mlflow = mlflow
        try:
            self._client = mlflow.MlflowClient()
            run = mlflow.start_run(run_id=run_id, run_name=storage.uri)
        except mlflow.MlflowException as error:
            known = f"go on with run {run_id} of {RUNS}" if run_id else "begin a run"
            raise UserError(
                f"MLflow at {mlflow.get_tracking_uri()} cannot {known}"
                f" ({' '.join(str(error).split())}): correct that, or take mlflow out of"
                " training.tracking"
            ) from error
        self.run_id: str = run.info.run_id
        if run_id is None:
            mlflow.log_params(parameters)
        logged = self._client.get_metric_history(self.run_id, "training/loss") if run_id else ()
        self._first = max((metric.step + 1 for metric in logged), default=0)
        self._waiting: list[Any] = []

    def log(self, row: MetricsRow) -> None:
        if row["batch"] < self._first:
            return  # the run has it from before the crash
        now = round(time.time() * 1000)
        self._waiting += [
            self._mlflow.entities.Metric(_NOT_MLFLOW.sub("_", name), value, now, row["batch"])
            for name, value in scalars(row).items()
        ]

    def flush(self) -> None:
        for start in range(0, len(self._waiting), _MLFLOW_BATCH):
            self._client.log_batch(self.run_id, self._waiting[start : start + _MLFLOW_BATCH])
        self._waiting = []

    def close(self) -> None:
        self._mlflow.end_run()


class _Wandb:
    """A run of Weights & Biases, whose key WANDB_API_KEY holds; WANDB_MODE=offline needs none."""

    def __init__(self, storage: Storage, parameters: dict[str, Any], run_id: str | None) -> None:
        wandb = _library("wandb")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "tokay"),
                name=storage.uri,
                id=run_id,
                resume="allow" if run_id else None,
                config=parameters,
            )
        except wandb.Error as error:
            raise UserError(
                f"Weights & Biases cannot begin a run ({' '.join(str(error).split())}): set"
                " WANDB_API_KEY or WANDB_MODE=offline on the training nodes, or take wandb out of"
                " training.tracking"
            ) from error
        self.run_id: str = self._run.id
        # The next step of a resumed run; 0 offline, where a crash may have lost the earlier ones.
        self._first = self._run.step

    def log(self, row: MetricsRow) -> None:
        if row["batch"] >= self._first:
            self._run.log(scalars(row), step=row["batch"])

    def flush(self) -> None:
        """Weights & Biases has them already."""

    def close(self) -> None:
        self._run.finish()


_TRACKERS: dict[str, Any] = {"tensorboard": _TensorBoard, "mlflow": _MLflow, "wandb": _Wandb}


def _library(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise UserError(
            f"training.tracking names {package}, which is not installed on the training nodes:"
            f" pip install {package}, or take it out"
        ) from error


def recent_loss(rows: Sequence[MetricsRow], num_batches: int = 20) -> float:
    """Returns the mean loss of the last batches; NaN where one was not a number."""
    tail = [math.nan if row["loss"] is None else row["loss"] for row in rows[-num_batches:]]
    return float(sum(tail) / len(tail))
