import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from actors import packing
from actors.encoder import Encoder
from actors.packing import ATTENTION, use_packing

KINDS = ["bert", "electra", "roberta", "xlm-roberta", "modernbert", "qwen3", "gemma3_text", "llama"]
TEXTS = [
    "the boundary layer of a flat plate in a supersonic stream",
    "x",
    "",
    "naïve café — 雪が降る",
    "a passage that is much longer than the window of a local layer " * 3,
    "y",
    "two of one length",
    "two of same length",
]
TinyModel = Callable[..., Path]


def one_by_one(folder: Path, encoder: Encoder) -> torch.Tensor:
    """Last hidden states of transformers' own eager attention, a text at a time, pooled."""
    from transformers import AutoModel

    plain = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    pooled = []
    for row in encoder.tokenize(TEXTS):
        hidden = plain(input_ids=torch.tensor([row])).last_hidden_state[0]
        pooled.append({"mean": hidden.mean(0), "lasttoken": hidden[-1]}[encoder.pooling])
    return torch.nn.functional.normalize(torch.stack(pooled), dim=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_vectors_equal_those_of_texts_alone(
    kind: str, tiny_model: TinyModel, tmp_path: Path
):
    encoder = Encoder.load(str(tiny_model(kind, tmp_path)), device="cpu")
    assert encoder.packed
    with torch.no_grad():
        alone = one_by_one(tmp_path, encoder)
        with_gradient = encoder.embed(TEXTS, batch_tokens=40)
    np.testing.assert_allclose(encoder.encode(TEXTS), alone, atol=2e-5)
    np.testing.assert_allclose(encoder.encode(TEXTS, batch_tokens=40), alone, atol=2e-5)
    np.testing.assert_allclose(with_gradient, alone, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_gradients_equal_padded_ones(
    kind: str, checkpointing: bool, tiny_model: TinyModel, tmp_path: Path
):
    encoder = Encoder.load(str(tiny_model(kind, tmp_path)), device="cpu")
    target = torch.randn(len(TEXTS), encoder.dimensions, generator=torch.manual_seed(1))

    def gradients() -> dict[str, torch.Tensor]:
        encoder.model.zero_grad()
        (encoder.embed(TEXTS, batch_tokens=60) * target).sum().backward()
        return {
            name: weight.grad.clone()
            for name, weight in encoder.model.named_parameters()
            if weight.grad is not None
        }

    encoder.packed = False
    padded = gradients()
    encoder.packed = True
    runs: list[object] = []
    layer = next(m for m in encoder.model.modules() if isinstance(m, GradientCheckpointingLayer))
    layer.register_forward_pre_hook(lambda *_: runs.append(layer))
    packed = gradients()
    assert len(runs) > 1
    if checkpointing:
        passes = len(runs)
        encoder.set_training(dropout=False, checkpointing=True)
        encoder.encode(["leaves the mode as it is"])
        runs.clear()
        packed = gradients()
        assert len(runs) == 2 * passes
    assert packed.keys() == padded.keys() and len(packed) > 15
    for name, gradient in packed.items():
        largest = padded[name].abs().max().item()
        torch.testing.assert_close(gradient, padded[name], atol=2e-5 + 1e-4 * largest, rtol=0)


def test_packed_training_drops_what_the_model_drops(tiny_model: TinyModel, tmp_path: Path):
    folder = tiny_model("bert", tmp_path, attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
    encoder = Encoder.load(str(folder), device="cpu")
    encoder.model.train()
    with torch.no_grad():
        first, second = encoder.embed(TEXTS), encoder.embed(TEXTS)
        mean = torch.stack([encoder.embed(TEXTS) for _ in range(300)]).mean(0)
    assert (first - second).abs().max() > 0.01
    kept = torch.nn.functional.cosine_similarity(mean, torch.from_numpy(encoder.encode(TEXTS)))
    assert kept.min() > 0.95
    encoder.model.eval()
    assert torch.equal(encoder.embed(TEXTS), encoder.embed(TEXTS))


@pytest.mark.parametrize("length_step", [1, 3])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_has_the_gradients_of_its_values(
    dropout: float, window: int | None, length_step: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(packing, "_CACHED_WEIGHTS", 2 * 2 * 6**2)  # two texts at once
    monkeypatch.setattr(packing, "_LENGTH_STEP", length_step)
    draw = torch.Generator().manual_seed(2)
    rows = (torch.randn(1, 21, 2, 4, generator=draw, dtype=torch.float64) for _ in range(3))
    inputs = [row.transpose(1, 2).requires_grad_() for row in rows]
    pieces = packing._Layout([(3, 5), (1, 4), (1, 2)]).pieces(2, window)
    assert [piece.num_texts for piece in pieces] == (
        [2, 1, 1, 1] if length_step == 1 else [2, 2, 1]
    )

    def attention(*inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return packing._Attention.apply(*inputs, pieces, 0.5, dropout)

    assert torch.autograd.gradcheck(attention, inputs)
    alone = [
        torch.nn.functional.scaled_dot_product_attention(
            *(each[:, :, start : start + length] for each in inputs),
            attn_mask=torch.ones(length, length).tril(1).triu(-1).bool() if window else None,
            scale=0.5,
        )
        for start, length in ((0, 5), (5, 5), (10, 5), (15, 4), (19, 2))
    ]
    together = torch.cat(alone, dim=2).transpose(1, 2)
    assert torch.allclose(attention(*inputs), together) == (not dropout)


def test_a_pass_is_filled_by_at_most_a_sixteenth(tiny_model: TinyModel, tmp_path: Path):
    encoder = Encoder.load(str(tiny_model("bert", tmp_path)), device="cpu")
    sizes: list[int] = []
    encoder.model.encoder.register_forward_pre_hook(
        lambda _, inputs: sizes.append(inputs[0].shape[1])
    )
    for num_tokens in (1, 5, 31, 40, 100, 300):
        rows = [np.full(length, 7) for length in [10] * (num_tokens // 10) + [num_tokens % 10 or 1]]
        with torch.no_grad():
            assert len(encoder.embed_tokens(rows)) == len(rows)
        assert 0 <= sizes[-1] - sum(map(len, rows)) <= num_tokens / 16
    assert len(set(sizes)) == 6
    assert encoder.num_places == sum(sizes)
    encoder.packed = False
    before = encoder.num_tokens, encoder.num_places
    encoder.encode(["one two three", "one"])
    assert (encoder.num_tokens - before[0], encoder.num_places - before[1]) == (8, 10)


def test_padded_batches_of_a_packed_model_keep_their_masks(tiny_model: TinyModel, tmp_path: Path):
    encoder = Encoder.load(str(tiny_model("qwen3", tmp_path)), device="cpu")
    assert encoder.model.config._attn_implementation == ATTENTION
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        both = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
        short = encoder.model(input_ids=ids[1:, :2]).last_hidden_state
    torch.testing.assert_close(both[1, :2], short[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_texts_end_where_the_positions_do(kind: str, tiny_model: TinyModel, tmp_path: Path):
    folder = tiny_model(kind, tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["model_max_length"] = 10**30
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    encoder = Encoder.load(str(folder), device="cpu")
    assert encoder.max_tokens == 64
    vectors = encoder.encode(["word " * 200, "word " * 62])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)


def test_code_of_others_under_a_known_name_is_padded(tiny_model: TinyModel, tmp_path: Path):
    encoder = Encoder.load(str(tiny_model("bert", tmp_path)), device="cpu")
    other = copy.copy(encoder.model)
    other.__class__ = type("JinaBert", (type(encoder.model),), {"__module__": "modeling_jina"})
    assert not use_packing(other)


def test_kind_that_cannot_be_packed_is_padded(tiny_model: TinyModel, tmp_path: Path):
    encoder = Encoder.load(str(tiny_model("mpnet", tmp_path)), device="cpu")
    assert not encoder.packed
    np.testing.assert_allclose(
        encoder.encode(TEXTS), one_by_one(tmp_path, encoder).detach(), atol=2e-5
    )


def test_bfloat16_gradients_stay_near_float32(tiny_model: TinyModel, tmp_path: Path):
    encoder = Encoder.load(str(tiny_model("bert", tmp_path)), device="cpu")
    target = torch.randn(len(TEXTS), encoder.dimensions, generator=torch.manual_seed(1))
    found = []
    for precise in (True, False):
        encoder.model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            vectors = encoder.embed(TEXTS, batch_tokens=60)
        assert vectors.dtype == torch.float32
        (vectors * target).sum().backward()
        weights = encoder.model.encoder.parameters()
        found.append(torch.cat([weight.grad.flatten() for weight in weights]))
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.99


def test_bfloat16_stays_near_float32(tiny_model: TinyModel, tmp_path: Path):
    folder = str(tiny_model("bert", tmp_path))
    rough = Encoder.load(folder, device="cpu", dtype="bfloat16").encode(TEXTS)
    assert (rough * Encoder.load(folder, device="cpu").encode(TEXTS)).sum(1).min() > 0.995
