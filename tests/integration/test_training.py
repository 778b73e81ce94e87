import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest

from actors.encoder import Encoder
from cluster.errors import UserError
from cluster.file_list import shard_path
from cluster.storage import open_storage, write_table
from pipelines.records import EXAMPLE, FIXED_EXAMPLE
from pipelines.training.config import LossConfig, TrainingConfig
from pipelines.training.layers import cut_layers
from pipelines.training.metrics import read_metrics
from pipelines.training.train import train
from pipelines.training.trainer import Job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BATCH_SIZE, NUM_BATCHES = 16, 12
CONFIG = TrainingConfig(
    batch_size=BATCH_SIZE,
    num_workers=2,
    max_query_tokens=32,
    max_passage_tokens=32,
    dropout=False,
    checkpoint_every_batches=3,
    max_failures=0,
)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("student")
    encoder = Encoder.load("embedded:all-MiniLM-L6-v2", device="cpu")
    cut_layers(encoder, [0, 2, 5]).save(folder, model_card="")
    return str(folder)


@pytest.fixture(scope="module")
def examples(data_folder: Path, student: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Title -> text pairs of Cranfield, two epochs of 96; half with a random negative."""
    folder = tmp_path_factory.mktemp("examples")
    lines = (data_folder / "retrieval/cranfield/corpus.jsonl").read_text().splitlines()
    documents = [row for row in map(json.loads, lines) if row["title"] and row["text"]][:104]
    encoder = Encoder.load(student, device="cpu")
    titles = encoder.tokenize([document["title"] for document in documents], max_tokens=32)
    texts = encoder.tokenize([document["text"] for document in documents], max_tokens=32)
    rng, rows = np.random.default_rng(0), []
    for epoch in range(2):
        for place, number in enumerate(rng.permutation(96)):
            rows.append(
                {
                    "batch": epoch * 6 + place // BATCH_SIZE,
                    "dataset": "cranfield",
                    "query_tokens": titles[number],
                    "positive_tokens": texts[number],
                    "negative_tokens": [texts[number + 8]] if number % 2 else [],
                    "teacher_scores": [],
                    "query_id": documents[number]["_id"],
                    "positive_id": documents[number]["_id"],
                    "symmetric": False,
                }
            )
    storage = open_storage(folder)
    for shard in range(4):
        part = rows[shard * 48 : (shard + 1) * 48]
        write_table(storage, shard_path(shard), pa.Table.from_pylist(part, schema=EXAMPLE))
    return str(folder)


class Told:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.updates: list[tuple[float, float | None]] = []

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        self.updates.append((done, total))


def job(config: TrainingConfig, examples: str, student: str, output: Path | str) -> Job:
    return Job(
        config=config,
        examples=examples,
        student=student,
        output=str(output),
        num_batches=NUM_BATCHES,
    )


def mean_loss(rows: list[dict[str, float]]) -> float:
    return float(np.mean([row["loss"] for row in rows]))


@dataclass(frozen=True)
class Trained:
    """A training by two workers; without dropout, so that only rounding tells two apart."""

    output: Path
    rows: list[dict[str, float]]
    told: Told


@pytest.fixture(scope="module")
def trained(
    ray_session: None, examples: str, student: str, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    folder, told = tmp_path_factory.mktemp("two-workers"), Told()
    rows = train(
        job(CONFIG, examples, student, folder / "output"),
        scratch=str(folder / "scratch"),
        progress=told,
    )
    return Trained(folder / "output", rows, told)


def vectors(output: Path) -> np.ndarray:
    encoder = Encoder.load(str(output / "encoder"), device="cpu")
    return encoder.encode(["boundary layer", "supersonic flow over a wing"])


def test_training_lowers_the_loss_and_tells_its_progress(trained: Trained, student: str):
    assert [row["batch"] for row in trained.rows] == list(range(NUM_BATCHES))
    assert mean_loss(trained.rows[-4:]) < 0.7 * mean_loss(trained.rows[:4])
    assert trained.told.updates[-1] == (NUM_BATCHES, NUM_BATCHES)
    before = Encoder.load(student, device="cpu").encode(["boundary layer"])[0]
    assert vectors(trained.output)[0] @ before < 0.999
    assert not (trained.output / "work/checkpoints").exists()


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"num_workers": 1, "min_workers": 1}, id="one"),
        pytest.param({"sharding": "fsdp2"}, id="fsdp2", marks=pytest.mark.chaos),
    ],
)
def test_one_worker_and_sharded_ones_train_as_two_do(
    settings: dict[str, object],
    trained: Trained,
    examples: str,
    student: str,
    tmp_path: Path,
):
    rows = train(
        job(CONFIG.model_copy(update=settings), examples, student, tmp_path / "output"),
        scratch=str(tmp_path / "scratch"),
    )
    losses = [[row["loss"] for row in found] for found in (rows, trained.rows)]
    np.testing.assert_allclose(*losses, rtol=1e-3)
    assert (vectors(tmp_path / "output") * vectors(trained.output)).sum(1).min() > 0.9999


NUM_LISTS, LIST_SIZE = 24, 8


def test_lists_of_scored_passages_teach_their_order(
    ray_session: None, data_folder: Path, student: str, tmp_path: Path
):
    """The teacher orders each title's own text first, and seven others at random."""
    lines = (data_folder / "retrieval/cranfield/corpus.jsonl").read_text().splitlines()
    documents = [row for row in map(json.loads, lines) if row["title"] and row["text"]]
    documents = documents[: NUM_LISTS + LIST_SIZE]
    before = Encoder.load(student, device="cpu")
    titles = before.tokenize([document["title"] for document in documents], max_tokens=32)
    texts = before.tokenize([document["text"] for document in documents], max_tokens=32)
    rng, rows = np.random.default_rng(0), []
    for number in range(NUM_LISTS):
        others = rng.permutation(np.arange(number + 1, number + LIST_SIZE))
        rows.append(
            {
                "dataset": "fret",
                "query_tokens": titles[number],
                "positive_tokens": texts[number],
                "negative_tokens": [texts[other] for other in others],
                "teacher_scores": np.linspace(2, -2, LIST_SIZE),
                "query_id": documents[number]["_id"],
                "positive_id": documents[number]["_id"],
                "symmetric": False,
            }
        )
    size = 2 * NUM_LISTS // NUM_BATCHES  # two epochs
    epochs = [row | {"batch": place // size} for place, row in enumerate(rows + rows)]
    examples = open_storage(tmp_path / "examples")
    write_table(examples, shard_path(0), pa.Table.from_pylist(epochs, schema=EXAMPLE))
    loss = LossConfig(
        contrastive_weight=0,
        distillation_weight=1,
        teacher_temperature=1,
        student_temperature=0.05,
    )
    config = CONFIG.model_copy(update={"batch_size": size, "loss": loss, "learning_rate": 3e-4})
    told = train(
        job(config, examples.uri, student, tmp_path / "output"),
        scratch=str(tmp_path / "scratch"),
    )

    def similarities(encoder: Encoder) -> np.ndarray:
        lists = [[row["positive_tokens"], *row["negative_tokens"]] for row in rows]
        queries = encoder.embed_tokens([row["query_tokens"] for row in rows]).detach().numpy()
        near = [encoder.embed_tokens(passages).detach().numpy() for passages in lists]
        return np.einsum("qd,qpd->qp", queries, np.stack(near))

    def softmax(scores: np.ndarray) -> np.ndarray:
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)

    def agreement(found: np.ndarray) -> float:
        pairs = list(combinations(range(LIST_SIZE), 2))
        return float(np.mean([found[:, a] > found[:, b] for a, b in pairs]))

    start = similarities(before)
    wanted, found = softmax(np.linspace(2, -2, LIST_SIZE)), softmax(start[:size] / 0.05)
    divergence = (wanted * np.log(wanted / found)).sum(1).mean()
    assert told[0]["loss"] == pytest.approx(divergence, rel=1e-3)
    end = similarities(Encoder.load(str(tmp_path / "output/encoder"), device="cpu"))
    assert agreement(end) > agreement(start) + 0.05
    assert mean_loss(told[NUM_BATCHES // 2 :]) < mean_loss(told[: NUM_BATCHES // 2])


def test_lists_of_fixed_passages_teach_their_order(
    ray_session: None, data_folder: Path, student: str, tmp_path: Path
):
    """As above, by two workers; the passages keep the student's own vectors of whole texts."""
    lines = (data_folder / "retrieval/cranfield/corpus.jsonl").read_text().splitlines()
    documents = [row for row in map(json.loads, lines) if row["title"] and row["text"]]
    documents = documents[: NUM_LISTS + LIST_SIZE]
    before = Encoder.load(student, device="cpu")
    titles = before.tokenize([document["title"] for document in documents], max_tokens=32)
    texts = before.tokenize([document["text"] for document in documents], max_tokens=64)
    stored = before.embed_tokens(texts).detach().numpy().astype(np.float16)
    rng, rows, places = np.random.default_rng(0), [], []
    for number in range(NUM_LISTS):
        places.append([number, *rng.permutation(np.arange(number + 1, number + LIST_SIZE))])
        rows.append(
            {
                "dataset": "fret",
                "tokens": titles[number],
                "query_id": documents[number]["_id"],
                "teacher_scores": np.linspace(2, -2, LIST_SIZE),
                "vectors": stored[places[-1]].tobytes(),
            }
        )
    size, epochs = 2 * NUM_LISTS // NUM_BATCHES, []  # two epochs
    for batch in range(NUM_BATCHES):
        epochs += [row | {"batch": batch} for row in (rows + rows)[size * batch :][:size]]
        for place in rng.integers(len(texts), size=3):
            own = {"tokens": texts[place], "vectors": stored[place].tobytes()}
            epochs.append(own | {"batch": batch, "dataset": "passages", "teacher_scores": []})
    examples = open_storage(tmp_path / "examples")
    write_table(examples, shard_path(0), pa.Table.from_pylist(epochs, schema=FIXED_EXAMPLE))
    loss = LossConfig(contrastive_weight=0, distillation_weight=1, teacher_temperature=1)
    config = CONFIG.model_copy(update={"batch_size": size, "loss": loss, "learning_rate": 3e-4})
    told = train(
        job(config, examples.uri, student, tmp_path / "output"),
        scratch=str(tmp_path / "scratch"),
    )
    after = Encoder.load(str(tmp_path / "output/encoder"), device="cpu")

    def similarities(encoder: Encoder) -> np.ndarray:
        queries = encoder.embed_tokens([row["tokens"] for row in rows]).detach().numpy()
        return np.einsum("qd,qpd->qp", queries, stored[np.array(places)])

    def log_softmax(scores: np.ndarray) -> np.ndarray:
        return scores - np.log(np.exp(scores).sum(-1, keepdims=True))

    def agreement(found: np.ndarray) -> float:
        pairs = list(combinations(range(LIST_SIZE), 2))
        return float(np.mean([found[:, a] > found[:, b] for a, b in pairs]))

    start, wanted = similarities(before), log_softmax(np.linspace(2, -2, LIST_SIZE))
    divergences = (np.exp(wanted) * (wanted - log_softmax(start[:size] / 0.05))).sum(1)
    # At first no passage has moved, but for what float16 takes from its vector.
    assert told[0]["loss"] == pytest.approx(divergences.mean(), abs=0.02)
    assert agreement(similarities(after)) > agreement(start) + 0.05
    assert mean_loss(told[NUM_BATCHES // 2 :]) < mean_loss(told[: NUM_BATCHES // 2])
    kept = (after.embed_tokens(texts).detach().numpy() * stored).sum(1)
    assert kept.mean() > 0.93


PROGRAM = """
import sys
from cluster.session import connect
from pipelines.training.config import TrainingConfig
from pipelines.training.train import train
from pipelines.training.trainer import Job

connect()
config, examples, student, output, scratch, num_batches = sys.argv[1:]
config = TrainingConfig.model_validate_json(config)
job = Job(
    config=config, examples=examples, student=student, output=output, num_batches=int(num_batches)
)
train(job, scratch=scratch)
"""


@pytest.mark.chaos
def test_killed_training_goes_on_and_ends_like_an_unkilled_one(
    trained: Trained,
    examples: str,
    student: str,
    tmp_path: Path,
):
    output = tmp_path / "output"
    folders = [examples, student, output, tmp_path / "scratch"]
    arguments = [CONFIG.model_dump_json(), *folders, NUM_BATCHES]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)], start_new_session=True
    )
    storage = open_storage(output)
    deadline = time.monotonic() + 600
    while not storage.list("work/checkpoints"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    began_again = read_metrics(storage)
    assert len(began_again) < NUM_BATCHES
    rows = train(job(CONFIG, examples, student, output), scratch=str(tmp_path / "scratch"))
    assert [row["batch"] for row in rows] == list(range(NUM_BATCHES))
    assert rows[:3] == began_again[:3]  # not trained again: even the speed is the same
    assert [row["loss"] for row in rows] == [row["loss"] for row in trained.rows]
    assert (vectors(output) == vectors(trained.output)).all()


@pytest.mark.chaos
def test_training_goes_on_after_a_lost_worker(
    trained: Trained, examples: str, student: str, tmp_path: Path
):
    output = open_storage(tmp_path / "output")
    killed: list[int] = []

    def kill_one() -> None:
        limit = time.monotonic() + 600
        while not output.list("work/checkpoints") and time.monotonic() < limit:
            time.sleep(0.02)
        for process in psutil.process_iter(["cmdline"]):
            if "RayTrainWorker" in " ".join(process.info["cmdline"] or []):
                process.kill()
                killed.append(process.pid)
                return

    thread = threading.Thread(target=kill_one)
    thread.start()
    config = CONFIG.model_copy(update={"max_failures": 1})
    rows = train(job(config, examples, student, output.uri), scratch=str(tmp_path / "scratch"))
    thread.join()
    assert killed
    assert [row["loss"] for row in rows] == [row["loss"] for row in trained.rows]
    assert (vectors(tmp_path / "output") == vectors(trained.output)).all()


def test_student_that_does_not_load_is_the_users_error(
    ray_session: None, examples: str, tmp_path: Path
):
    (tmp_path / "student").mkdir()
    (tmp_path / "student/config.json").write_text("{}")
    config = CONFIG.model_copy(update={"num_workers": 1})
    with pytest.raises(UserError, match="is missing or empty"):
        train(
            job(config, examples, str(tmp_path / "student"), tmp_path / "output"),
            scratch=str(tmp_path / "scratch"),
        )
