"""A training as one worker sees it: its batches, its validations and its end."""

from __future__ import annotations

import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from cluster.errors import TokayError
from cluster.storage import open_storage
from pipelines.encoders import TRAINED, upload_folder
from pipelines.training.checkpoint import (
    SOUP,
    average_weights,
    copy_weights,
    load_checkpoint,
    restart,
    save_weights,
    start_weights,
    trained_weights,
)
from pipelines.training.config import TrainerConfig
from pipelines.training.examples import Batch, iterate_batches, iterate_validation
from pipelines.training.gradients import Slice, slice_batch, uses_bfloat16
from pipelines.training.lora import add_adapters, merge_adapters
from pipelines.training.memory import fit, halve, remember, remembered
from pipelines.training.metrics import MetricsRow, read_metrics
from pipelines.training.optimizer import learning_rate, make_optimizer, train_fitting
from pipelines.training.place import Place
from pipelines.training.sharding import is_sharded, shard
from pipelines.training.validation import Validation, WatchedSet

if TYPE_CHECKING:
    from actors.encoder import Encoder


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is to do.

    Attributes:
        config: The training's configuration.
        examples: URI of the examples' folder.
        student: Folder, hub id or ``embedded:NAME`` of the encoder to start from.
        output: URI of the folder for checkpoints, metrics and the trained encoder.
        num_batches: How many batches the examples hold.
        test_set: What `config.validation.test_set` names, or None.
        trust_remote_code: Run Python code that comes with the student.
    """

    config: TrainerConfig
    examples: str
    student: str
    output: str
    num_batches: int
    test_set: WatchedSet | None = None
    trust_remote_code: bool = False


def load_student(job: Job, device: str | None) -> Encoder:
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


class Trainer:
    """One worker's part of a training; all workers call the same methods in the same order.

    Attributes:
        encoder: The student, or this worker's share of it.
        optimizer: AdamW over what is trained.
        config: The training's configuration, its gradient cache as large as memory allows.
        place: This worker's place.
        done: Number of batches that the weights have been trained on.
        ended: Whether there are no batches left to train on.
    """

    def __init__(self, job: Job, place: Place, encoder: Encoder) -> None:
        """Goes on from the last checkpoint, if there is one; `load_student` made `encoder`."""
        self.encoder, self.config, self.place = encoder, job.config, place
        if self.config.sharding == "fsdp2" and place.world > 1:
            shard(encoder.model, bfloat16=uses_bfloat16(self.config, encoder.device))
        self.optimizer = make_optimizer(encoder, self.config)
        self._job = job
        self._storage = open_storage(job.output)
        self._ends = _training_ends(self.config, job.num_batches)
        self._start = start_weights(encoder.model) if len(self._ends) > 1 else {}
        self.done = load_checkpoint(self._storage, encoder.model, self.optimizer)
        self.ended = False
        self._soup = _soup_batches(self.config, job.num_batches)
        self._validation = None
        if self.config.validation:
            rows = [row for row in read_metrics(self._storage) if row["batch"] < self.done]
            held_out = list(iterate_validation(job.examples))
            self._validation = Validation(self.config.validation, held_out, job.test_set, rows)

    def batches(self) -> Iterator[tuple[Batch, Slice]]:
        """Finds what fits in memory, then yields each batch, with this worker's part, to the end.

        Raises:
            UserError: Not even one text at a time fits.
        """
        self.encoder.set_training(
            dropout=self.config.dropout, checkpointing=self.config.gradient_checkpointing
        )
        batches = iterate_batches(self._job.examples, start=self.done, place=self.place)
        first = list(islice(batches, 1))
        self.config = fit(
            self.encoder,
            self.optimizer,
            remembered(self._storage, self.config),
            self.place,
            like=first[0] if first else None,
        )
        if self._job.config.gradient_cache_tokens == "auto" and self.config.gradient_cache_tokens:
            self._remember()  # so that a restart has the same passes, and their dropout
        parts = (
            (batch, slice_batch(batch, self.config, self.place)) for batch in chain(first, batches)
        )
        for pair in _ahead(parts):
            yield pair
            if self.ended:
                return

    def batch(self, batch: Batch, part: Slice) -> MetricsRow:
        """Takes one optimizer step.

        Returns:
            The batch's row of metrics.jsonl.

        Raises:
            UserError: Not even one text at a time fits.
            TokayError: A sharded student ran out of memory; the next start will have a smaller
                gradient cache.
        """
        start = time.perf_counter()
        encoder, before = self.encoder, self.config
        tokens, places = encoder.num_tokens, encoder.num_places
        steps = before.seed * self._job.num_batches + batch.number
        begin, end = self._training_of(batch.number)
        if batch.number == begin > 0:
            restart(self._start, encoder.model, self.optimizer)
        try:
            loss, norm, self.config = train_fitting(
                encoder,
                self.optimizer,
                part,
                before,
                rate=learning_rate(before, batch.number - begin, end - begin),
                seed=steps * self.place.world + self.place.rank,
            )
        except torch.OutOfMemoryError as error:
            if not is_sharded(encoder.model):
                raise
            # The others wait inside the model: they can only begin again.
            self.config = halve(encoder, part, before)
            remember(self._storage, self.config)
            raise TokayError(
                f"worker {self.place.rank} ran out of memory; the next start goes on from the last"
                f" checkpoint with gradient_cache_tokens {self.config.gradient_cache_tokens}"
            ) from error
        seconds = time.perf_counter() - start
        tokens, places = encoder.num_tokens - tokens, encoder.num_places - places
        self.done = batch.number + 1
        self.ended = self.done == self._job.num_batches
        if self.done in self._soup:
            write = self.place.rank == 0
            save_weights(self._storage, SOUP, self.done, encoder.model, write=write)
        row: MetricsRow = {
            "batch": batch.number,
            "dataset": batch.dataset,
            "loss": round(loss, 6),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": round(norm, 6),
            "examples_per_s": round(batch.num_examples / seconds, 2),
            "tokens_per_s": round(batch.num_tokens / seconds, 2),
            "padding_share": round(1 - tokens / max(1, places), 4),
        }
        if self.config.gradient_cache_tokens is not None:
            row["gradient_cache_tokens"] = self.config.gradient_cache_tokens
        if self.config is not before:
            row["out_of_memory"] = 1
            self._remember()
        return row

    def validate(self) -> MetricsRow:
        """Validates the student and stops the training early, where either is due.

        Returns:
            What to add to the batch's row.
        """
        if not self._validation or not self._validation.is_due(self.done, self._job.num_batches):
            return {}
        row, stop = self._validation.validate(
            self.encoder, self.config, self.place, done=self.done, storage=self._storage
        )
        self.ended = self.ended or stop
        return row

    def finish(self) -> None:
        """Writes the encoder: the best weights, a soup of the last ones, or the final ones.

        Raises:
            TokayError: The best weights are asked for, and every validation gave NaN.
        """
        encoder, config, sharded = self.encoder, self.config, is_sharded(self.encoder.model)
        weights = trained_weights(encoder.model) if sharded else {}
        if self.place.rank:
            return
        if sharded:
            encoder = load_student(self._job, "cpu")
            copy_weights(weights, encoder.model)
        if self._validation and config.validation and config.validation.patience:
            self._validation.take_best(self._storage, encoder.model)
        elif self._soup:
            average_weights(self._storage, encoder.model)
        if config.lora:
            merge_adapters(encoder.model)
        with tempfile.TemporaryDirectory() as folder:
            encoder.save(folder, model_card="# A student trained with Tokay, before its export\n")
            upload_folder(Path(folder), self._storage, TRAINED)

    def _training_of(self, number: int) -> tuple[int, int]:
        """Returns the first batch of the training that batch `number` is of, and its end."""
        place = bisect_right(self._ends, number)
        return self._ends[place - 1] if place else 0, self._ends[place]

    def _remember(self) -> None:
        if self.place.rank == 0:
            remember(self._storage, self.config)


def _training_ends(config: TrainerConfig, num_batches: int) -> list[int]:
    """Returns after how many batches each training ends; they differ by one batch at most."""
    trainings = min(config.soup_trainings, num_batches)
    return [num_batches * number // trainings for number in range(1, trainings + 1)]


def _soup_batches(config: TrainerConfig, num_batches: int) -> set[int]:
    """Returns after how many batches weights are kept; the final ones are there anyway."""
    if config.soup_trainings > 1:
        return set(_training_ends(config, num_batches)[:-1])
    apart = config.soup_every_batches or max(1, num_batches // 10)
    points = (num_batches - number * apart for number in range(1, config.soup_checkpoints))
    return {point for point in points if point > 0}


def _ahead(source: Iterator[T], depth: int = 4) -> Iterator[T]:
    """Yields the same items, made on a thread while earlier ones are in use."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = [pool.submit(next, source, None) for _ in range(depth)]
        while (item := coming.pop(0).result()) is not None:
            coming.append(pool.submit(next, source, None))
            yield item
