"""What a worker gives each optimizer step, and what it makes of it; the step is simulated."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from pipelines.training.config import TrainingConfig, ValidationConfig
from pipelines.training.examples import iterate_batches
from pipelines.training.gradients import slice_batch
from pipelines.training.memory import FITTED
from pipelines.training.metrics import METRICS
from pipelines.training.optimizer import learning_rate
from pipelines.training.place import Place
from pipelines.training.trainer import Job, Trainer, _soup_batches, load_student

CONFIG = TrainingConfig(batch_size=16, seed=3, gradient_cache_tokens=700, tracking=())
NUM_BATCHES = 12


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the steps were given; each begins with 700 tokens and ends with 350."""
    given: list[dict[str, Any]] = []

    def step(_: Any, __: Any, ___: Any, config: TrainingConfig, **settings: Any) -> Any:
        given.append(settings)
        return 0.5, 1.0, config.model_copy(update={"gradient_cache_tokens": 350})

    monkeypatch.setattr("pipelines.training.trainer.train_fitting", step)
    return given


def trainer(examples: str, student: str, output: Path, *, rank: int = 0, **settings: Any):
    config = CONFIG.model_copy(update=settings)
    job = Job(config=config, examples=examples, student=student, output=str(output), num_batches=12)
    place = Place(rank=rank, world=2, device="cpu")
    return Trainer(job, place, load_student(job, "cpu"))


def test_each_batch_of_each_worker_has_its_own_seed_and_all_workers_one_rate(
    examples: str, student: str, tmp_path: Path, steps: list[dict[str, Any]]
):
    batches = list(iterate_batches(examples))
    for rank in range(2):
        here = trainer(examples, student, tmp_path, rank=rank)
        for batch in batches:
            here.batch(batch, slice_batch(batch, CONFIG, here.place))
    assert len({step["seed"] for step in steps}) == 2 * NUM_BATCHES
    rates = [learning_rate(CONFIG, number, NUM_BATCHES) for number in range(NUM_BATCHES)]
    assert [step["rate"] for step in steps] == 2 * rates
    again = trainer(examples, student, tmp_path, seed=4)
    again.batch(batches[0], slice_batch(batches[0], CONFIG, again.place))
    assert steps[-1]["seed"] not in {step["seed"] for step in steps[:-1]}


@pytest.mark.parametrize("rank", [0, 1])
def test_smaller_gradient_cache_is_told_once_and_remembered_by_the_first_worker(
    rank: int, examples: str, student: str, tmp_path: Path, steps: list[dict[str, Any]]
):
    here = trainer(examples, student, tmp_path, rank=rank)
    (batch,) = islice(iterate_batches(examples), 1)
    row = here.batch(batch, slice_batch(batch, CONFIG, here.place))
    assert row["out_of_memory"] == 1
    assert row["gradient_cache_tokens"] == here.config.gradient_cache_tokens == 350
    assert (tmp_path / FITTED).exists() == (rank == 0)


def test_validation_comes_when_it_is_due_and_the_last_batch_ends_the_training(
    examples: str, student: str, tmp_path: Path, steps: list[dict[str, Any]]
):
    here = trainer(examples, student, tmp_path, validation=ValidationConfig(every_batches=5))
    here.place = Place(device="cpu")  # no other worker answers
    looks = []
    for batch in iterate_batches(examples):
        assert not here.ended
        here.batch(batch, slice_batch(batch, CONFIG))
        if here.validate():
            looks.append(here.done)
    assert looks == [5, 10, 12]
    assert here.ended


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, set()),
        ({"soup_checkpoints": 3}, {36, 32}),
        ({"soup_checkpoints": 3, "soup_every_batches": 5}, {35, 30}),
        ({"soup_checkpoints": 3, "soup_every_batches": 25}, {15}),
        ({"soup_checkpoints": 2, "soup_every_batches": 40}, set()),
        ({"soup_trainings": 3}, {13, 26}),
    ],
)
def test_soup_is_of_the_last_batches(settings: dict[str, int], expected: set[int]):
    assert _soup_batches(CONFIG.model_copy(update=settings), 40) == expected


def test_looks_after_the_last_checkpoint_are_forgotten(examples: str, student: str, tmp_path: Path):
    row = {"batch": 0, "validation_loss": 0.1}  # of a batch that will be trained again
    (tmp_path / METRICS).write_text(json.dumps(row))
    here = trainer(examples, student, tmp_path, validation=ValidationConfig(patience=1))
    assert here.done == here._validation.best == 0
