"""One optimizer step: its learning rate, and a second attempt where memory runs out."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from pipelines.training.agreement import OutOfMemory
from pipelines.training.config import TrainerConfig
from pipelines.training.gradients import Slice, backward
from pipelines.training.memory import halve

if TYPE_CHECKING:
    from actors.encoder import Encoder


def make_optimizer(encoder: Encoder, config: TrainerConfig) -> torch.optim.AdamW:
    """Returns AdamW over what is trained; vectors, such as biases, do not decay."""
    weights = [weight for weight in encoder.model.parameters() if weight.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def learning_rate(config: TrainerConfig, batch: int, num_batches: int) -> float:
    """Returns the rate of batch `batch`: a linear rise to the highest, then a linear fall to 0."""
    warmup = round(config.warmup_ratio * num_batches)
    if batch < warmup:
        return config.learning_rate * (batch + 1) / warmup
    return config.learning_rate * (num_batches - batch) / (num_batches - warmup)


def train_batch(
    encoder: Encoder,
    optimizer: torch.optim.Optimizer,
    part: Slice,
    config: TrainerConfig,
    *,
    rate: float,
) -> tuple[float, float]:
    """Takes one optimizer step.

    Returns:
        The whole batch's loss, and the norm of its gradient before clipping.

    Raises:
        OutOfMemory: A worker's memory was too small; no weight has changed.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=False)
    loss = backward(encoder, part, config)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(weights, config.max_gradient_norm)
    optimizer.step()
    # A fused step does not raise the weights' versions, by which oneDNN notices outdated layouts.
    torch.autograd.graph.increment_version(weights)
    return loss, float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def train_fitting(
    encoder: Encoder,
    optimizer: torch.optim.Optimizer,
    part: Slice,
    config: TrainerConfig,
    *,
    rate: float,
    seed: int,
) -> tuple[float, float, TrainerConfig]:
    """Takes one optimizer step, and again with half of the activations if memory runs out.

    Returns:
        What :func:`train_batch` does, and the configuration that fitted: `config` itself or one
        with fewer `gradient_cache_tokens`.

    Raises:
        UserError: Not even one text at a time fits.
        torch.OutOfMemoryError: A sharded model, or the optimizer, does not fit.
    """
    while True:
        torch.manual_seed(seed)
        with suppress(OutOfMemory):
            return (*train_batch(encoder, optimizer, part, config, rate=rate), config)
        config = halve(encoder, part, config)
