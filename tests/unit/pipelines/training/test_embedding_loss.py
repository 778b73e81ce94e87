"""Embedding distillation: its loss, gradients and batches; and a training that is broken off."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from actors.encoder import Encoder
from cluster.file_list import shard_path
from cluster.storage import open_storage, read_table, write_table
from pipelines.mining.embeddings import vector_column
from pipelines.records import TEXT
from pipelines.training import gradients
from pipelines.training.config import ValidationConfig
from pipelines.training.embedding_distillation import EmbeddingTrainingConfig
from pipelines.training.embedding_loss import embedding_loss
from pipelines.training.examples import count_batches, iterate_batches, iterate_validation
from pipelines.training.gradients import backward, evaluation_loss, slice_batch
from pipelines.training.memory import _longest_batch
from pipelines.training.place import Place

CONFIG = EmbeddingTrainingConfig(
    batch_size=4, learning_rate=3e-3, checkpoint_every_batches=2, tracking=()
)
NUM_BATCHES = 12
Run = Callable[..., list[dict[str, Any]]]


def unit(*shape: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """Twelve batches of four texts over three shards, and six texts held out in two batches."""
    folder, draw = tmp_path / "texts", np.random.default_rng(1)
    lengths = draw.integers(3, 20, 54)
    rows = [
        {
            "batch": number // 4,
            "dataset": "passages" if number // 4 % 3 else "queries",
            "tokens": draw.integers(1000, 2000, length).tolist(),
            "embedding": vector.tolist(),
        }
        for number, (length, vector) in enumerate(zip(lengths, unit(54, 32), strict=True))
    ]
    for shard, (start, end) in enumerate([(0, 18), (18, 30), (30, 48)]):
        table = pa.Table.from_pylist(rows[start:end], schema=TEXT)
        write_table(open_storage(folder), shard_path(shard), table)
    held_out = [row | {"batch": number // 4} for number, row in enumerate(rows[48:])]
    table = pa.Table.from_pylist(held_out, schema=TEXT)
    write_table(open_storage(folder), "validation/shards/000000000.parquet", table)
    return str(folder)


def test_loss_and_its_gradient_are_those_of_numpy() -> None:
    vectors, targets = unit(5, 8), unit(5, 8, seed=1)
    given = torch.tensor(vectors, requires_grad=True)
    loss = embedding_loss(given, torch.tensor(targets), num_texts=5)
    loss.backward()
    assert loss.item() == pytest.approx(np.mean(1 - np.einsum("ij,ij->i", vectors, targets)))
    # Of unit vectors, half of the squared distance.
    assert loss.item() == pytest.approx(np.mean(((vectors - targets) ** 2).sum(1)) / 2, rel=1e-5)
    assert given.grad is not None
    np.testing.assert_allclose(given.grad.numpy(), -targets / 5, rtol=1e-6)
    equal = embedding_loss(torch.tensor(targets), torch.tensor(targets), num_texts=5)
    assert float(equal) == pytest.approx(0, abs=1e-6)


def test_batches_of_texts_come_in_order_with_their_vectors(texts: str) -> None:
    batches = list(iterate_batches(texts))
    assert (
        [batch.number for batch in batches] == list(range(12)) == list(range(count_batches(texts)))
    )
    assert {len(batch.texts) for batch in batches} == {4}
    assert [batch.dataset for batch in batches[:3]] == ["queries", "passages", "passages"]
    found = np.concatenate([batch.embeddings for batch in batches if batch.embeddings is not None])
    np.testing.assert_array_equal(found, unit(54, 32)[:48])
    (later, *_) = iterate_batches(texts, start=5)
    assert later.embeddings is not None and later.number == 5
    np.testing.assert_array_equal(later.embeddings, unit(54, 32)[20:24])
    assert later.num_tokens == sum(map(len, batches[5].texts))
    held_out = list(iterate_validation(texts))
    assert [len(batch.texts) for batch in held_out] == [4, 2]


def test_workers_have_shares_that_add_up(
    texts: str, student: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = next(iterate_batches(texts))
    encoder = Encoder.load(student, device="cpu")
    alone = backward(encoder, slice_batch(batch, CONFIG), CONFIG)
    assert batch.embeddings is not None
    vectors = encoder.embed_tokens(batch.texts).detach().numpy()
    assert alone == pytest.approx(np.mean(1 - (vectors * batch.embeddings).sum(1)), abs=1e-5)
    assert alone == pytest.approx(evaluation_loss(encoder, slice_batch(batch, CONFIG), CONFIG))
    weights = [weight for weight in encoder.model.parameters() if weight.grad is not None]
    expected = [weight.grad.clone() for weight in weights if weight.grad is not None]
    encoder.model.zero_grad()
    monkeypatch.setattr(gradients, "_add_up_gradients", lambda _: None)
    monkeypatch.setattr(gradients.dist, "all_reduce", lambda _: None)
    parts = [slice_batch(batch, CONFIG, Place(rank=rank, world=5)) for rank in range(5)]
    assert [len(part.texts) for part in parts] == [1, 1, 1, 1, 0]
    assert sum(backward(encoder, part, CONFIG) for part in parts) == pytest.approx(alone)
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("max_tokens", [64, 100_000])
def test_gradient_cache_changes_nothing(texts: str, student: str, max_tokens: int) -> None:
    part = slice_batch(next(iterate_batches(texts)), CONFIG)
    found = []
    for tokens in (None, max_tokens):
        encoder = Encoder.load(student, device="cpu")
        config = CONFIG.model_copy(update={"gradient_cache_tokens": tokens})
        loss = backward(encoder, part, config)
        grads = [w.grad for w in encoder.model.parameters() if w.grad is not None]
        found.append((loss, grads))
    (loss, grads), (cached_loss, cached) = found
    assert cached_loss == pytest.approx(loss)
    for gradient, other in zip(grads, cached, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


def test_trial_for_memory_has_texts_of_the_longest_length_and_their_vectors(student: str) -> None:
    config = CONFIG.model_copy(update={"max_query_tokens": 24, "max_passage_tokens": 40})
    encoder = Encoder.load(student, device="cpu")
    part = slice_batch(_longest_batch(encoder, config, None), config)
    assert (len(part.rows), len(part.rows[0])) == (4, 40)
    assert backward(encoder, part, config) == pytest.approx(1)  # of vectors of zeros


@pytest.mark.parametrize("settings", [{}, {"precision": "bfloat16", "dropout": True}])
def test_resumed_training_equals_an_undisturbed_one_to_the_last_bit(
    texts: str, run: Run, tmp_path: Path, settings: dict[str, Any]
) -> None:
    whole = run(texts, tmp_path / "whole", **settings)
    run(texts, tmp_path / "cut", kill_after=4, **settings)
    resumed = run(texts, tmp_path / "cut", **settings)
    assert [row["batch"] for row in resumed] == list(range(NUM_BATCHES))
    assert [row["loss"] for row in resumed] == [row["loss"] for row in whole]
    assert all(row["examples_per_s"] > 0 for row in whole)
    one, other = (
        list(Encoder.load(str(tmp_path / each / "encoder"), device="cpu").model.parameters())
        for each in ("whole", "cut")
    )
    assert all(map(torch.equal, one, other))


def test_student_learns_the_vectors_it_is_given(
    texts: str, student: str, run: Run, tmp_path: Path
) -> None:
    watched = {"learning_rate": 1e-2, "validation": ValidationConfig(every_batches=4)}
    teacher = Encoder.load(student, device="cpu")
    # Vectors that this student can learn: those of other weights of its own kind.
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in teacher.model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    learnable = tmp_path / "learnable"
    for folder in ("shards", "validation/shards"):
        for path in open_storage(texts).list(folder):
            table = _taught(texts, path, teacher)
            write_table(open_storage(learnable), path, table)
    rows = run(str(learnable), tmp_path / "run", **watched)
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def _taught(uri: str, path: str, teacher: Encoder) -> pa.Table:
    table = read_table(open_storage(uri), path)
    with torch.no_grad():
        vectors = teacher.embed_tokens(table["tokens"].to_pylist()).numpy()
    place = table.column_names.index("embedding")
    return table.set_column(place, "embedding", vector_column(vectors))
