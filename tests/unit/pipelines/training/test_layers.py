from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.encoder import Encoder
from actors.parity import ParityText, check_parity
from pipelines.training.layers import add_projection, cut_layers, make_bidirectional

TinyModel = Callable[..., Path]
TEXTS = [
    "the boundary layer of a flat plate",
    "how do I read a file line by line?",
    "",
    "naïve café — 雪が降る",
    " ".join(["a passage that is longer than the model takes"] * 60),
    *[f"sentence number {n} " * n for n in range(1, 12)],
]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.load("embedded:all-MiniLM-L6-v2", device="cpu")


@pytest.fixture(scope="module")
def student(encoder: Encoder) -> Encoder:
    return cut_layers(encoder, [0, 2, 5])


def parity(folder: Path) -> float:
    found = check_parity(folder, [ParityText(kind="text", text=text) for text in TEXTS])
    return min(each.cosine for each in found)


def cosines(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return (ours * theirs).sum(1)


@pytest.mark.parametrize(
    ("layers", "reason"), [([], "rising"), ([2, 0], "rising"), ([0, 6], "0 to 5")]
)
def test_cut_layers_outside_the_model_are_refused(encoder: Encoder, layers: list[int], reason: str):
    with pytest.raises(ValueError, match=reason):
        cut_layers(encoder, layers)


def test_cut_layers_keeps_the_named_layers_and_the_original(encoder: Encoder, student: Encoder):
    kept = student.model.encoder.layer
    assert [len(kept), len(encoder.model.encoder.layer)] == [3, 6]
    for new, old in enumerate([0, 2, 5]):
        expected = encoder.model.encoder.layer[old].output.dense.weight
        assert torch.equal(kept[new].output.dense.weight, expected)
        assert kept[new].output.dense.weight is not expected
    everything = cut_layers(encoder, range(6))
    np.testing.assert_array_equal(everything.encode(["x"]), encoder.encode(["x"]))


@pytest.mark.parametrize("kind", ["modernbert", "qwen3", "gemma3_text", "mpnet"])
def test_layers_are_cut_from_any_stack_and_exported(
    kind: str, tiny_model: TinyModel, tmp_path: Path
):
    whole = Encoder.load(str(tiny_model(kind, tmp_path / "plain")), device="cpu")
    student = cut_layers(whole, [0, 2])
    assert student.num_parameters < whole.num_parameters
    student.save(tmp_path / "export", model_card="")
    restored = Encoder.load(str(tmp_path / "export"), device="cpu")
    np.testing.assert_allclose(restored.encode(TEXTS), student.encode(TEXTS), atol=1e-6)
    assert (whole.encode(TEXTS) * student.encode(TEXTS)).sum(1).max() < 0.999
    assert parity(tmp_path / "export") > 0.9999


def test_modernbert_keeps_its_first_layer(tiny_model: TinyModel, tmp_path: Path):
    encoder = Encoder.load(str(tiny_model("modernbert", tmp_path)), device="cpu")
    with pytest.raises(ValueError, match="keep layer 0"):
        cut_layers(encoder, [1, 2])


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "llama"])
@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_decoder_that_sees_both_ways_is_exported(
    kind: str, pooling: str, tiny_model: TinyModel, tmp_path: Path
):
    plain = str(tiny_model(kind, tmp_path / "plain"))
    decoder = Encoder.load(plain, device="cpu", pooling=pooling)
    before = decoder.encode(TEXTS)
    make_bidirectional(decoder)
    after = decoder.encode(TEXTS)
    assert cosines(before, after).min() < 0.99
    decoder.packed = False
    np.testing.assert_allclose(decoder.encode(TEXTS), after, atol=1e-5)
    decoder.save(tmp_path / "export", model_card="")
    restored = Encoder.load(str(tmp_path / "export"), device="cpu")
    np.testing.assert_allclose(restored.encode(TEXTS), after, atol=1e-5)
    assert parity(tmp_path / "export") > 0.9999


def test_encoder_that_sees_both_ways_already_is_refused(student: Encoder):
    with pytest.raises(ValueError, match="both ways already"):
        make_bidirectional(student)


def test_projection_is_trained_exported_and_restored(encoder: Encoder, tmp_path: Path):
    projected = cut_layers(encoder, [0])
    full = projected.encode(TEXTS)
    add_projection(projected, 96)
    assert projected.dimensions == 96
    small = projected.encode(TEXTS)
    kept = np.corrcoef((full @ full.T).ravel(), (small @ small.T).ravel())[0, 1]
    assert kept > 0.9  # random orthogonal directions keep similarities, more or less
    projected.embed(["a", "b c"])[:, 0].sum().backward()
    assert projected.model.projection[0].weight.grad.abs().sum() > 0
    projected.save(tmp_path, model_card="")
    assert (tmp_path / "2_Dense/model.safetensors").is_file()
    restored = Encoder.load(str(tmp_path), device="cpu")
    assert restored.dimensions == 96
    assert restored.num_parameters == projected.num_parameters
    np.testing.assert_allclose(restored.encode(TEXTS), small, atol=1e-6)
    assert parity(tmp_path) > 0.99999
