"""The training core on a GPU: bfloat16 beside float32, ways to save memory, and the CPU's vectors.

Needs no Ray, no data and no model from elsewhere: the students have random weights.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, BertConfig, PretrainedConfig, Qwen3Config

from actors.encoder import Encoder
from actors.encoder_templates import PromptTemplates
from cluster.storage import open_storage
from pipelines.training.checkpoint import CheckpointWriter, load_checkpoint
from pipelines.training.config import LossConfig, TrainingConfig
from pipelines.training.examples import Batch
from pipelines.training.gradients import Slice, backward, slice_batch
from pipelines.training.layers import make_bidirectional
from pipelines.training.memory import fit, use_growing_segments
from pipelines.training.optimizer import train_batch, train_fitting

DEVICE = "cuda"
use_growing_segments()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU"),
]
VOCABULARY, BATCH_SIZE = 2000, 24
KINDS: dict[str, Callable[[], PretrainedConfig]] = {
    "bert": lambda: BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
    ),
    "qwen3": lambda: Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=512,
    ),
}
LOSS = LossConfig(
    matryoshka_dimensions=(64,),
    mask_duplicates=True,
    mask_margin=0.1,
    spread_out_weight=0.1,
    distillation_weight=0.1,
)
CONFIG = TrainingConfig(batch_size=BATCH_SIZE, loss=LOSS)

both_kinds = pytest.mark.parametrize("kind", KINDS)


def student(kind: str, device: str = DEVICE, pooling: str = "mean") -> Encoder:
    """The same weights on every device; larger than usual, so that texts differ."""
    torch.manual_seed(0)
    model = AutoModel.from_config(KINDS[kind](), dtype=torch.float32)
    for name, weight in model.named_parameters():
        if "norm" not in name.lower():
            weight.data.mul_(3)
    encoder = Encoder(
        model.to(device).eval(),
        SimpleNamespace(pad_token_id=0),
        pooling=pooling,
        max_tokens=256,
        templates=PromptTemplates(),
    )
    if kind == "qwen3":
        make_bidirectional(encoder)
    return encoder


def texts(rng: np.random.Generator, count: int, longest: int) -> list[np.ndarray]:
    return [rng.integers(1, VOCABULARY, rng.integers(3, longest + 1)) for _ in range(count)]


def batch(number: int = 0) -> Batch:
    """Every third example has no negative, and two share their positive."""
    rng = np.random.default_rng(number)
    negatives = [texts(rng, place % 3, 120) for place in range(BATCH_SIZE)]
    return Batch(
        number=number,
        dataset="random",
        queries=texts(rng, BATCH_SIZE, 30),
        positives=texts(rng, BATCH_SIZE, 120),
        negatives=negatives,
        teacher_scores=[
            list(rng.uniform(0, 2, 1 + len(rows))) if rows else [] for rows in negatives
        ],
        query_ids=[str(place) for place in range(BATCH_SIZE)],
        positive_ids=["0", *map(str, range(BATCH_SIZE - 1))],
        symmetric=False,
    )


def part(number: int = 0) -> Slice:
    return slice_batch(batch(number), CONFIG)


def gradient(encoder: Encoder, config: TrainingConfig) -> tuple[float, torch.Tensor]:
    """The loss of the first batch, and the gradients of all weights in one row."""
    encoder.model.zero_grad()
    torch.manual_seed(0)
    loss = backward(encoder, part(), config)
    found = [w.grad.flatten() for w in encoder.model.parameters() if w.grad is not None]
    return loss, torch.cat(found).double()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far apart two gradients are, in lengths of the first."""
    return float((one - other).norm() / one.norm())


def optimizer(encoder: Encoder) -> torch.optim.Optimizer:
    return torch.optim.AdamW(encoder.model.parameters(), fused=True)


def train(encoder: Encoder, state: torch.optim.Optimizer, config: TrainingConfig, *numbers: int):
    return [train_batch(encoder, state, part(n), config, rate=1e-4)[0] for n in numbers]


@both_kinds
def test_bfloat16_gives_the_loss_and_the_gradient_of_float32(kind: str):
    encoder = student(kind)
    loss, exact = gradient(encoder, CONFIG)
    rounded_loss, rounded = gradient(encoder, CONFIG.model_copy(update={"precision": "bfloat16"}))
    assert rounded_loss == pytest.approx(loss, rel=0.01)
    assert rounded_loss != loss  # else it was not bfloat16
    assert float(torch.cosine_similarity(exact, rounded, dim=0)) > 0.99
    assert float(rounded.norm()) == pytest.approx(float(exact.norm()), rel=0.02)


@both_kinds
def test_bfloat16_steps_lose_as_much_as_float32_ones(kind: str):
    losses = []
    for precision in ("float32", "bfloat16"):
        config = CONFIG.model_copy(update={"precision": precision})
        encoder = student(kind)
        losses.append(train(encoder, optimizer(encoder), config, *[0] * 10))
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert losses[1][-1] < 0.9 * losses[1][0]


@both_kinds
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.03)])
@pytest.mark.parametrize(
    "settings", [{"gradient_cache_tokens": 700}, {"gradient_checkpointing": 1}]
)
def test_saving_memory_changes_neither_loss_nor_gradients(
    kind: str, precision: str, tolerance: float, settings: dict[str, int]
):
    config = CONFIG.model_copy(update={"precision": precision})
    encoder = student(kind)
    loss, expected = gradient(encoder, config)
    saving = config.model_copy(update=settings)
    encoder.set_training(dropout=False, checkpointing=saving.gradient_checkpointing)
    again, found = gradient(encoder, saving)
    assert again == pytest.approx(loss, rel=tolerance)
    assert distance(expected, found) < tolerance


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradient_cache_repeats_its_dropout(precision: str, monkeypatch: pytest.MonkeyPatch):
    config = CONFIG.model_copy(update={"precision": precision, "gradient_cache_tokens": 700})
    encoder = student("bert")
    encoder.set_training(dropout=True)
    seen: list[torch.Tensor] = []
    embed = encoder.embed_tokens

    def recorded(*given: Any, **named: Any) -> torch.Tensor:
        seen.append(embed(*given, **named))
        return seen[-1]

    monkeypatch.setattr(encoder, "embed_tokens", recorded)
    torch.manual_seed(0)
    backward(encoder, part(), config)
    chunks = (len(seen) + 1) // 2
    assert chunks > 3
    # All without a graph but the last; then those again, with one.
    for first, again in zip(seen[: chunks - 1], seen[chunks:], strict=True):
        assert not first.requires_grad
        assert again.requires_grad
        torch.testing.assert_close(again, first, rtol=0, atol=1e-5)
    torch.manual_seed(1)
    backward(encoder, part(), config)
    assert not torch.allclose(seen[0], seen[2 * chunks - 1], atol=1e-2)  # other masks


@both_kinds
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_vectors_on_the_gpu_equal_those_on_the_cpu(kind: str, pooling: str):
    rows = texts(np.random.default_rng(0), 60, 200)
    rows += [row[:40] for row in rows if len(row) >= 40]  # a batch without padding, too
    vectors = []
    for device in (DEVICE, "cpu"):
        encoder = student(kind, device, pooling)
        with torch.inference_mode():
            vectors.append(encoder.embed_tokens(rows, batch_tokens=2000).cpu())
    assert float((vectors[0] * vectors[1]).sum(1).min()) > 0.9999
    nearest = (vectors[1] @ vectors[1].T).fill_diagonal_(-1).max()
    assert float(nearest) < 0.9995  # else any vector would do


@both_kinds
def test_training_goes_on_from_a_checkpoint(kind: str, tmp_path: Path):
    storage = open_storage(str(tmp_path))
    encoder = student(kind)
    state = optimizer(encoder)
    train(encoder, state, CONFIG, 0, 1)
    with CheckpointWriter(storage) as writer:
        writer.save(2, encoder.model, state)
    losses = train(encoder, state, CONFIG, 2, 3)
    resumed = student(kind)
    state = optimizer(resumed)
    assert load_checkpoint(storage, resumed.model, state) == 2
    assert train(resumed, state, CONFIG, 2, 3) == pytest.approx(losses, rel=1e-4)
    for expected, found in zip(encoder.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def _first_moment(state: torch.optim.Optimizer, weight: torch.Tensor) -> torch.Tensor:
    """AdamW's, or nothing for a weight that has no gradient, as those of BERT's pooler."""
    found = state.state.get(weight, {}).get("exp_avg")
    return torch.zeros(0) if found is None else found.clone()


def test_checkpoint_is_copied_before_the_next_step_changes_the_weights(tmp_path: Path):
    storage = open_storage(str(tmp_path))
    encoder = student("bert")
    state = optimizer(encoder)
    train(encoder, state, CONFIG, 0)
    weights = [weight.detach().clone() for weight in encoder.model.parameters()]
    moments = [_first_moment(state, weight) for weight in encoder.model.parameters()]
    with CheckpointWriter(storage) as writer:
        writer.save(1, encoder.model, state)
        train(encoder, state, CONFIG, 1, 2)
    resumed = student("bert")
    state = optimizer(resumed)
    assert load_checkpoint(storage, resumed.model, state) == 1
    for weight, expected, moment in zip(resumed.model.parameters(), weights, moments, strict=True):
        assert torch.equal(weight, expected)
        assert torch.equal(_first_moment(state, weight), moment)


@pytest.fixture
def limit() -> Iterator[Callable[[int], int]]:
    """Lets this process take so many MiB more of the GPU, and returns its bytes in all."""
    total = torch.cuda.mem_get_info()[1]

    def set_limit(more_mib: int) -> int:
        torch.cuda.empty_cache()
        allowed = torch.cuda.memory_reserved() + more_mib * 2**20
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        return allowed

    yield set_limit
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def long_part(config: TrainingConfig) -> Slice:
    """A batch of the longest texts."""
    rng = np.random.default_rng(0)

    def texts(length: int) -> list[np.ndarray]:
        return list(rng.integers(1, VOCABULARY, (config.batch_size, length)))

    ids = [str(place) for place in range(config.batch_size)]
    found = Batch(
        number=0,
        dataset="random",
        queries=texts(config.max_query_tokens),
        positives=texts(config.max_passage_tokens),
        negatives=[[row] for row in texts(config.max_passage_tokens)],
        teacher_scores=[[1.0, 0.5]] * config.batch_size,
        query_ids=[f"q{id_}" for id_ in ids],
        positive_ids=[f"p{id_}" for id_ in ids],
        symmetric=False,
    )
    return slice_batch(found, config)


@both_kinds
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_auto_finds_a_gradient_cache_that_fits(
    kind: str, precision: str, limit: Callable[[int], int]
):
    config = CONFIG.model_copy(update={"precision": precision, "batch_size": 768})
    part = long_part(config)
    encoder = student(kind)
    encoder.set_training(dropout=True)
    state = optimizer(encoder)
    small = config.model_copy(update={"batch_size": BATCH_SIZE})  # fits any card
    assert fit(encoder, state, small).gradient_cache_tokens is None
    allowed = limit(4000)
    before = torch.cuda.memory_allocated()
    weights = [weight.detach().clone() for weight in encoder.model.parameters()]
    own = torch.cuda.memory_allocated() - before
    torch.manual_seed(5)
    numbers = torch.rand(3, device=DEVICE)
    torch.manual_seed(5)
    fitted = fit(encoder, state, config)
    # No trace of it.
    assert torch.equal(torch.rand(3, device=DEVICE), numbers)
    assert torch.cuda.memory_allocated() - before - own < 2**20
    assert not state.state and all(w.grad is None for w in encoder.model.parameters())
    for weight, expected in zip(encoder.model.parameters(), weights, strict=True):
        assert torch.equal(weight, expected)
    # No step runs out of memory, and none leaves much of it.
    assert 256 < fitted.gradient_cache_tokens < sum(map(len, part.rows))
    torch.cuda.reset_peak_memory_stats()
    for seed in range(3):
        *_, after = train_fitting(encoder, state, part, fitted, rate=1e-5, seed=seed)
        assert after.gradient_cache_tokens == fitted.gradient_cache_tokens
    assert 0.5 * allowed < torch.cuda.max_memory_allocated() <= allowed


@both_kinds
def test_step_that_runs_out_of_memory_is_halved_and_loses_the_same(
    kind: str, limit: Callable[[int], int]
):
    config = CONFIG.model_copy(update={"batch_size": 128, "gradient_cache_tokens": None})
    part, found = long_part(config), []
    for more_mib in (None, 1000):
        encoder = student(kind)
        state, now, losses = optimizer(encoder), config, []
        if more_mib:
            limit(more_mib)
        for seed in range(4):
            loss, norm, now = train_fitting(encoder, state, part, now, rate=1e-4, seed=seed)
            losses += [loss, norm]
        found.append((losses, now.gradient_cache_tokens))
        del encoder, state
    (losses, none), (other_losses, tokens) = found
    assert none is None
    assert 256 <= tokens < sum(map(len, part.rows)) / 2
    assert other_losses == pytest.approx(losses, rel=1e-3)
