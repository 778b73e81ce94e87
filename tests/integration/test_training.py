import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from actors.encoder import Encoder, cut_layers
from cluster.artifacts import shard_path
from cluster.errors import UserError
from cluster.storage import open_storage, write_table
from pipelines.records import EXAMPLE
from pipelines.training.config import TrainingConfig
from pipelines.training.train import train
from pipelines.training.worker import read_metrics

pytestmark = pytest.mark.slow

BATCH_SIZE, NUM_BATCHES = 16, 16
CONFIG = TrainingConfig(
    batch_size=BATCH_SIZE,
    num_workers=2,
    max_query_tokens=32,
    max_passage_tokens=48,
    checkpoint_every_batches=4,
    max_failures=0,
)


@pytest.fixture(scope="module")
def examples(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Title -> text pairs of Cranfield, two epochs of 128; half with a random negative."""
    folder = tmp_path_factory.mktemp("examples")
    lines = (data_folder / "retrieval/cranfield/corpus.jsonl").read_text().splitlines()
    documents = [row for row in map(json.loads, lines) if row["title"] and row["text"]][:136]
    rng, rows = np.random.default_rng(0), []
    for epoch in range(2):
        for place, number in enumerate(rng.permutation(128)):
            document = documents[number]
            rows.append(
                {
                    "batch": epoch * 8 + place // BATCH_SIZE,
                    "dataset": "cranfield",
                    "query": document["title"],
                    "positive": document["text"],
                    "negative": documents[number + 8]["text"] if number % 2 else None,
                    "query_id": document["_id"],
                    "positive_id": document["_id"],
                    "symmetric": False,
                }
            )
    storage = open_storage(folder)
    for shard in range(4):
        part = rows[shard * 64 : (shard + 1) * 64]
        write_table(storage, shard_path(shard), pa.Table.from_pylist(part, schema=EXAMPLE))
    return str(folder)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("student")
    encoder = Encoder.load("embedded:all-MiniLM-L6-v2", device="cpu")
    cut_layers(encoder, [0, 2, 5]).save(folder, model_card="")
    return str(folder)


class Told:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.updates: list[tuple[float, float | None]] = []

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        self.updates.append((done, total))


def mean_loss(rows: list[dict[str, float]]) -> float:
    return float(np.mean([row["loss"] for row in rows]))


@pytest.fixture(scope="module")
def without_dropout(
    ray_session: None, examples: str, student: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, float]]]:
    """A training by two workers, deterministic but for rounding."""
    folder = tmp_path_factory.mktemp("two-workers")
    config = CONFIG.model_copy(update={"dropout": False})
    rows = train(
        config,
        examples=examples,
        student=student,
        output=str(folder / "output"),
        scratch=str(folder / "scratch"),
    )
    return folder / "output", rows


def test_training_lowers_the_loss_and_tells_its_progress(
    ray_session: None, examples: str, student: str, tmp_path: Path
):
    told = Told()
    rows = train(
        CONFIG,
        examples=examples,
        student=student,
        output=str(tmp_path / "output"),
        scratch=str(tmp_path / "scratch"),
        progress=told,
    )
    assert [row["batch"] for row in rows] == list(range(NUM_BATCHES))
    assert mean_loss(rows[-4:]) < 0.7 * mean_loss(rows[:4])
    assert told.updates[-1] == (NUM_BATCHES, NUM_BATCHES)
    trained = Encoder.load(str(tmp_path / "output/encoder"), device="cpu")
    start = Encoder.load(student, device="cpu")
    assert not np.allclose(trained.encode(["wing"]), start.encode(["wing"]), atol=1e-3)
    assert not (tmp_path / "output/work/checkpoints").exists()


def test_one_worker_trains_as_two_do(
    without_dropout: tuple[Path, list[dict[str, float]]],
    examples: str,
    student: str,
    tmp_path: Path,
):
    output, rows = without_dropout
    config = CONFIG.model_copy(update={"dropout": False, "num_workers": 1})
    alone = train(
        config,
        examples=examples,
        student=student,
        output=str(tmp_path / "output"),
        scratch=str(tmp_path / "scratch"),
    )
    losses = [[row["loss"] for row in found] for found in (rows, alone)]
    np.testing.assert_allclose(*losses, rtol=1e-3)
    texts = ["boundary layer", "supersonic flow over a wing"]
    vectors = [
        Encoder.load(str(folder / "encoder"), device="cpu").encode(texts)
        for folder in (output, tmp_path / "output")
    ]
    assert (vectors[0] * vectors[1]).sum(1).min() > 0.9999


PROGRAM = """
import sys
from cluster.session import connect
from pipelines.training.config import TrainingConfig
from pipelines.training.train import train

connect()
config, examples, student, output, scratch = sys.argv[1:]
train(
    TrainingConfig.model_validate_json(config),
    examples=examples, student=student, output=output, scratch=scratch,
)
"""


def test_killed_training_goes_on_and_ends_like_an_unkilled_one(
    without_dropout: tuple[Path, list[dict[str, float]]],
    examples: str,
    student: str,
    tmp_path: Path,
):
    output = tmp_path / "output"
    config = CONFIG.model_copy(update={"dropout": False})
    arguments = [config.model_dump_json(), examples, student, output, tmp_path / "scratch"]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)], start_new_session=True
    )
    storage = open_storage(output)
    deadline = time.monotonic() + 240
    while not storage.list("work/checkpoints"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    began_again = read_metrics(storage)
    assert len(began_again) < NUM_BATCHES
    rows = train(
        config,
        examples=examples,
        student=student,
        output=str(output),
        scratch=str(tmp_path / "scratch"),
    )
    assert [row["batch"] for row in rows] == list(range(NUM_BATCHES))
    assert rows[:4] == began_again[:4]  # not trained again: even the speed is the same
    losses = [[row["loss"] for row in found] for found in (rows, without_dropout[1])]
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_student_that_does_not_load_is_the_users_error(
    ray_session: None, examples: str, tmp_path: Path
):
    (tmp_path / "student").mkdir()
    (tmp_path / "student/config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        train(
            CONFIG,
            examples=examples,
            student=str(tmp_path / "student"),
            output=str(tmp_path / "output"),
            scratch=str(tmp_path / "scratch"),
        )
