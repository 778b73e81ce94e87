"""A training whose loss is no number: what its files hold, and what is made of them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.encoder import Encoder
from cluster.storage import open_storage
from pipelines.datasets.retrieval import RetrievalDataset, TitledText
from pipelines.training.config import TrainingConfig, ValidationConfig
from pipelines.training.metrics import METRICS, MetricsLog, read_metrics, recent_loss, scalars
from pipelines.training.place import Place
from pipelines.training.validation import LOSS, NDCG, Validation, WatchedSet


def test_metrics_of_a_diverged_training_are_json(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    log = MetricsLog(storage, 0, ["tensorboard"])
    log.append({"batch": 0, "dataset": "a", "loss": math.nan}, flush=True)
    log.close()
    text = (tmp_path / METRICS).read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] is None
    (row,) = read_metrics(storage)
    assert scalars(row) == {}
    assert math.isnan(recent_loss([row]))
    MetricsLog(storage, 1, ["tensorboard"]).close()  # goes on with it


@pytest.mark.parametrize("key", [LOSS, NDCG])
@pytest.mark.parametrize("none", [None, math.nan])
def test_look_that_found_no_number_is_not_the_best(key: str, none: float | None) -> None:
    batches: list[Any] = [None]
    rows = [{"batch": 9, key: none}, {"batch": 19, key: 0.5}, {"batch": 29, key: none}]
    assert Validation(ValidationConfig(), batches, None, rows).best == 20


def test_look_at_a_model_of_no_numbers_finds_none(student: str) -> None:
    encoder = Encoder.load(student, device="cpu")
    with torch.no_grad():
        next(iter(encoder.model.parameters())).fill_(math.nan)
    data = RetrievalDataset(
        name="d", passages={"a": TitledText("", "x")}, queries={"q": "y"}, qrels={"q": {"a": 1}}
    )
    look = Validation(ValidationConfig(), [], WatchedSet(data=data, task="t"), [])
    measured = look._measure(encoder, TrainingConfig(), Place(rank=0, world=1, device="cpu"))
    assert math.isnan(measured[NDCG])
