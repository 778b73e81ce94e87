"""The training loop that every Ray Train worker runs on its slice of each batch."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from cluster.storage import Storage, open_storage
from pipelines.training.checkpoint import load_checkpoint, save_checkpoint
from pipelines.training.config import TrainingConfig
from pipelines.training.examples import Batch, iterate_batches
from pipelines.training.loss import Vectors, contrastive_loss, related_examples

if TYPE_CHECKING:
    from actors.encoder import Encoder

METRICS = "metrics.jsonl"
ENCODER = "encoder"
_FLUSH_S = 1.0

MetricsRow = dict[str, float]
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
    """

    config: TrainingConfig
    examples: str
    student: str
    output: str
    num_batches: int


@dataclass(frozen=True, kw_only=True)
class _Slice:
    """A worker's part of one batch, as tokens, and where everybody's examples are."""

    queries: list[list[int]]
    positives: list[list[int]]
    negatives: list[list[int]]
    num_negatives: torch.Tensor  # of each example
    sizes: list[int]
    related: torch.Tensor | None


def train_worker(told: dict[str, Job]) -> None:
    """Trains on this worker's slices; rank 0 also writes metrics, checkpoints and the encoder."""
    import ray.train
    from ray.train.torch import get_device

    from actors.encoder import Encoder

    job = told["job"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    config, storage = job.config, open_storage(job.output)
    encoder = Encoder.load(
        job.student,
        max_tokens=max(config.max_query_tokens, config.max_passage_tokens),
        device=str(get_device()),
    )
    optimizer = _make_optimizer(encoder, config)
    done = load_checkpoint(storage, encoder.model, optimizer)
    log = _MetricsLog(storage, done)
    encoder.model.train(config.dropout)
    slices = (
        (batch.number, _slice(batch, encoder, config, rank, world))
        for batch in iterate_batches(job.examples, start=done)
    )
    for number, part in _ahead(slices):
        start = time.perf_counter()
        rate = learning_rate(config, number, job.num_batches)
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed((config.seed * job.num_batches + number) * world + rank)
        loss = _train_batch(encoder, optimizer, part, config, rank)
        row: MetricsRow = {
            "batch": number,
            "loss": round(loss, 6),
            "learning_rate": rate,
            "examples_per_s": round(sum(part.sizes) / (time.perf_counter() - start), 2),
        }
        done = number + 1
        checkpoint = done % config.checkpoint_every_batches == 0 and done < job.num_batches
        if rank == 0:
            log.append(row, flush=checkpoint or done == job.num_batches)
            if checkpoint:
                save_checkpoint(storage, done, encoder.model, optimizer)
        if checkpoint or done == job.num_batches:
            ray.train.report(row)
    if rank == 0:
        _save_encoder(encoder, storage)


def learning_rate(config: TrainingConfig, batch: int, num_batches: int) -> float:
    """Returns the rate of batch `batch`: a linear rise to the highest, then linear to nothing."""
    warmup = round(config.warmup_ratio * num_batches)
    if batch < warmup:
        return config.learning_rate * (batch + 1) / warmup
    return config.learning_rate * (num_batches - batch) / (num_batches - warmup)


def uses_bfloat16(config: TrainingConfig, device: torch.device) -> bool:
    """Says whether matrix products are bfloat16 on this device; ``auto`` asks the hardware."""
    if config.precision != "auto":
        return config.precision == "bfloat16"
    from actors.encoder import native_bfloat16

    return native_bfloat16(device)


def _make_optimizer(encoder: Encoder, config: TrainingConfig) -> torch.optim.AdamW:
    pooler = getattr(encoder.model, "pooler", None)
    if pooler is not None:  # BERT's, over the first token: no part of a mean-pooled vector
        pooler.requires_grad_(False)
    weights = [weight for weight in encoder.model.parameters() if weight.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def _slice(batch: Batch, encoder: Encoder, config: TrainingConfig, rank: int, world: int) -> _Slice:
    limits = (config.max_query_tokens, config.max_passage_tokens)

    def tokens(texts: Sequence[str], symmetric: Sequence[bool]) -> list[list[int]]:
        # A symmetric set's targets are queries, and a batch holds one set.
        limit = limits[0] if all(symmetric) else limits[1]
        return encoder.tokenize(texts, max_tokens=limit)

    own = slice(rank, None, world)
    negatives, symmetric = batch.negatives[own], batch.symmetric[own]
    related = None
    if config.mask_duplicates:
        order = [slice(worker, None, world) for worker in range(world)]
        related = related_examples(
            list(chain.from_iterable(batch.query_ids[part] for part in order)),
            list(chain.from_iterable(batch.positive_ids[part] for part in order)),
        )
    return _Slice(
        queries=encoder.tokenize(batch.queries[own], max_tokens=limits[0]),
        positives=tokens(batch.positives[own], symmetric),
        negatives=tokens(list(chain.from_iterable(negatives)), symmetric),
        num_negatives=torch.tensor([len(texts) for texts in negatives], dtype=torch.int64),
        sizes=[len(range(worker, len(batch.queries), world)) for worker in range(world)],
        related=related,
    )


def _train_batch(
    encoder: Encoder,
    optimizer: torch.optim.Optimizer,
    part: _Slice,
    config: TrainingConfig,
    rank: int,
) -> float:
    """Takes one optimizer step and returns the whole batch's loss."""
    device = encoder.device
    with torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(config, device)):
        embedded = encoder.embed_tokens([*part.queries, *part.positives, *part.negatives])
    queries, positives, found = torch.split(
        embedded, [len(part.queries), len(part.positives), len(part.negatives)]
    )
    counts = part.num_negatives.to(device)
    places = torch.arange(int(counts.max()) if len(counts) else 0, device=device)
    has_negative = places < counts[:, None]
    negatives = queries.new_zeros(*has_negative.shape, queries.shape[1])
    negatives[has_negative] = found
    vectors = Vectors(
        queries=queries, positives=positives, negatives=negatives, has_negative=has_negative
    )
    loss = contrastive_loss(vectors, config, sizes=part.sizes, rank=rank, related=part.related)
    optimizer.zero_grad(set_to_none=False)
    loss.backward()  # type: ignore[no-untyped-call]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    total = loss.detach()
    if len(part.sizes) > 1:
        _add_up_gradients(weights)
        dist.all_reduce(total)
    torch.nn.utils.clip_grad_norm_(weights, config.max_gradient_norm)
    optimizer.step()
    return float(total)


def _add_up_gradients(weights: Sequence[torch.nn.Parameter]) -> None:
    """Sums every weight's gradient over the workers, in one message."""
    gradients = [
        weight.grad if weight.grad is not None else torch.zeros_like(weight) for weight in weights
    ]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    parts = torch.split(flat, [weight.numel() for weight in weights])
    for weight, summed in zip(weights, parts, strict=True):
        weight.grad = summed.view_as(weight)


def _ahead(source: Iterator[T]) -> Iterator[T]:
    """Yields the same items, each made on a thread while the one before is at work."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = pool.submit(next, source, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, source, None)
            yield item


def _save_encoder(encoder: Encoder, storage: Storage) -> None:
    with tempfile.TemporaryDirectory() as folder:
        encoder.save(folder, model_card="# A student trained with Tokay, before its export\n")
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                storage.upload(file, f"{ENCODER}/{file.relative_to(folder).as_posix()}")


class _MetricsLog:
    """The rows of metrics.jsonl, each batch once, readable while the training runs."""

    def __init__(self, storage: Storage, done: int) -> None:
        self._storage = storage
        self._rows = [row for row in read_metrics(storage) if row["batch"] < done]
        self._flushed = 0.0
        self._pause_s = _FLUSH_S

    def append(self, row: MetricsRow, *, flush: bool) -> None:
        """Adds a row, and writes the file now and then; storage has no append."""
        self._rows.append(row)
        start = time.monotonic()
        if flush or start - self._flushed > self._pause_s:
            lines = "".join(json.dumps(row) + "\n" for row in self._rows)
            self._storage.write_bytes(METRICS, lines.encode())
            self._flushed = time.monotonic()
            self._pause_s = max(_FLUSH_S, 50 * (self._flushed - start))


def read_metrics(storage: Storage) -> list[MetricsRow]:
    """Returns what metrics.jsonl holds, nothing if it is not there yet."""
    try:
        content = storage.read_bytes(METRICS)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in content.splitlines()]
