"""Training with fixed passages: its batches, loss and gradients; and a training broken off."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from actors.encoder import Encoder
from cluster.file_list import shard_path
from cluster.storage import open_storage, write_table
from pipelines.records import FIXED_EXAMPLE
from pipelines.training import gradients
from pipelines.training.config import LossConfig, TrainingConfig, ValidationConfig
from pipelines.training.examples import Batch, count_batches, iterate_batches, iterate_validation
from pipelines.training.gradients import backward, batch_loss, evaluation_loss, slice_batch
from pipelines.training.memory import _longest_batch
from pipelines.training.place import Place

DIMENSIONS, NUM_BATCHES = 32, 8
Run = Callable[..., list[dict[str, Any]]]
LOSS = LossConfig(
    contrastive_weight=0,
    distillation_weight=0.5,
    teacher_temperature=0.7,
    student_temperature=0.1,
    anchor_weight=3,
    mask_duplicates=True,
)
CONFIG = TrainingConfig(
    batch_size=4,
    learning_rate=3e-3,
    dropout=False,
    checkpoint_every_batches=2,
    tracking=(),
    loss=LOSS,
)
SIZES = (5, 3, 1, 4)  # of a batch's lists; one candidate alone teaches nothing


def unit(draw: np.random.Generator, *shape: int) -> np.ndarray:
    rows = draw.normal(size=shape)
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float16)


@pytest.fixture
def examples(tmp_path: Path) -> str:
    """Eight batches of four lists and two passages over three shards; two lists held out."""
    draw, storage = np.random.default_rng(0), open_storage(tmp_path / "mixture")

    def row(batch: int, size: int | None) -> dict[str, Any]:
        return {
            "batch": batch,
            "dataset": "fret" if size else "passages",
            "tokens": draw.integers(1000, 2000, draw.integers(3, 20)).tolist(),
            "query_id": f"q{draw.integers(99)}" if size else None,
            "teacher_scores": draw.normal(size=size or 0),
            "vectors": unit(draw, size or 1, DIMENSIONS).tobytes(),
        }

    def write(path: str, rows: Sequence[dict[str, Any]]) -> None:
        write_table(storage, path, pa.Table.from_pylist(list(rows), schema=FIXED_EXAMPLE))

    rows = [row(batch, size) for batch in range(NUM_BATCHES) for size in (*SIZES, None, None)]
    for shard, (start, end) in enumerate([(0, 20), (20, 36), (36, 48)]):
        write(shard_path(shard), rows[start:end])
    write("validation/shards/000000000.parquet", [row(0, 3), row(0, 3)])
    return str(tmp_path / "mixture")


def first(examples: str) -> Batch:
    return next(iterate_batches(examples))


def test_batches_hold_lists_and_the_passages_beside_them(examples: str) -> None:
    batches = list(iterate_batches(examples))
    assert [batch.number for batch in batches] == list(range(count_batches(examples)))
    draw = np.random.default_rng(0)
    tokens = draw.integers(1000, 2000, draw.integers(3, 20))
    query_id, scores = f"q{draw.integers(99)}", draw.normal(size=5)
    batch = batches[0]
    np.testing.assert_array_equal(batch.queries[0], tokens)
    assert batch.query_ids[0] == query_id
    assert batch.teacher_scores[0] == pytest.approx(scores)
    assert batch.lists is not None and batch.embeddings is not None
    np.testing.assert_array_equal(batch.lists[0], unit(draw, 5, DIMENSIONS).astype(np.float32))
    assert [len(rows) for rows in batch.lists] == list(SIZES)
    assert (batch.dataset, batch.num_examples, batch.embeddings.shape) == ("fret", 4, (2, 32))
    assert batch.num_tokens == sum(map(len, [*batch.queries, *batch.texts]))
    (held_out,) = iterate_validation(examples)
    assert (held_out.num_examples, held_out.texts, held_out.embeddings) == (2, [], None)
    assert [batch.number for batch in iterate_batches(examples, 6)] == [6, 7]


def log_softmax(scores: np.ndarray) -> np.ndarray:
    return scores - np.log(np.exp(scores).sum())


def expected_loss(batch: Batch, vectors: np.ndarray, sizes: Sequence[int] = (DIMENSIONS,)) -> float:
    assert batch.lists is not None and batch.embeddings is not None
    losses = []
    for size in sizes:
        divergences = []
        for query, passages, scores in zip(
            vectors, batch.lists, batch.teacher_scores, strict=False
        ):
            near, far = query, passages
            if size < DIMENSIONS:  # whole vectors are taken as they are
                near, far = (
                    each[..., :size] / np.linalg.norm(each[..., :size], axis=-1, keepdims=True)
                    for each in (query, passages)
                )
            teacher = log_softmax(np.array(scores) / 0.7)
            student = log_softmax(far @ near / 0.1)
            divergences.append((np.exp(teacher) * (teacher - student)).sum())
        losses.append(0.5 * np.mean(divergences))
    distance = np.mean(1 - (vectors[len(batch.queries) :] * batch.embeddings).sum(1))
    return float(np.mean(losses) + 3 * distance)


@pytest.mark.parametrize("sizes", [(DIMENSIONS,), (DIMENSIONS, 8)])
def test_loss_and_its_gradient_are_those_of_numpy(examples: str, sizes: tuple[int, ...]) -> None:
    batch = first(examples)
    loss = LOSS.model_copy(update={"matryoshka_dimensions": sizes[1:]})
    config = CONFIG.model_copy(update={"loss": loss})
    vectors = unit(np.random.default_rng(1), 6, DIMENSIONS).astype(np.float64)
    given = torch.tensor(vectors, requires_grad=True)
    part = slice_batch(batch, config)
    assert part.related is None  # no example is another's negative
    found = batch_loss(given, part, config)
    found.backward()
    assert found.item() == pytest.approx(expected_loss(batch, vectors, sizes), rel=1e-5)
    assert given.grad is not None and batch.embeddings is not None
    numeric = np.zeros_like(vectors)
    for place in np.ndindex(4, DIMENSIONS):  # of the queries
        step = np.zeros_like(vectors)
        step[place] = 1e-5
        ends = [expected_loss(batch, vectors + sign * step, sizes) for sign in (1, -1)]
        numeric[place] = (ends[0] - ends[1]) / 2e-5
    np.testing.assert_allclose(given.grad[:4], numeric[:4], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(given.grad[4:], -3 * batch.embeddings / 2, rtol=1e-5)


def test_workers_have_shares_that_add_up(
    examples: str, student: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, encoder = first(examples), Encoder.load(student, device="cpu")
    alone = backward(encoder, slice_batch(batch, CONFIG), CONFIG)
    vectors = encoder.embed_tokens([*batch.queries, *batch.texts]).detach().numpy()
    assert alone == pytest.approx(expected_loss(batch, vectors), rel=1e-4)
    assert alone == pytest.approx(evaluation_loss(encoder, slice_batch(batch, CONFIG), CONFIG))
    weights = [weight for weight in encoder.model.parameters() if weight.grad is not None]
    expected = [weight.grad.clone() for weight in weights if weight.grad is not None]
    encoder.model.zero_grad()
    monkeypatch.setattr(gradients, "_add_up_gradients", lambda _: None)
    monkeypatch.setattr(gradients.dist, "all_reduce", lambda _: None)
    parts = [slice_batch(batch, CONFIG, Place(rank=rank, world=5)) for rank in range(5)]
    assert [(len(part.queries), len(part.texts)) for part in parts] == [
        *[(1, 1)] * 2,
        *[(1, 0)] * 2,
        (0, 0),
    ]
    assert sum(backward(encoder, part, CONFIG) for part in parts) == pytest.approx(alone)
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("max_tokens", [64, 100_000])
@pytest.mark.parametrize("anchored", [True, False])
def test_gradient_cache_changes_nothing(
    examples: str, student: str, max_tokens: int, anchored: bool
) -> None:
    batch = first(examples)
    if not anchored:
        batch = replace(batch, texts=[], embeddings=None)
    found = []
    for tokens in (None, max_tokens):
        encoder = Encoder.load(student, device="cpu")
        config = CONFIG.model_copy(update={"gradient_cache_tokens": tokens})
        loss = backward(encoder, slice_batch(batch, config), config)
        found.append((loss, [w.grad for w in encoder.model.parameters() if w.grad is not None]))
    (loss, grads), (cached_loss, cached) = found
    assert cached_loss == pytest.approx(loss)
    for gradient, other in zip(grads, cached, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


def test_trial_for_memory_reads_the_passages_beside_lists_in_full(
    examples: str, student: str
) -> None:
    encoder = Encoder.load(student, device="cpu")
    config = CONFIG.model_copy(update={"max_query_tokens": 24, "max_passage_tokens": 8})
    part = slice_batch(_longest_batch(encoder, config, first(examples)), config)
    assert (len(part.rows), len(part.queries[0]), len(part.texts[0])) == (6, 24, 64)
    assert backward(encoder, part, config) > 0


def test_resumed_training_equals_an_undisturbed_one_to_the_last_bit(
    examples: str, run: Run, tmp_path: Path
) -> None:
    watched = {"validation": ValidationConfig(every_batches=4)}
    whole = run(examples, tmp_path / "whole", **watched)
    run(examples, tmp_path / "cut", kill_after=4, **watched)
    resumed = run(examples, tmp_path / "cut", **watched)
    assert [row["batch"] for row in resumed] == list(range(NUM_BATCHES))
    for name in ("loss", "validation_loss"):
        values = [[row.get(name) for row in rows] for rows in (resumed, whole)]
        assert values[0] == values[1]
    assert sum("validation_loss" in row for row in whole) == 2
    one, other = (
        list(Encoder.load(str(tmp_path / each / "encoder"), device="cpu").model.parameters())
        for each in ("whole", "cut")
    )
    assert all(map(torch.equal, one, other))
