"""What MLflow and Weights & Biases are told; by the real libraries where they are there."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from cluster.storage import Storage, open_storage
from pipelines.training import metrics
from pipelines.training.metrics import RUNS, MetricsLog, MetricsRow, read_metrics

PARAMETERS = {"epochs": 3, "loss": {"temperature": 0.05, "matryoshka_dimensions": [128]}}


def row(batch: int) -> MetricsRow:
    return {"batch": batch, "dataset": "fret (é)", "loss": 1 / (batch + 1), "examples_per_s": 9.0}


class Remembering:
    """A tracker that keeps what it is told."""

    made: list["Remembering"] = []  # noqa: RUF012

    def __init__(self, storage: Storage, parameters: dict[str, Any], run_id: str | None) -> None:
        self.parameters, self.given = parameters, run_id
        self.run_id = run_id or f"run {len(self.made)}"
        self.batches: list[int] = []
        self.closed = False
        self.made.append(self)

    def log(self, row: MetricsRow) -> None:
        self.batches.append(row["batch"])

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def test_tracker_goes_on_with_its_run_and_another_begins_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Remembering] = []
    monkeypatch.setattr(Remembering, "made", made)
    monkeypatch.setattr(metrics, "_TRACKERS", dict.fromkeys(("mlflow", "wandb"), Remembering))
    storage = open_storage(tmp_path)
    killed = MetricsLog(storage, 0, ["mlflow"], PARAMETERS)
    for batch in range(5):
        killed.append(row(batch), flush=True)
    assert made[0].parameters == {
        "epochs": 3,
        "loss.temperature": 0.05,
        "loss.matryoshka_dimensions": [128],
    }
    log = MetricsLog(storage, 3, ["mlflow", "wandb"])
    log.append(row(3), flush=True)
    log.close()
    assert [each.given for each in made] == [None, "run 0", None]
    assert json.loads((tmp_path / RUNS).read_text()) == {"mlflow": "run 0", "wandb": "run 2"}
    assert made[1].batches == made[2].batches == [0, 1, 2, 3]
    assert [each.closed for each in made] == [False, True, True]
    assert [each["batch"] for each in read_metrics(storage)] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_tracker_that_is_not_installed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"names {name}, .* pip install {name}, or take it out"):
        MetricsLog(open_storage(tmp_path), 0, [name])


def test_mlflow_without_an_address_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI is not set"):
        MetricsLog(open_storage(tmp_path), 0, ["mlflow"])


def killed_and_gone_on(tracker: str, folder: Path, **environment: str) -> None:
    """Trains nine batches, is killed, and goes on after the sixth until twelve are done."""
    code = (
        f"import json, os, sys; sys.path.insert(0, {str(Path(__file__).parent)!r});"
        "from test_tracking import *; tracker, done, end = sys.argv[1], *map(int, sys.argv[2:]);"
        "log = MetricsLog(open_storage('out'), done, [tracker], PARAMETERS);"
        "[log.append(row(batch), flush=batch % 3 == 2) for batch in range(done, end)];"
        "end == 12 or os.kill(os.getpid(), signal.SIGKILL); log.close()"
    )
    for arguments, ended in (((0, 9), -signal.SIGKILL), ((6, 12), 0)):
        command = [sys.executable, "-c", code, tracker, *map(str, arguments)]
        paths = os.pathsep.join(filter(None, (str(Path.cwd()), os.environ.get("PYTHONPATH"))))
        given = {**os.environ, "PYTHONPATH": paths, **environment}
        process = subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True)
        assert process.returncode == ended, process.stderr


def test_mlflow_run_holds_every_batch_once_after_a_kill(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = f"file://{tmp_path}/mlruns"
    environment = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_ALLOW_FILE_STORE": "true"}
    killed_and_gone_on("mlflow", tmp_path, **environment)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        client = mlflow.MlflowClient(uri)
        (run,) = client.search_runs(["0"])
        history = client.get_metric_history(run.info.run_id, "training/loss")
    assert run.info.status == "FINISHED"
    assert run.data.params["loss.temperature"] == "0.05"
    assert {each.step: each.value for each in history} == {
        batch: pytest.approx(1 / (batch + 1)) for batch in range(12)
    }
    assert len(history) == 12
    assert "loss/fret _é_" in run.data.metrics


def test_wandb_goes_on_with_its_run_after_a_kill(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    killed_and_gone_on("wandb", tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
    run_id = json.loads((tmp_path / "out" / RUNS).read_text())["wandb"]
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{run_id}.wandb"] * 2
    # The second holds all batches: offline, a crash may lose what the first has not yet written.
    assert files[1].read_bytes().count(b"training/examples_per_s") >= 12
