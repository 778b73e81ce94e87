"""The training loop in this process, without Ray: its steps, its end, and going on."""

import struct
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tensorboardX.proto import event_pb2

from actors.encoder import Encoder
from actors.kernels.packing import cut_batches
from cluster.errors import UserError
from cluster.storage import open_storage
from pipelines.training.checkpoint import FOLDER
from pipelines.training.config import LoraConfig, LossConfig, TrainingConfig, ValidationConfig
from pipelines.training.examples import iterate_batches, iterate_validation
from pipelines.training.gradients import Slice, _chunks, backward, evaluation_loss, slice_batch
from pipelines.training.metrics import TENSORBOARD, read_metrics

NUM_BATCHES = 12
Run = Callable[..., list[dict[str, Any]]]
CONFIG = TrainingConfig(
    batch_size=16,
    max_query_tokens=32,
    max_passage_tokens=32,
    learning_rate=3e-3,
    checkpoint_every_batches=3,
    tracking=(),
)
EVERY_TERM = LossConfig(
    matryoshka_dimensions=(16,),
    mask_duplicates=True,
    mask_margin=0.1,
    hardness=1,
    spread_out_weight=0.1,
    distillation_weight=0.1,
)


@pytest.fixture(scope="module")
def plain(run: Run, examples: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that nothing disturbed."""
    folder = tmp_path_factory.mktemp("plain")
    run(examples, folder)
    return folder


def test_trained_student_takes_texts_as_long_as_before(examples: str, run: Run, tmp_path: Path):
    run(examples, tmp_path, max_query_tokens=16, max_passage_tokens=32)
    assert Encoder.load(str(tmp_path / "encoder")).max_tokens == 64


def test_worker_without_examples_needs_no_terms_of_others(
    student: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipelines.training.gradients.dist.all_reduce", lambda *_: None)
    monkeypatch.setattr("pipelines.training.loss._gather", lambda rows, *_: rows.new_zeros(1, 64))
    alone = LossConfig(in_batch_negatives=False, same_tower_negatives="none")
    part = Slice(
        queries=[],
        positives=[],
        negatives=[],
        num_negatives=torch.zeros(0, dtype=torch.int64),
        teacher_scores=None,
        sizes=[1, 0],
        rank=1,
        related=None,
        symmetric=False,
    )
    config = CONFIG.model_copy(update={"loss": alone})
    assert backward(Encoder.load(student, device="cpu"), part, config) == 0


def weights(output: Path) -> list[torch.Tensor]:
    return list(Encoder.load(str(output / "encoder"), device="cpu").model.parameters())


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows]


@pytest.mark.parametrize(
    ("settings", "falls_to"),
    [
        ({}, 0.8),
        ({"precision": "bfloat16", "loss": EVERY_TERM}, 0.8),
        (
            {
                "lora": LoraConfig(rank=8, dropout=0.1),
                "gradient_cache_tokens": 700,
                "learning_rate": 0.015,
            },
            0.97,
        ),
    ],
    ids=["plain", "bfloat16, every term", "adapters, gradient cache"],
)
def test_resumed_training_equals_an_undisturbed_one_to_the_last_bit(
    examples: str, run: Run, tmp_path: Path, settings: dict[str, Any], falls_to: float
):
    whole = run(examples, tmp_path / "whole", **settings)
    run(examples, tmp_path / "cut", kill_after=6, **settings)
    resumed = run(examples, tmp_path / "cut", **settings)
    assert [row["batch"] for row in resumed] == list(range(NUM_BATCHES))
    assert losses(resumed) == losses(whole)
    for expected, found in zip(weights(tmp_path / "whole"), weights(tmp_path / "cut"), strict=True):
        assert torch.equal(expected, found)
    assert np.mean(losses(whole)[-4:]) < falls_to * np.mean(losses(whole)[:4])


@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("loss", [LossConfig(), EVERY_TERM], ids=["equation 3", "every term"])
@pytest.mark.parametrize("max_tokens", [64, 700, 100_000])
def test_gradient_cache_changes_neither_loss_nor_gradients(
    examples: str, student: str, loss: LossConfig, max_tokens: int, dropout: bool
):
    config = CONFIG.model_copy(update={"loss": loss})
    encoder = Encoder.load(student, device="cpu")
    encoder.model.train(dropout)
    (batch,) = islice(iterate_batches(examples), 1)
    part = slice_batch(batch, config)
    cached = config.model_copy(update={"gradient_cache_tokens": max_tokens})
    found = []
    for each in (cached, cached) if dropout else (config, cached):
        encoder.model.zero_grad()
        torch.manual_seed(0)
        value = backward(encoder, part, each)
        gradients = [w.grad.clone() for w in encoder.model.parameters() if w.grad is not None]
        found.append((value, gradients))
    (expected, plain), (value, gradients) = found
    assert value == pytest.approx(expected, rel=1e-5)
    for one, other in zip(plain, gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)


def test_chunk_holds_as_many_tokens_as_its_passes():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.5, 0.8, 1500), 4, 384).astype(int).tolist()
    for max_tokens in (500, 40_000, 10**6):
        chunks = _chunks(lengths, max_tokens, 16384)
        assert sorted(row for chunk in chunks for row in chunk) == list(range(1500))
        for number, chunk in enumerate(chunks, 1):
            rows = sorted((np.zeros(lengths[row]) for row in chunk), key=len, reverse=True)
            passes = cut_batches(rows, 16384, packed=False)
            places = sum(len(each) * len(each[0]) for each in passes)
            assert places < 1.03 * max_tokens
            if number < len(chunks):
                assert places + 2 * len(rows[0]) > 0.9 * max_tokens
    assert len(chunks) == 1


def test_gradient_cache_and_validation_see_each_batchs_weights(
    examples: str, run: Run, tmp_path: Path
):
    settings: dict[str, Any] = {"dropout": False, "validation": ValidationConfig(every_batches=6)}
    plain = run(examples, tmp_path / "plain", **settings)
    cached = run(examples, tmp_path / "cached", gradient_cache_tokens=700, **settings)
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-4)
    encoder = Encoder.load(str(tmp_path / "plain/encoder"), device="cpu")
    parts = [slice_batch(batch, CONFIG) for batch in iterate_validation(examples)]
    found = np.mean([evaluation_loss(encoder, part, CONFIG) for part in parts])
    assert plain[-1]["validation_loss"] == pytest.approx(found, rel=1e-4)


def test_gradient_checkpointing_changes_nothing(
    examples: str, run: Run, plain: Path, tmp_path: Path
):
    checkpointed = run(examples, tmp_path / "less", gradient_checkpointing=True)
    expected = read_metrics(open_storage(plain))
    assert losses(checkpointed) == pytest.approx(losses(expected), rel=1e-5)


def test_gradient_cache_repeats_its_dropout(examples: str, student: str):
    """The gradient along a step predicts the change of the loss, under one seed's dropout."""
    config = CONFIG.model_copy(update={"gradient_cache_tokens": 300})
    encoder = Encoder.load(student, device="cpu")
    encoder.model.train()
    (batch,) = islice(iterate_batches(examples), 1)
    part = slice_batch(batch, config)

    def loss() -> float:
        encoder.model.zero_grad()
        torch.manual_seed(3)
        return backward(encoder, part, config)

    loss()
    weight = encoder.model.encoder.layer[1].output.dense.weight
    direction = weight.grad.clone() / weight.grad.norm()
    slope, step, ends = float(weight.grad.norm()), 0.02, []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
        ends.append(loss())
        with torch.no_grad():
            weight -= sign * step * direction
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=0.05)


def test_soup_averages_the_last_checkpoints(examples: str, run: Run, plain: Path, tmp_path: Path):
    settings = {"soup_checkpoints": 3, "soup_every_batches": 2}
    run(examples, tmp_path / "soup", **settings)
    run(examples, tmp_path / "cut", kill_after=9, **settings)
    run(examples, tmp_path / "cut", **settings)
    changed = 0
    folders = (tmp_path / "soup", tmp_path / "cut", plain)
    for soup, cut, last in zip(*map(weights, folders), strict=True):
        assert torch.equal(soup, cut)
        changed += not torch.equal(soup, last)
    assert changed > 10


def test_soup_averages_trainings_that_each_begin_at_the_start(
    examples: str, run: Run, tmp_path: Path
):
    settings = {"soup_trainings": 3, "dropout": False}
    rows = run(examples, tmp_path / "soup", **settings)
    run(examples, tmp_path / "cut", kill_after=9, **settings)
    run(examples, tmp_path / "cut", **settings)
    third = NUM_BATCHES // 3
    rates = [row["learning_rate"] for row in rows]
    assert rates[:third] * 3 == rates and rates[0] > rates[third - 1]
    # Each third of the batches, trained on alone.
    apart = []
    for number in range(3):
        folder = tmp_path / f"examples-{number}" / "shards"
        folder.mkdir(parents=True)
        first = number * third
        table = pa.concat_tables(map(pq.read_table, sorted(Path(examples).glob("shards/*"))))
        table = table.filter(pc.equal(pc.divide(table["batch"], third), number))
        column = pc.subtract(table["batch"], first).cast(table.schema.field("batch").type)
        table = table.set_column(table.schema.get_field_index("batch"), "batch", column)
        pq.write_table(table, folder / "000000000.parquet")
        run(str(folder.parent), tmp_path / f"apart-{number}", dropout=False)
        apart.append(weights(tmp_path / f"apart-{number}"))
    soups = zip(weights(tmp_path / "soup"), weights(tmp_path / "cut"), *apart, strict=True)
    for soup, cut, *each in soups:
        assert torch.equal(soup, cut)
        torch.testing.assert_close(soup, torch.stack(each).mean(0), rtol=1e-4, atol=1e-6)


def test_early_stopping_takes_the_best_weights(examples: str, run: Run, tmp_path: Path):
    # So high a rate that the held-out loss soon rises.
    settings = {"learning_rate": 0.02, "checkpoint_every_batches": 1}
    validation = ValidationConfig(every_batches=1, patience=2)
    rows = run(examples, tmp_path / "early", validation=validation, **settings)
    looks = {row["batch"] + 1: row["validation_loss"] for row in rows if "validation_loss" in row}
    best = min(looks, key=lambda done: looks[done])
    assert len(rows) == best + 2 < NUM_BATCHES

    run(examples, tmp_path / "cut", kill_after=best, **settings)
    (checkpoint,) = (tmp_path / "cut" / FOLDER).iterdir()
    stored = load_file(checkpoint)
    model = Encoder.load(str(tmp_path / "early/encoder"), device="cpu").model
    for name, weight in model.named_parameters():
        if not name.startswith("pooler."):  # not trained
            assert torch.equal(weight, stored[f"model/{name}"])


def test_validation_of_nothing_is_refused(examples: str, run: Run, tmp_path: Path):
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/shards").symlink_to(Path(examples) / "shards")
    with pytest.raises(UserError, match="nothing to look at"):
        run(
            str(tmp_path / "examples"),
            tmp_path / "output",
            validation=ValidationConfig(),
        )


def read_events(folder: Path) -> list[event_pb2.Event]:
    """Reads TensorBoard's records: a length, its checksum, the event, its checksum."""
    (file,) = folder.iterdir()
    content, events = file.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        events.append(event_pb2.Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return events


def test_metrics_and_tensorboard_hold_every_batch_once(examples: str, run: Run, tmp_path: Path):
    settings: dict[str, Any] = {"tracking": ("tensorboard",)}
    run(examples, tmp_path, kill_after=6, **settings)
    rows = run(examples, tmp_path, **settings)
    assert {row["dataset"] for row in rows} == {"titles", "more-titles"}
    assert all(row["gradient_norm"] > 0 and row["tokens_per_s"] > 0 for row in rows)
    assert all(0 <= row["padding_share"] <= 1 / 16 for row in rows)  # packed
    events = read_events(tmp_path / TENSORBOARD)
    found = {
        tag: {
            e.step: value.simple_value
            for e in events
            for value in e.summary.value
            if value.tag == tag
        }
        for tag in ("training/loss", "loss/more-titles")
    }
    assert found["training/loss"] == pytest.approx({row["batch"]: row["loss"] for row in rows})
    assert list(found["loss/more-titles"]) == [0, 3, 6, 9]
