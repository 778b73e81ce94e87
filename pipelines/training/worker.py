"""The training loop that every worker runs on its slice of each batch, with Ray Train or alone."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.distributed.tensor import DTensor

from cluster.errors import TokayError
from cluster.storage import Storage, open_storage
from pipelines.training.agreement import OutOfMemory
from pipelines.training.checkpoint import (
    SOUP,
    CheckpointWriter,
    average_weights,
    copy_weights,
    load_checkpoint,
    save_weights,
    trained_weights,
)
from pipelines.training.config import TrainingConfig
from pipelines.training.examples import iterate_batches
from pipelines.training.gradients import Slice, backward, slice_batch, uses_bfloat16
from pipelines.training.lora import add_adapters, merge_adapters
from pipelines.training.memory import (
    fit,
    halve,
    remember,
    remembered,
    too_small,
    use_growing_segments,
)
from pipelines.training.metrics import MetricsLog, MetricsRow, read_metrics
from pipelines.training.sharding import is_sharded, shard
from pipelines.training.validation import Validation, WatchedSet

if TYPE_CHECKING:
    from actors.encoder import Encoder

ENCODER = "encoder"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is told.

    Attributes:
        config: The training's configuration.
        examples: URI of the examples' folder.
        student: Folder, hub id or ``embedded:NAME`` of the encoder to start from.
        output: URI of the folder for checkpoints, metrics and the trained encoder.
        num_batches: How many batches the examples hold.
        test_set: What `config.validation.test_set` names, or None.
        trust_remote_code: Run Python code that comes with the student.
    """

    config: TrainingConfig
    examples: str
    student: str
    output: str
    num_batches: int
    test_set: WatchedSet | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class Place:
    """A worker's place among the others, who have joined one ``torch.distributed`` group.

    Attributes:
        rank: From 0.
        world: Number of workers.
        local_world: Number of workers on this machine.
        device: The GPU if there is one when None.
    """

    rank: int = 0
    world: int = 1
    local_world: int = 1
    device: str | None = None


def train_worker(told: dict[str, Job]) -> None:
    """What Ray Train calls on every worker."""
    import ray.train
    from ray.train.torch import get_device

    context, config = ray.train.get_context(), told["job"].config
    place = Place(
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        local_world=context.get_local_world_size(),
        # A worker without GPUs of its own sees them all the same.
        device=str(get_device()) if config.use_gpu else "cpu",
    )
    run_training(told["job"], place, report=ray.train.report)


def run_training(
    job: Job, place: Place, *, report: Callable[[MetricsRow], None] | None = None
) -> None:
    """Trains on this worker's slices; rank 0 also writes metrics, checkpoints and the encoder.

    Needs no Ray; ``run_training(job, Place())`` trains in this process.

    Args:
        job: What to train.
        place: This worker's place.
        report: Called for every checkpoint once it is whole and at the end, by all workers.

    Raises:
        UserError: The training does not fit in this worker's memory.
        TokayError: It does in smaller parts, with which the next start goes on.
    """
    use_growing_segments()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.local_world))
    storage = open_storage(job.output)
    encoder = _load_student(job, place.device)
    try:
        with CheckpointWriter(storage) as checkpoints:
            _train(job, place, encoder, storage, checkpoints, report or _tell_nobody)
    except torch.OutOfMemoryError as error:
        raise too_small(encoder, job.config) from error


def _train(
    job: Job,
    place: Place,
    encoder: Encoder,
    storage: Storage,
    checkpoints: CheckpointWriter,
    report: Callable[[MetricsRow], None],
) -> None:
    rank, world, config = place.rank, place.world, job.config
    if config.sharding == "fsdp2" and world > 1:
        shard(encoder.model, bfloat16=uses_bfloat16(config, encoder.device))
    optimizer = make_optimizer(encoder, config)
    done = load_checkpoint(storage, encoder.model, optimizer)
    parameters = config.model_dump(mode="json")
    log = MetricsLog(storage, done, config.tracking, parameters) if rank == 0 else None
    validation = None
    if config.validation:
        rows = [row for row in read_metrics(storage) if row["batch"] < done]
        validation = Validation.open(config.validation, job.examples, job.test_set, rows)
    soup = _soup_batches(config, job.num_batches)
    encoder.set_training(dropout=config.dropout, checkpointing=config.gradient_checkpointing)
    batches = iterate_batches(job.examples, start=done)
    first = list(islice(batches, 1))
    config = fit(
        encoder,
        optimizer,
        remembered(storage, config),
        num_negatives=max((len(rows) for batch in first for rows in batch.negatives), default=1),
        rank=rank,
        world=world,
    )
    if rank == 0 and job.config.gradient_cache_tokens == "auto" and config.gradient_cache_tokens:
        remember(storage, config)  # so that a restart has the same passes, and their dropout
    slices = ((each, slice_batch(each, config, rank, world)) for each in chain(first, batches))
    due: MetricsRow = {}
    for batch, part in _ahead(slices):
        checkpoints.check()
        start = time.perf_counter()
        tokens, places = encoder.num_tokens, encoder.num_places
        before = config
        try:
            loss, norm, config = train_fitting(
                encoder,
                optimizer,
                part,
                config,
                rate=learning_rate(config, batch.number, job.num_batches),
                rank=rank,
                seed=(config.seed * job.num_batches + batch.number) * world + rank,
            )
        except torch.OutOfMemoryError as error:
            if not is_sharded(encoder.model):
                raise
            # The others wait inside the model: they can only begin again.
            config = halve(encoder, part, config)
            remember(storage, config)
            raise TokayError(
                f"worker {rank} ran out of memory; the next start goes on from the last checkpoint"
                f" with gradient_cache_tokens {config.gradient_cache_tokens}"
            ) from error
        seconds = time.perf_counter() - start
        tokens, places = encoder.num_tokens - tokens, encoder.num_places - places
        done = batch.number + 1
        row: MetricsRow = {
            "batch": batch.number,
            "dataset": batch.dataset,
            "loss": round(loss, 6),
            "learning_rate": optimizer.param_groups[0]["lr"],
            "gradient_norm": round(norm, 6),
            "examples_per_s": round(len(batch.queries) / seconds, 2),
            "tokens_per_s": round(batch.num_tokens / seconds, 2),
            "padding_share": round(1 - tokens / max(1, places), 4),
        }
        if config.gradient_cache_tokens is not None:
            row["gradient_cache_tokens"] = config.gradient_cache_tokens
        if config is not before:
            row["out_of_memory"] = 1
            if rank == 0:
                remember(storage, config)
        stop = False
        if validation and validation.is_due(done, job.num_batches):
            found, stop = validation.look(
                encoder, config, done=done, rank=rank, world=world, storage=storage
            )
            row |= found
        ended = stop or done == job.num_batches
        checkpoint = done % config.checkpoint_every_batches == 0 and not ended
        if log:
            log.append(row, flush=checkpoint or ended)
        if done in soup:
            save_weights(storage, SOUP, done, encoder.model, write=rank == 0)
        if checkpoint or ended:
            checkpoints.wait()
            if due:
                report(due)
            due = row
        if checkpoint:
            checkpoints.save(done, encoder.model, optimizer, write=rank == 0)
        if ended:
            break
    if due:
        report(due)
    if is_sharded(encoder.model):
        weights = trained_weights(encoder.model)
        if rank == 0:
            encoder = _load_student(job, "cpu")
            copy_weights(weights, encoder.model)
    if log:
        if validation and config.validation and config.validation.patience:
            validation.take_best(storage, encoder.model)
        elif soup:
            average_weights(storage, encoder.model)
        if config.lora:
            merge_adapters(encoder.model)
        _save_encoder(encoder, storage)
        log.close()


def learning_rate(config: TrainingConfig, batch: int, num_batches: int) -> float:
    """Returns the rate of batch `batch`: a linear rise to the highest, then linear to nothing."""
    warmup = round(config.warmup_ratio * num_batches)
    if batch < warmup:
        return config.learning_rate * (batch + 1) / warmup
    return config.learning_rate * (num_batches - batch) / (num_batches - warmup)


def _load_student(job: Job, device: str | None) -> Encoder:
    """Returns the student before its first batch, with what is not trained frozen."""
    from actors.encoder import Encoder

    config = job.config
    encoder = Encoder.load(job.student, device=device, trust_remote_code=job.trust_remote_code)
    pooler = getattr(encoder.model, "pooler", None)
    if pooler is not None:  # BERT's, over the first token: no part of a mean-pooled vector
        pooler.requires_grad_(False)
    if config.lora:
        add_adapters(encoder.model, config.lora, config.seed)
    return encoder


def make_optimizer(encoder: Encoder, config: TrainingConfig) -> torch.optim.AdamW:
    """Returns AdamW over what is trained; vectors, such as biases, do not decay."""
    weights = [weight for weight in encoder.model.parameters() if weight.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def train_fitting(
    encoder: Encoder,
    optimizer: torch.optim.Optimizer,
    part: Slice,
    config: TrainingConfig,
    *,
    rate: float,
    rank: int = 0,
    seed: int,
) -> tuple[float, float, TrainingConfig]:
    """Takes one optimizer step, again with half of the activations where memory runs out.

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
            return (*train_batch(encoder, optimizer, part, config, rate=rate, rank=rank), config)
        config = halve(encoder, part, config)


def train_batch(
    encoder: Encoder,
    optimizer: torch.optim.Optimizer,
    part: Slice,
    config: TrainingConfig,
    *,
    rate: float,
    rank: int = 0,
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
    loss = backward(encoder, part, config, rank)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(weights, config.max_gradient_norm)
    optimizer.step()
    # A fused step changes weights without a sign of it, by which oneDNN's layouts are known as old.
    torch.autograd.graph.increment_version(weights)
    return loss, float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _tell_nobody(_: MetricsRow) -> None: ...


def _soup_batches(config: TrainingConfig, num_batches: int) -> set[int]:
    """Returns after which batches the weights are kept; the last ones are there anyway."""
    apart = config.soup_every_batches or max(1, num_batches // 10)
    points = (num_batches - number * apart for number in range(1, config.soup_checkpoints))
    return {point for point in points if point > 0}


def _ahead(source: Iterator[T], depth: int = 4) -> Iterator[T]:
    """Yields the same items, made on a thread while those before are at work."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = [pool.submit(next, source, None) for _ in range(depth)]
        while (found := coming.pop(0).result()) is not None:
            coming.append(pool.submit(next, source, None))
            yield found


def _save_encoder(encoder: Encoder, storage: Storage) -> None:
    with tempfile.TemporaryDirectory() as folder:
        encoder.save(folder, model_card="# A student trained with Tokay, before its export\n")
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                storage.upload(file, f"{ENCODER}/{file.relative_to(folder).as_posix()}")
