import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from actors.encoder import Encoder
from actors.kernels import packing
from actors.kernels.packing import ATTENTION, cut_batches, use_packing

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


@pytest.fixture
def flash_kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """FlashAttention's kernel in plain operations, and passes laid out as for a GPU."""
    calls: list[int] = []

    def kernel(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        starts: torch.Tensor,
        key_starts: torch.Tensor,
        longest: int,
        longest_key: int,
        dropout: float,
        causal: bool,
        debug: bool,
        *,
        scale: float,
        window_size_left: int,
        window_size_right: int,
    ) -> tuple[torch.Tensor]:
        assert starts is key_starts and starts.dtype == torch.int32
        assert longest == longest_key == int(starts.diff().max())
        assert starts[0] == 0 and starts[-1] == len(query) == len(key) == len(value)
        assert (dropout, debug) == (0.0, False)
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        found = []
        for start, end in itertools.pairwise(starts.tolist()):
            near = torch.ones(end - start, end - start, dtype=torch.bool)
            if window_size_left >= 0:
                near = near.triu(-window_size_left)
            if window_size_right >= 0:
                near = near.tril(window_size_right)
            if causal:
                near = near.tril()
            products = torch.einsum("qhd,khd->hqk", query[start:end] * scale, key[start:end])
            weights = products.masked_fill(~near, float("-inf")).softmax(-1)
            found.append(torch.einsum("hqk,khd->qhd", weights, value[start:end]))
        calls.append(len(found))
        return (torch.cat(found),)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", kernel)
    monkeypatch.setattr(packing, "_is_gpu", lambda device: True)
    return calls


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_flash_attention_gives_the_vectors_of_texts_alone(
    kind: str, pooling: str, flash_kernel: list[int], tiny_model: TinyModel, tmp_path: Path
):
    encoder = Encoder.load(str(tiny_model(kind, tmp_path)), device="cpu", pooling=pooling)
    with torch.no_grad():
        alone = one_by_one(tmp_path, encoder)
    np.testing.assert_allclose(encoder.encode(TEXTS), alone, atol=2e-5)
    np.testing.assert_allclose(encoder.encode(TEXTS, batch_tokens=40), alone, atol=2e-5)
    assert flash_kernel[0] == len(TEXTS) + 1  # the filler is one of them
    assert encoder.num_places % 128 == 0


@pytest.mark.parametrize("kind", ["bert", "modernbert", "qwen3"])
def test_flash_attention_has_the_gradients_of_padded_batches(
    kind: str, flash_kernel: list[int], tiny_model: TinyModel, tmp_path: Path
):
    encoder = Encoder.load(str(tiny_model(kind, tmp_path)), device="cpu")
    found = []
    for encoder.packed in (False, True):
        encoder.model.zero_grad()
        target = torch.randn(len(TEXTS), encoder.dimensions, generator=torch.manual_seed(1))
        (encoder.embed(TEXTS, batch_tokens=60) * target).sum().backward()
        weights = encoder.model.parameters()
        found.append(torch.cat([w.grad.flatten() for w in weights if w.grad is not None]))
    assert flash_kernel
    assert float((found[1] - found[0]).norm()) < 1e-4 * float(found[0].norm())


def test_flash_attention_takes_the_precision_of_autocast(
    flash_kernel: list[int], tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[torch.dtype] = []
    kernel = torch.ops.aten._flash_attention_forward

    def recorded(*given: Any, **named: Any) -> tuple[torch.Tensor]:
        seen.extend(each.dtype for each in given[:3])
        return kernel(*given, **named)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", recorded)
    encoder = Encoder.load(str(tiny_model("qwen3", tmp_path)), device="cpu")  # norms of heads
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        encoder.embed(TEXTS)
    assert set(seen) == {torch.bfloat16}


def test_gpu_without_half_precision_or_flash_attention_pads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    able = {"able": (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: able["able"])

    def packs(dtype: torch.dtype, size: int = 64, **settings: int) -> bool:
        config = SimpleNamespace(hidden_size=4 * size, num_attention_heads=4, **settings)
        model = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, config=config)
        return packing.can_pack(model)

    assert packs(torch.bfloat16) and packs(torch.float16) and packs(torch.bfloat16, head_dim=256)
    assert not packs(torch.float32)
    with monkeypatch.context() as autocast:
        autocast.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        assert packs(torch.float32)
    assert not packs(torch.bfloat16, 20)
    able["able"] = (8, 9)
    assert packs(torch.bfloat16) and not packs(torch.bfloat16, head_dim=256)
    able["able"] = (7, 5)
    assert not packs(torch.float16)


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
    pieces = packing.Layout([(3, 5), (1, 4), (1, 2)]).pieces(2, window)
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


def test_batches_are_cut_where_their_tokens_are_full():
    rows = [np.zeros(length) for length in (5, 4, 3, 3, 1)]

    def cut(batch_tokens: int, packed: bool) -> list[list[int]]:
        return [[len(row) for row in batch] for batch in cut_batches(rows, batch_tokens, packed)]

    assert cut(9, packed=True) == [[5, 4], [3, 3, 1]]
    assert cut(8, packed=True) == [[5], [4, 3], [3, 1]]
    assert cut(9, packed=False) == [[5], [4, 3], [3, 1]]  # a shorter text is as long as the first
    assert cut(8, packed=False) == [[5], [4, 3], [3, 1]]
    assert cut(7, packed=False) == [[5], [4], [3, 3], [1]]
    assert cut(2, packed=True) == cut(2, packed=False) == [[5], [4], [3], [3], [1]]
    assert cut(100, packed=True) == cut(100, packed=False) == [[5, 4, 3, 3, 1]]
    assert [[len(row) for row in batch] for batch in cut_batches(rows[:1], 1, True)] == [[5]]
