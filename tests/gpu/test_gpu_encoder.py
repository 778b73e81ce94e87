"""The encoder on a GPU without padding: beside padded batches and the CPU's float32.

Needs no Ray, no data and no model from elsewhere: the encoders have random weights.
"""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, BertConfig, ModernBertConfig, PretrainedConfig, Qwen3Config

from actors.encoder import Encoder
from actors.encoder_templates import PromptTemplates
from actors.kernels.flash import can_flash
from pipelines.training.layers import make_bidirectional

DEVICE = "cuda"
VOCABULARY, WINDOW = 2000, 16
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
}
QWEN3 = {**SIZES, "num_key_value_heads": 2, "head_dim": 64}
KINDS: dict[str, Callable[[], PretrainedConfig]] = {
    "bert": lambda: BertConfig(**SIZES, attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.0),
    "modernbert": lambda: ModernBertConfig(
        **SIZES, pad_token_id=0, local_attention=2 * WINDOW, global_attn_every_n_layers=2
    ),
    "qwen3": lambda: Qwen3Config(**QWEN3),
    "qwen3, both ways": lambda: Qwen3Config(**QWEN3),
}
LARGE: dict[str, Callable[[], PretrainedConfig]] = {
    "bert-base": BertConfig,
    "modernbert-base": lambda: ModernBertConfig(pad_token_id=0),
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
        reason="PyTorch finds no GPU that has FlashAttention",
    ),
]
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(
    kind: str, device: str = DEVICE, dtype: torch.dtype = torch.float32, pooling: str = "mean"
) -> Encoder:
    """The same weights on every device; larger than usual, so that texts differ."""
    torch.manual_seed(0)
    model = AutoModel.from_config(KINDS[kind](), dtype=torch.float32)
    for name, weight in model.named_parameters():
        if "norm" not in name.lower():
            weight.data.mul_(3)
    encoder = wrap(model.to(device, dtype), pooling)
    if "both" in kind:
        make_bidirectional(encoder)
    return encoder


def wrap(model: Any, pooling: str = "mean") -> Encoder:
    tokenizer = SimpleNamespace(pad_token_id=0)
    templates = PromptTemplates()
    model = model.eval()
    return Encoder(model, tokenizer, pooling=pooling, max_tokens=384, templates=templates)


def texts(count: int, vocabulary: int = VOCABULARY) -> list[np.ndarray]:
    """Token ids, in lengths like those of questions and answers; the first one is a single."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.5, 0.8, count), 2, 384).astype(int)
    lengths[0], lengths[1] = 1, 384
    return [rng.integers(1, vocabulary, length) for length in lengths]


def embed(encoder: Encoder, rows: list[np.ndarray], *, packed: bool) -> torch.Tensor:
    encoder.packed, encoder.num_tokens, encoder.num_places = packed, 0, 0
    with torch.inference_mode():
        return encoder.embed_tokens(rows, batch_tokens=4000).cpu()


def gradient(encoder: Encoder, rows: list[np.ndarray], *, packed: bool) -> torch.Tensor:
    encoder.packed = packed
    encoder.model.zero_grad()
    target = torch.randn(len(rows), encoder.dimensions, generator=torch.manual_seed(1))
    with torch.autocast(DEVICE, torch.bfloat16):
        vectors = encoder.embed_tokens(rows, batch_tokens=4000)
    (vectors * target.to(DEVICE)).sum().backward()
    weights = encoder.model.parameters()
    return torch.cat([w.grad.flatten() for w in weights if w.grad is not None]).double()


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_packed_vectors_equal_padded_ones_and_the_cpus(kind: str, dtype: torch.dtype, pooling: str):
    exact, encoder = make(kind, "cpu", pooling=pooling), make(kind, dtype=dtype, pooling=pooling)
    rows = texts(60)
    expected = embed(exact, rows, packed=True)
    padded = embed(encoder, rows, packed=False)
    packed = embed(encoder, rows, packed=True)
    assert encoder.num_places - encoder.num_tokens < 128 * 4  # else it was padded
    lowest = float((padded * expected).sum(1).min())
    assert float((packed * expected).sum(1).min()) > min(0.999, lowest - 0.0005)
    assert float((packed * padded).sum(1).min()) > 0.999


@every_kind
def test_packed_gradients_equal_padded_ones(kind: str):
    encoder, rows = make(kind), texts(60)
    padded = gradient(encoder, rows, packed=False)
    packed = gradient(encoder, rows, packed=True)
    assert float((packed - padded).norm() / padded.norm()) < 0.02
    encoder.set_training(dropout=False, checkpointing=True)
    again = gradient(encoder, rows, packed=True)
    assert float((again - packed).norm() / packed.norm()) < 0.01


def test_dropout_of_attention_follows_the_seed():
    encoder, rows = make("bert"), texts(20)
    encoder.set_training(dropout=True)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            assert can_flash(encoder.model)
            found.append(encoder.embed_tokens(rows))
    assert torch.equal(found[0], found[1])
    assert float((found[0] - found[2]).abs().max()) > 0.01


def test_float32_is_padded():
    encoder = make("bert")
    embed(encoder, texts(20), packed=True)
    assert encoder.num_places > 1.05 * encoder.num_tokens


def test_a_packed_pass_waits_for_nothing():
    encoder, rows = make("modernbert", dtype=torch.bfloat16), texts(60)
    with torch.inference_mode():
        encoder.embed_tokens(rows)  # makes what is made once
        torch.cuda.set_sync_debug_mode("error")
        try:
            encoder.embed_tokens(rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", LARGE)
def test_packed_batches_are_faster(kind: str):
    with torch.device(DEVICE):
        model = AutoModel.from_config(LARGE[kind](), dtype=torch.bfloat16)
    encoder = wrap(model)
    rows = texts(2000, 30000)
    seconds = {}
    for packed in (False, True, False, True):  # the first round warms up
        torch.cuda.synchronize()
        began = time.perf_counter()
        encoder.packed = packed
        encoder.num_tokens = encoder.num_places = 0
        with torch.inference_mode():
            encoder.embed_tokens(rows)
        torch.cuda.synchronize()
        seconds[packed] = time.perf_counter() - began
        share = 1 - encoder.num_tokens / encoder.num_places
        print(
            f"{kind}, {'packed' if packed else 'padded'}: "
            f"{encoder.num_tokens / seconds[packed]:,.0f} tokens/s, {share:.1%} padding"
        )
    assert seconds[True] < 1.1 * seconds[False]
