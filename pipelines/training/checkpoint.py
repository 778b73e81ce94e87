"""Checkpoints: weights and optimizer in one safetensors file, so that it is whole or absent."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cluster.storage import Storage

FOLDER = "work/checkpoints"  # what lies under work/ is no part of a finished artifact


def save_checkpoint(
    storage: Storage, batches: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Writes a checkpoint after so many batches and deletes the older ones."""
    tensors = {}
    for name, weights in model.named_parameters():
        tensors[f"model/{name}"] = weights.detach()
        for key, value in optimizer.state.get(weights, {}).items():
            tensors[f"optimizer/{key}/{name}"] = value
    path = f"{FOLDER}/{batches:09d}.safetensors"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
        storage.upload(file, path)
    for old in storage.list(FOLDER):
        if old < path:
            storage.delete(old)


def load_checkpoint(
    storage: Storage, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Restores the last checkpoint, if there is one.

    Returns:
        How many batches it has behind it; 0 without a checkpoint.
    """
    paths = storage.list(FOLDER)
    if not paths:
        return 0
    weights = dict(model.named_parameters())
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = Path(folder) / "checkpoint"
        storage.download(paths[-1], file)
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                kind, _, name = key.partition("/")
                if kind == "model":
                    weights[name].copy_(tensors.get_tensor(key))
                else:
                    state, _, name = name.partition("/")
                    target = weights[name]
                    optimizer.state[target][state] = tensors.get_tensor(key).to(target.device)
    return int(Path(paths[-1]).stem)
