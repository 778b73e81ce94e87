"""Checkpoints: weights and optimizer in one safetensors file, so that it is whole or absent.

They hold what is trained and no more, and whole weights even where the model is sharded, so that
any number of workers can go on from them. All workers save together, and one of them writes.

Nothing else has a state: the learning rate, the random numbers and the place in the data follow
from the number of batches done.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cluster.storage import Storage
from pipelines.training.sharding import gather, share

if TYPE_CHECKING:
    from collections.abc import Iterator

WORK = "work"  # no part of a finished artifact
FOLDER = f"{WORK}/checkpoints"
SOUP = f"{WORK}/soup"
BEST = f"{WORK}/best"


class CheckpointWriter:
    """Writes one checkpoint at a time, on a thread, while the training goes on.

    Leaving its context waits for the thread.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def save(
        self,
        batches: int,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        write: bool = True,
    ) -> None:
        """Copies the state after `batches` batches and begins to write it, after the previous one.

        Once it is written the older ones are deleted. All workers call this; one of them writes.

        Raises:
            StorageError: The previous checkpoint could not be written: its copy or upload failed.
        """
        self.wait()
        tensors = _prefixed(trained_weights(model))
        for name, weights in model.named_parameters():
            for key, value in optimizer.state.get(weights, {}).items():
                tensors[f"optimizer/{key}/{name}"] = gather(value)
        if write:
            copied = _Copy(tensors)
            self._writing = self._pool.submit(_write, self._storage, batches, copied)

    def wait(self) -> None:
        """Waits until the last one is written; raises what its thread raised."""
        if self._writing:
            self._writing.result()

    def check(self) -> None:
        """Raises what the thread has raised, without waiting."""
        if self._writing and self._writing.done():
            self.wait()


def load_checkpoint(
    storage: Storage, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Restores the last checkpoint, if there is one.

    Returns:
        How many batches it was trained on; 0 without a checkpoint.
    """
    paths = storage.list(FOLDER)
    if not paths:
        return 0
    weights = dict(model.named_parameters())
    with _opened(storage, paths[-1]) as tensors, torch.no_grad():
        for key in tensors.keys():  # noqa: SIM118 (not a dict)
            kind, _, name = key.partition("/")
            if kind == "model":
                weights[name].copy_(share(tensors.get_tensor(key), weights[name]))
            else:
                state, _, name = name.partition("/")
                target = weights[name]
                optimizer.state[target][state] = share(tensors.get_tensor(key), target)
    return int(Path(paths[-1]).stem)


def save_weights(
    storage: Storage, folder: str, batches: int, model: torch.nn.Module, *, write: bool = True
) -> None:
    """Writes the weights alone, as they are after `batches` batches."""
    tensors = trained_weights(model)
    if write:
        _save(storage, _path(folder, batches), _prefixed(tensors))


def restore_weights(storage: Storage, folder: str, batches: int, model: torch.nn.Module) -> None:
    """Sets a whole model's weights to those that :func:`save_weights` wrote."""
    with _opened(storage, _path(folder, batches)) as tensors:
        weights = {name: tensors.get_tensor(f"model/{name}") for name in _trained(model)}
    copy_weights(weights, model)


def average_weights(storage: Storage, model: torch.nn.Module) -> None:
    """Sets a whole model's weights to the mean of theirs and of those written in `SOUP`.

    A soup of one training's checkpoints, as in Gemini Embedding (arXiv 2503.07891), or of several
    trainings' last weights (Model Soups, arXiv 2203.05482).
    """
    paths = storage.list(SOUP)
    weights = _trained(model)
    with torch.no_grad():
        total = {name: tensor.double() for name, tensor in weights.items()}
        for path in paths:
            with _opened(storage, path) as tensors:
                for name in total:
                    total[name] += tensors.get_tensor(f"model/{name}").to(total[name].device)
        for name, tensor in weights.items():
            tensor.copy_(total[name] / (len(paths) + 1))


def start_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns a copy of this worker's share of the trained weights, for :func:`restart`."""
    return {name: weights.detach().clone() for name, weights in _trained(model).items()}


def restart(
    start: Mapping[str, torch.Tensor], model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Sets the trained weights back to `start`, and the optimizer to one that has done nothing."""
    copy_weights(start, model)
    optimizer.state.clear()


def trained_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns the trained weights, a sharded model's whole on rank 0; all workers call this."""
    return {name: gather(weights.detach()) for name, weights in _trained(model).items()}


def copy_weights(weights: Mapping[str, torch.Tensor], model: torch.nn.Module) -> None:
    """Sets a whole model's trained weights to those that :func:`trained_weights` returned."""
    with torch.no_grad():
        for name, own in _trained(model).items():
            own.copy_(weights[name])


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: weights for name, weights in model.named_parameters() if weights.requires_grad}


class _Copy:
    """Tensors being copied to the CPU, while the GPU goes on with its work."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self._copied = None
        for name, tensor in tensors.items():
            copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._tensors[name] = copy.copy_(tensor, non_blocking=tensor.is_cuda)
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            self._copied = torch.cuda.current_stream(device).record_event()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the copies once they are complete."""
        if self._copied:
            self._copied.synchronize()
        return self._tensors


def _write(storage: Storage, batches: int, copied: _Copy) -> None:
    path = _path(FOLDER, batches)
    _save(storage, path, copied.tensors())
    for old in storage.list(FOLDER):
        if old < path:
            storage.delete(old)


def _prefixed(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"model/{name}": tensor for name, tensor in weights.items()}


def _path(folder: str, batches: int) -> str:
    return f"{folder}/{batches:09d}.safetensors"


def _save(storage: Storage, path: str, tensors: Mapping[str, torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
        storage.upload(file, path)


@contextmanager
def _opened(storage: Storage, path: str) -> Iterator[Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint"
        storage.download(path, file)
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
