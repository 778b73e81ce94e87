"""How many tokens' activations fit in a GPU: found by trial steps, halved where they do not fit.

A trial is a pass over texts of the longest lengths. What does not grow with it is counted
separately: the optimizer's state, which the first step makes, and the loss over the whole
batch's vectors. The trial leaves no trace in the training.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from cluster.errors import UserError
from cluster.storage import Storage
from pipelines.training.agreement import highest, lowest
from pipelines.training.checkpoint import WORK
from pipelines.training.config import TrainerConfig, TrainingConfig
from pipelines.training.examples import Batch
from pipelines.training.gradients import Slice, batch_loss, embed, slice_batch
from pipelines.training.place import ALONE, Place
from pipelines.training.sharding import is_sharded

if TYPE_CHECKING:
    from actors.encoder import Encoder

FITTED = f"{WORK}/gradient_cache_tokens"  # what was found, or halved since, for a restart
_SHARE = 0.75  # of the memory that a trial may fill; fragments and uneven texts take from the rest
_TRIALS = 6
_EVERYTHING = 2**62  # more tokens than any batch has


def use_growing_segments() -> None:
    """Lets PyTorch's allocator grow its segments, unless the user has configured it.

    Passes differ in size, and the gaps between segments that cannot grow are of no use to them. To
    be called before the GPU is first used.
    """
    if not os.environ.get("PYTORCH_CUDA_ALLOC_CONF"):
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


class GpuMemory:
    """The memory of a GPU, with what PyTorch's allocator holds of it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def room(self) -> int:
        """Returns how many more bytes this process may take."""
        free, total = torch.cuda.mem_get_info(self._device)
        allowed = int(total * torch.cuda.get_per_process_memory_fraction(self._device))
        own = torch.cuda.memory_reserved(self._device)
        return min(free + own, allowed) - torch.cuda.memory_allocated(self._device)

    def taken_by(self, work: Callable[[], None]) -> int:
        """Returns how many bytes some work takes at its highest, unless it runs out of memory."""
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        work()
        return torch.cuda.max_memory_allocated(self._device) - before


def fit(
    encoder: Encoder,
    optimizer: torch.optim.Optimizer,
    config: TrainerConfig,
    place: Place = ALONE,
    *,
    like: Batch | None = None,
    memory: GpuMemory | None = None,
) -> TrainerConfig:
    """Replaces a gradient cache of ``auto`` by the number of tokens that fits all workers.

    All workers call this before their first batch, in training mode. On a CPU, and where the whole
    batch fits, there is no cache: it computes all but its last chunk twice. The optimizer's state
    is counted whether it is there yet or not. `like` is a batch of the training; `memory` is the
    GPU's, except in tests.

    Raises:
        UserError: Not even one text fits.
    """
    if config.gradient_cache_tokens != "auto":
        return config
    if memory is None and encoder.device.type == "cuda":
        memory = GpuMemory(encoder.device)
    tokens = _EVERYTHING
    if memory is not None:
        part = slice_batch(_longest_batch(encoder, config, like), config, place)
        with _untouched(encoder):
            tokens = _try_out(encoder, optimizer, config, part, memory)
    if place.world > 1:
        tokens = lowest(tokens, encoder.device)
    if not tokens:
        raise too_small(encoder, config)
    fitting = None if tokens == _EVERYTHING else tokens
    return config.model_copy(update={"gradient_cache_tokens": fitting})


def search_tokens(
    taken_by: Callable[[int], float], *, room: float, smallest: int, whole: int
) -> int:
    """Returns how many tokens a pass may have, found by a few passes.

    Args:
        taken_by: Runs a pass and returns its bytes, more than `room` where it ran out of memory.
        room: Bytes available.
        smallest: Tokens of the smallest pass.
        whole: Tokens of the largest pass that is ever needed.

    Returns:
        At most `whole`; 0 if not even the smallest pass fits.
    """
    fitting, taken = smallest, taken_by(smallest)
    if taken > room:
        return 0
    tokens = min(4 * smallest, whole)
    for _ in range(_TRIALS):
        if tokens <= fitting or (tokens < 1.05 * fitting and tokens < whole):
            break
        more = taken_by(tokens)
        if more > room:
            tokens //= 2
            continue
        per_token = max(1.0, (more - taken) / (tokens - fitting))
        fitting, taken = tokens, more
        tokens = min(whole, fitting + int((room - taken) / per_token))
    return fitting


def halve(encoder: Encoder, part: Slice, config: TrainerConfig) -> TrainerConfig:
    """Returns the configuration with half of the activations that have just not fitted.

    All workers call this together; of a sharded model's, only the one that ran out does.

    Raises:
        UserError: They were those of a single text.
    """
    lengths = [len(row) for row in part.rows]
    longest, total = max(lengths, default=1), sum(lengths)
    if len(part.sizes) > 1 and not is_sharded(encoder.model):
        longest, total = highest(longest, encoder.device), highest(total, encoder.device)
    if isinstance(config.gradient_cache_tokens, int):
        total = min(total, config.gradient_cache_tokens)
    if total <= longest:
        raise too_small(encoder, config)
    tokens = max(longest, total // 2)
    return config.model_copy(update={"gradient_cache_tokens": tokens})


def too_small(encoder: Encoder, config: TrainerConfig) -> UserError:
    """Says that a student cannot be trained on this device, and what to do."""
    device = encoder.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"this {device.type}"
    checkpointing = "" if config.gradient_checkpointing else "gradient_checkpointing: true, "
    return UserError(
        f"training the student does not fit in the memory of {name}:"
        f" set training.{checkpointing}a max_passage_tokens below {config.max_passage_tokens},"
        " or lora, or take a GPU with more memory"
    )


@contextmanager
def explain_out_of_memory(encoder: Encoder, config: TrainerConfig) -> Iterator[None]:
    """Raises the error of :func:`too_small` where PyTorch runs out of memory in the block."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise too_small(encoder, config) from error


def remembered(storage: Storage, config: TrainerConfig) -> TrainerConfig:
    """Returns the configuration with what :func:`remember` has left, if anything."""
    try:
        tokens = int(storage.read_bytes(FITTED))
    except FileNotFoundError:
        return config
    return config.model_copy(update={"gradient_cache_tokens": tokens})


def remember(storage: Storage, config: TrainerConfig) -> None:
    """Leaves the number of tokens for the workers that go on from the last checkpoint."""
    storage.write_bytes(FITTED, str(config.gradient_cache_tokens).encode())


def _longest_batch(encoder: Encoder, config: TrainerConfig, like: Batch | None) -> Batch:
    """Returns as large a batch as any; few texts are equally long, so that passes have padding."""

    def texts(longest: int, size: int = config.batch_size) -> list[np.ndarray]:
        return [
            np.zeros(longest - place * longest // (10 * size), np.int64) for place in range(size)
        ]

    if not isinstance(config, TrainingConfig):
        longest = max(config.max_query_tokens, config.max_passage_tokens)
        vectors = np.zeros((config.batch_size, encoder.dimensions), np.float32)
        return Batch.of_texts(0, "", texts(longest), vectors)
    if like and like.lists is not None:  # anchored passages are read in full
        queries = texts(config.max_query_tokens, len(like.queries))
        return replace(like, queries=queries, texts=texts(encoder.max_tokens, len(like.texts)))
    size = config.batch_size
    num_negatives = max(map(len, like.negatives), default=1) if like else 1
    negatives = [texts(config.max_passage_tokens) for _ in range(num_negatives)]
    return Batch(
        number=0,
        dataset="",
        queries=texts(config.max_query_tokens),
        positives=texts(config.max_passage_tokens),
        negatives=[[rows[place] for rows in negatives] for place in range(size)],
        teacher_scores=[[0.0] * (1 + num_negatives)] * size,
        query_ids=[f"q{place}" for place in range(size)],
        positive_ids=[f"p{place}" for place in range(size)],
        symmetric=True,
    )


def _try_out(
    encoder: Encoder,
    optimizer: torch.optim.Optimizer,
    config: TrainerConfig,
    part: Slice,
    memory: GpuMemory,
) -> int:
    """Returns how many tokens fit this worker, 0 for none."""
    rows = sorted(part.rows, key=len, reverse=True)
    ends = np.cumsum([len(row) for row in rows])

    def run(tokens: int) -> None:
        some = rows[: int(np.searchsorted(ends, tokens)) + 1]
        embed(encoder, some, config).sum().backward()  # type: ignore[no-untyped-call]

    def run_loss() -> None:
        leaf = torch.zeros(len(rows), encoder.dimensions, device=encoder.device).requires_grad_()
        batch_loss(leaf, part, config).backward()  # type: ignore[no-untyped-call]

    def taken_by(tokens: int) -> float:
        taken = float("inf")
        try:
            taken = memory.taken_by(lambda: run(tokens))
        except torch.OutOfMemoryError:
            if is_sharded(encoder.model):
                raise
        if is_sharded(encoder.model):  # whose workers make the same passes
            taken = highest(int(taken), encoder.device)
        return taken

    for_loss = memory.taken_by(run_loss)  # run by all workers, which wait for each other in it
    if taken_by(len(rows[0])) == float("inf"):  # makes the gradients too
        return 0
    room = _SHARE * (memory.room() - _missing_state(optimizer) - for_loss)
    whole = int(ends[-1])
    if is_sharded(encoder.model):
        room, whole = float(lowest(int(room), encoder.device)), lowest(whole, encoder.device)
    tokens = search_tokens(taken_by, room=room, smallest=len(rows[0]), whole=whole)
    return _EVERYTHING if tokens == whole else tokens


def _missing_state(optimizer: torch.optim.Optimizer) -> int:
    """Returns the bytes that AdamW has yet to take for its two averages of each gradient."""
    missing = 0
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if not optimizer.state.get(weight):
                own = weight.to_local() if isinstance(weight, DTensor) else weight
                missing += 2 * own.numel() * own.element_size()
    return missing


@contextmanager
def _untouched(encoder: Encoder) -> Iterator[None]:
    """Puts back what passes change: gradients, buffers, random numbers, counts."""
    model = encoder.model
    gradients = [(weight, weight.grad) for weight in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    counts = encoder.num_tokens, encoder.num_places
    devices = [encoder.device] if encoder.device.type == "cuda" else []
    model.zero_grad()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for weight, gradient in gradients:
            weight.grad = gradient
        for buffer, before in buffers:
            if not torch.equal(buffer, before):
                buffer.copy_(before)
        encoder.num_tokens, encoder.num_places = counts
        if devices:
            torch.cuda.empty_cache()
