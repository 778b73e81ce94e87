"""Adapters on a BERT and on a decoder: what they train, what they leave, what comes out."""

import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from actors.encoder import Encoder
from cluster.errors import UserError
from cluster.storage import open_storage
from pipelines.training.checkpoint import FOLDER, CheckpointWriter, load_checkpoint
from pipelines.training.config import LoraConfig, TrainingConfig
from pipelines.training.examples import iterate_batches
from pipelines.training.gradients import slice_batch
from pipelines.training.layers import add_projection
from pipelines.training.lora import add_adapters, merge_adapters
from pipelines.training.optimizer import make_optimizer, train_batch
from pipelines.training.place import Place
from pipelines.training.trainer import Job
from pipelines.training.worker import run_training

TEXTS = ["boundary layer", "supersonic flow over a wing", ""]
LORA = LoraConfig(rank=4, alpha=8, dropout=0.1)


def adapted(folder: Path, config: LoraConfig = LORA, *, projected: bool = False) -> Encoder:
    encoder = Encoder.load(str(folder), device="cpu")
    if projected:
        add_projection(encoder, 16)
    add_adapters(encoder.model, config, seed=0)
    return encoder


def train(
    encoder: Encoder, examples: str, *, dropout: bool = False, **settings: Any
) -> list[float]:
    config = TrainingConfig(batch_size=16, lora=LORA, **settings)
    optimizer = make_optimizer(encoder, config)
    encoder.set_training(dropout=dropout, checkpointing=config.gradient_checkpointing)
    torch.manual_seed(0)
    losses = [
        train_batch(encoder, optimizer, slice_batch(batch, config), config, rate=1e-2)[0]
        for batch in islice(iterate_batches(examples), 3)
    ]
    encoder.model.eval()
    return losses


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_adapters_alone_are_trained_and_end_in_plain_weights(
    kind: str, tiny_model: Callable[..., Path], examples: str, tmp_path: Path
):
    folder = tiny_model(kind, tmp_path / "plain")
    start = Encoder.load(str(folder), device="cpu")
    encoder = adapted(folder)
    np.testing.assert_array_equal(encoder.encode(TEXTS), start.encode(TEXTS))
    train(
        encoder,
        examples,
        dropout=True,
        precision="bfloat16",
        gradient_cache_tokens=400,
        gradient_checkpointing=True,
    )
    before = dict(start.model.named_parameters())
    trained = 0
    for name, weight in encoder.model.named_parameters():
        if "lora_" in name:
            assert weight.requires_grad
            trained += weight.numel()
        else:
            assert not weight.requires_grad
            assert torch.equal(weight, before[name.replace(".base_layer", "")])
    layers = start.model.layers if kind == "qwen3" else start.model.encoder.layer
    linear = [each for each in layers.modules() if isinstance(each, torch.nn.Linear)]
    assert trained == sum(LORA.rank * (each.in_features + each.out_features) for each in linear)

    found = encoder.encode(TEXTS)
    assert (found * start.encode(TEXTS)).sum(1).max() < 0.999
    merge_adapters(encoder.model)
    assert [name for name, _ in encoder.model.named_parameters()] == list(before)
    np.testing.assert_allclose(encoder.encode(TEXTS), found, atol=1e-5)
    encoder.save(tmp_path / "saved", model_card="")
    saved = Encoder.load(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(saved.encode(TEXTS), found, atol=1e-5)


def test_gradient_cache_and_checkpointing_train_the_same_adapters(
    tiny_model: Callable[..., Path], examples: str, tmp_path: Path
):
    folder = tiny_model("bert", tmp_path / "plain")
    found = []
    for settings in ({}, {"gradient_cache_tokens": 400, "gradient_checkpointing": True}):
        encoder = adapted(folder)
        found.append((train(encoder, examples, **settings), encoder.encode(TEXTS)))
    (losses, vectors), (other_losses, other_vectors) = found
    assert other_losses == pytest.approx(losses, rel=1e-3)
    np.testing.assert_allclose(other_vectors, vectors, atol=5e-3)


def test_checkpoint_holds_adapters_and_projection_alone(
    tiny_model: Callable[..., Path], examples: str, tmp_path: Path
):
    folder, storage = tiny_model("bert", tmp_path / "plain"), open_storage(tmp_path / "storage")
    config = LoraConfig(rank=2, target=("query", "attention.output.dense"))
    encoder = adapted(folder, config, projected=True)
    train(encoder, examples)
    optimizer = make_optimizer(encoder, TrainingConfig())
    with CheckpointWriter(storage) as writer:
        writer.save(3, encoder.model, optimizer)
    (checkpoint,) = (tmp_path / "storage" / FOLDER).iterdir()
    names = {re.sub(r"encoder\.layer\.\d+\.|\.lora_.*", "", name) for name in load_file(checkpoint)}
    assert names == {
        f"model/{name}"
        for name in ("attention.self.query", "attention.output.dense", "projection.0.weight")
    }
    again = adapted(folder, config, projected=True)
    assert load_checkpoint(storage, again.model, make_optimizer(again, TrainingConfig())) == 3
    np.testing.assert_array_equal(again.encode(TEXTS), encoder.encode(TEXTS))


def test_target_that_no_layer_has_is_refused(tiny_model: Callable[..., Path], tmp_path: Path):
    folder = tiny_model("bert", tmp_path / "plain")
    with pytest.raises(UserError, match=r"q_proj.*accepted are all-linear and dense, key, query"):
        adapted(folder, LoraConfig(target=("q_proj",)))


def test_soup_of_adapters_ends_in_the_weights_of_linear_layers(
    examples: str, student: str, tmp_path: Path
):
    config = TrainingConfig(batch_size=16, lora=LORA, soup_checkpoints=2, tracking=())
    job = Job(
        config=config, examples=examples, student=student, output=str(tmp_path), num_batches=12
    )
    run_training(job, Place(device="cpu"))
    model = Encoder.load(str(tmp_path / "encoder"), device="cpu").model
    start = dict(Encoder.load(student, device="cpu").model.named_parameters())
    changed = {name for name, w in model.named_parameters() if not torch.equal(w, start[name])}
    assert changed == {name for name, w in start.items() if "encoder.layer" in name and w.ndim == 2}
