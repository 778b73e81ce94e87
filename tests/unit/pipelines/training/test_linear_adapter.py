"""One matrix learns a teacher's order, and is an encoder's last layer afterwards."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from actors.encoder import Encoder
from cluster.artifacts import Artifact, Manifest, write_artifact, write_shards
from cluster.errors import UserError
from cluster.file_list import FileList
from cluster.steps import StepContext
from cluster.storage import open_storage
from pipelines.mining.embeddings import vector_column
from pipelines.mixture import fixed_lists
from pipelines.recipe.read import load_recipe
from pipelines.recipe.recipe import Recipe
from pipelines.records import EMBEDDING, FRET
from pipelines.training import linear_adapter
from pipelines.training.layers import add_linear_adapter, add_projection
from pipelines.training.linear_adapter import (
    LinearAdapterConfig,
    ListBatch,
    draw_lists,
    num_batches,
)

Lists = tuple[np.ndarray, np.ndarray, list[list[int]], list[list[float]]]


class Quiet:
    """Says nothing."""

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        """Says nothing."""


QUIET = Quiet()


@pytest.fixture
def lists() -> Lists:
    """The teacher sees the first half of 16 dimensions alone; lists have 5 to 8 passages."""
    draw = np.random.default_rng(0)
    queries, vectors = (draw.normal(size=(n, 16)).astype(np.float32) for n in (300, 200))
    queries, vectors = (each / np.linalg.norm(each, axis=1)[:, None] for each in (queries, vectors))
    places = [draw.choice(200, draw.integers(5, 9), replace=False).tolist() for _ in queries]
    scores = [
        (4 * vectors[rows, :8] @ query[:8]).tolist()
        for query, rows in zip(queries, places, strict=True)
    ]
    return queries, vectors.astype(np.float16), places, scores


def fit_matrix(
    queries: np.ndarray,
    vectors: np.ndarray,
    places: list[list[int]],
    scores: list[list[float]],
    config: LinearAdapterConfig,
) -> tuple[torch.Tensor, list[float]]:
    """Learns from lists that are in memory."""
    batches = (
        ListBatch.of(
            queries[rows],
            [vectors[places[row]] for row in rows],
            [np.array(scores[row], np.float32) for row in rows],
        )
        for rows in draw_lists(len(places), config)
    )
    number = num_batches(len(places), config)
    return linear_adapter.fit_matrix(batches, number, queries.shape[1], config, QUIET)


def agreement(matrix: np.ndarray, lists: Lists) -> float:
    """How often the best passage is the teacher's."""
    queries, vectors, places, scores = lists
    right = []
    for query, rows, given in zip(queries, places, scores, strict=True):
        mapped = vectors[rows].astype(np.float32) @ matrix.T
        mapped /= np.linalg.norm(mapped, axis=1)[:, None]
        right.append(int(np.argmax(mapped @ (matrix @ query))) == int(np.argmax(given)))
    return float(np.mean(right))


def test_the_teachers_order_is_learnt(lists: Lists) -> None:
    config = LinearAdapterConfig(epochs=30, learning_rate=0.01, weight_decay=0)
    matrix, losses = fit_matrix(*lists, config)
    assert losses[-1] < 0.7 * losses[0]
    assert agreement(matrix.numpy(), lists) > agreement(np.eye(16), lists) + 0.1
    again, _ = fit_matrix(*lists, config)
    assert torch.equal(matrix, again)


def test_a_heavy_weight_keeps_the_identity(lists: Lists) -> None:
    config = LinearAdapterConfig(epochs=5, learning_rate=0.01, weight_decay=1e4)
    matrix, _ = fit_matrix(*lists, config)
    free, _ = fit_matrix(*lists, config.model_copy(update={"weight_decay": 0.0}))
    far = [float((each - torch.eye(16)).norm()) for each in (matrix, free)]
    assert far[0] < 0.5 * far[1]


def test_the_places_that_fill_short_lists_count_nothing(lists: Lists) -> None:
    queries, vectors, places, scores = lists
    config = LinearAdapterConfig(epochs=1, batch_size=2)
    short = fit_matrix(queries[:2], vectors, [places[0][:1], places[1]], [[3.0], scores[1]], config)
    # A list of one passage teaches nothing, whatever is beside it.
    other = fit_matrix(
        queries[:2], vectors, [places[5][:1], places[1]], [[-7.0], scores[1]], config
    )
    assert torch.equal(short[0], other[0])
    assert short[1] == other[1]


@pytest.mark.parametrize("projected", [False, True])
def test_the_adapter_stands_behind_all_that_the_encoder_has(
    tiny_model: Callable[..., Path], tmp_path: Path, projected: bool
) -> None:
    encoder = Encoder.load(str(tiny_model("bert", tmp_path / "tiny")), device="cpu")
    if projected:
        add_projection(encoder, 16)
    before = encoder.encode(["a passage", "another"])
    matrix = torch.randn(encoder.dimensions, encoder.dimensions)
    add_linear_adapter(encoder, matrix)
    expected = before @ matrix.numpy().T
    expected /= np.linalg.norm(expected, axis=1)[:, None]
    assert encoder.encode(["a passage", "another"]) == pytest.approx(expected, abs=1e-5)
    encoder.save(str(tmp_path / "saved"), model_card="# one\n")
    loaded = Encoder.load(str(tmp_path / "saved"), device="cpu")
    assert loaded.encode(["a passage"]) == pytest.approx(expected[:1], abs=1e-5)


def artifact(folder: Path, table: pa.Table | None) -> Artifact:
    storage = open_storage(folder)
    manifest = Manifest(step="s", fingerprint="f", config={}, inputs={})
    files = write_shards(storage, table, 64) if table is not None else []
    return write_artifact(storage, manifest, FileList.of(files))


def fret(places: list[list[int]], scores: list[list[float]]) -> pa.Table:
    rows = [
        dict.fromkeys(FRET.names)
        | {
            "id": f"q{number}",
            "task": "a",
            "query": f"query {number}",
            "candidate_ids": [f"p{place}" for place in own],
            "fused": given,
            "positive_id": f"p{own[0]}",
            "negative_ids": [f"p{place}" for place in own[1:]],
        }
        for number, (own, given) in enumerate(zip(places, scores, strict=True))
    ]
    return pa.Table.from_pylist(rows, schema=FRET)


Inputs = Callable[[int], dict[str, Artifact]]


@pytest.fixture
def inputs(tiny_model: Callable[..., Path], tmp_path: Path, lists: Lists) -> Inputs:
    """Makes the step's inputs, with passages' vectors of so many dimensions."""
    encoder = Encoder.load(str(tiny_model("bert", tmp_path / "tiny")), device="cpu")
    encoder.save(tmp_path / "training/encoder", model_card="")
    _, _, places, scores = lists

    def make(dimensions: int) -> dict[str, Artifact]:
        vectors = vector_column(stored(dimensions))
        ids = [f"p{number}" for number in range(200)]
        tables = {
            "training": None,
            "fret": fret(places, scores),
            "embeddings": pa.table([ids, vectors], EMBEDDING),
        }
        return {name: artifact(tmp_path / name, table) for name, table in tables.items()}

    return make


def stored(dimensions: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(200, dimensions)).astype(np.float32)


def recipe(tmp_path: Path) -> Recipe:
    return load_recipe("adapt", [f"corpus.path={tmp_path}", "student.dtype=bfloat16"])


def test_the_step_keeps_the_weights_exact_whatever_the_student_is_searched_with(
    inputs: Inputs, context: Callable[..., StepContext], tmp_path: Path
) -> None:
    before = Encoder.load(str(tmp_path / "training/encoder"), device="cpu").model.state_dict()
    step = linear_adapter.step(recipe(tmp_path))
    step.work(context(tmp_path / "linear_adapter", **inputs(32)))
    after = Encoder.load(str(tmp_path / "linear_adapter/encoder"), device="cpu").model.state_dict()
    for name, weights in before.items():
        assert torch.equal(after[name], weights), name
    matrix = after["projection.0.weight"]
    assert not torch.equal(matrix, matrix.bfloat16().float())


def test_the_step_learns_as_if_all_lists_were_in_memory(
    inputs: Inputs,
    context: Callable[..., StepContext],
    tmp_path: Path,
    lists: Lists,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear_adapter, "LISTS_PER_SHARD", 128)
    monkeypatch.setattr(fixed_lists, "_VECTORS_PER_SHARD", 100)
    step = linear_adapter.step(recipe(tmp_path))
    metrics = step.work(context(tmp_path / "linear_adapter", **inputs(32)))
    before = Encoder.load(str(tmp_path / "training/encoder"), device="cpu")
    texts = [before.templates.format_query(f"query {number}", task="a") for number in range(300)]
    config = recipe(tmp_path).linear_adapter
    assert config is not None
    expected, losses = fit_matrix(
        before.encode(texts), stored(32).astype(np.float16), *lists[2:], config
    )
    after = Encoder.load(str(tmp_path / "linear_adapter/encoder"), device="cpu").model.state_dict()
    torch.testing.assert_close(after["projection.0.weight"], expected, rtol=0, atol=1e-5)
    assert metrics["num_lists"] == 300
    assert metrics["first_loss"] == round(float(np.mean(losses[: len(losses) // 10])), 4)


def test_vectors_of_another_length_are_refused(
    inputs: Inputs, context: Callable[..., StepContext], tmp_path: Path
) -> None:
    step = linear_adapter.step(recipe(tmp_path))
    with pytest.raises(UserError, match="vectors have 16 dimensions and the student's 32"):
        step.work(context(tmp_path / "linear_adapter", **inputs(16)))
