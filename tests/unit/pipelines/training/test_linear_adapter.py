"""One matrix learns a teacher's order, and is an encoder's last layer afterwards."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from actors.encoder import Encoder
from cluster.artifacts import Artifact, Manifest
from cluster.steps import StepContext
from cluster.storage import open_storage
from pipelines.recipe.read import load_recipe
from pipelines.training import linear_adapter
from pipelines.training.layers import add_linear_adapter, add_projection
from pipelines.training.linear_adapter import LinearAdapterConfig, fit_matrix

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
    matrix, losses = fit_matrix(*lists, config, QUIET)
    assert losses[-1] < 0.7 * losses[0]
    assert agreement(matrix.numpy(), lists) > agreement(np.eye(16), lists) + 0.1
    again, _ = fit_matrix(*lists, config, QUIET)
    assert torch.equal(matrix, again)


def test_a_heavy_weight_keeps_the_identity(lists: Lists) -> None:
    config = LinearAdapterConfig(epochs=5, learning_rate=0.01, weight_decay=1e4)
    matrix, _ = fit_matrix(*lists, config, QUIET)
    free, _ = fit_matrix(*lists, config.model_copy(update={"weight_decay": 0.0}), QUIET)
    far = [float((each - torch.eye(16)).norm()) for each in (matrix, free)]
    assert far[0] < 0.5 * far[1]


def test_the_places_that_fill_short_lists_count_nothing(lists: Lists) -> None:
    queries, vectors, places, scores = lists
    config = LinearAdapterConfig(epochs=1, batch_size=2)
    short = fit_matrix(
        queries[:2], vectors, [places[0][:1], places[1]], [[3.0], scores[1]], config, QUIET
    )
    # A list of one passage teaches nothing, whatever is beside it.
    other = fit_matrix(
        queries[:2], vectors, [places[5][:1], places[1]], [[-7.0], scores[1]], config, QUIET
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


def test_the_step_keeps_the_weights_exact_whatever_the_student_is_searched_with(
    tiny_model: Callable[..., Path],
    context: Callable[..., StepContext],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lists: Lists,
) -> None:
    before = Encoder.load(str(tiny_model("bert", tmp_path / "tiny")), device="cpu")
    before.save(tmp_path / "training/encoder", model_card="")
    manifest = Manifest(step="s", fingerprint="f", config={}, inputs={}, files=())
    made = Artifact(open_storage(tmp_path / "training"), manifest)
    _, _, places, scores = lists
    texts = [f"query {number}" for number in range(len(places))]
    table = pa.table({"text": texts, "places": places, "teacher_scores": scores})
    vectors = np.random.default_rng(0).normal(size=(200, before.dimensions)).astype(np.float16)
    monkeypatch.setattr(linear_adapter, "read_lists", lambda *_: table)
    monkeypatch.setattr(linear_adapter, "read_vectors", lambda *_: (vectors, None))
    recipe = load_recipe("adapt", [f"corpus.path={tmp_path}", "student.dtype=bfloat16"])
    inputs = {"training": made, "fret": made, "embeddings": made}
    metrics = linear_adapter.step(recipe).work(context(tmp_path / "linear_adapter", **inputs))
    assert metrics["num_lists"] == 300
    after = Encoder.load(str(tmp_path / "linear_adapter/encoder"), device="cpu").model.state_dict()
    for name, weights in before.model.state_dict().items():
        assert torch.equal(after[name], weights), name
    matrix = after["projection.0.weight"]
    assert not torch.equal(matrix, matrix.bfloat16().float())
