"""Watching a training: the loss of held-out examples, nDCG@10 of a test set, early stopping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from cluster.errors import TokayError, UserError
from cluster.storage import Storage
from pipelines.training.checkpoint import BEST, restore_weights, save_weights
from pipelines.training.config import TrainerConfig, ValidationConfig
from pipelines.training.examples import Batch
from pipelines.training.gradients import evaluation_loss, slice_batch
from pipelines.training.metrics import MetricsRow
from pipelines.training.place import Place
from pipelines.training.sharding import is_sharded

if TYPE_CHECKING:
    from actors.encoder import Encoder
    from pipelines.datasets.retrieval import RetrievalDataset

LOSS = "validation_loss"
NDCG = "validation_ndcg_at_10"


@dataclass(frozen=True, kw_only=True)
class WatchedSet:
    """A retrieval set that a training is watched on.

    Attributes:
        data: Its passages, queries and qrels.
        task: For the query template, as the evaluation gives it; its own if None.
    """

    data: RetrievalDataset
    task: str | None = None


class Validation:
    """What a training is judged by while it runs.

    Attributes:
        best: Number of batches that the best weights so far saw; 0 before the first validation.
    """

    def __init__(
        self,
        config: ValidationConfig,
        batches: Sequence[Batch],
        test_set: WatchedSet | None,
        rows: Sequence[MetricsRow],
    ) -> None:
        """Goes on where the rows of an earlier part of the training end."""
        if not batches and test_set is None:
            raise UserError(
                "training.validation has nothing to look at: set mixture.validation_examples or"
                " training.validation.test_set"
            )
        self._config = config
        self._batches = batches
        self._test_set = test_set
        self.best = 0
        self._highest = float("-inf")
        for row in rows:
            if LOSS in row or NDCG in row:
                self._judge(row, int(row["batch"]) + 1)

    def is_due(self, done: int, num_batches: int) -> bool:
        """Says whether to validate after `done` batches."""
        return done % self._config.every_batches == 0 or done == num_batches

    def validate(
        self,
        encoder: Encoder,
        config: TrainerConfig,
        place: Place,
        *,
        done: int,
        storage: Storage,
    ) -> tuple[MetricsRow, bool]:
        """Measures the encoder; rank 0 keeps the best weights where patience is asked for.

        Returns:
            What to add to the batch's row, and whether to stop; the same for all workers.
        """
        encoder.model.eval()
        try:
            row = self._measure(encoder, config, place)
        finally:
            encoder.set_training(
                dropout=config.dropout, checkpointing=config.gradient_checkpointing
            )
        if self._judge(row, done) and self._config.patience:
            save_weights(storage, BEST, done, encoder.model, write=place.rank == 0)
        validations_since = (done - self.best) // self._config.every_batches
        return row, bool(self._config.patience and validations_since >= self._config.patience)

    def take_best(self, storage: Storage, model: torch.nn.Module) -> None:
        """Sets the model's weights to the best ones.

        Raises:
            TokayError: Every validation gave NaN.
        """
        if not self.best:
            raise TokayError("the training diverged: every validation gave NaN; try a lower rate")
        restore_weights(storage, BEST, self.best, model)

    def _measure(self, encoder: Encoder, config: TrainerConfig, place: Place) -> MetricsRow:
        row: MetricsRow = {}
        if self._batches:
            shares = [
                evaluation_loss(encoder, slice_batch(batch, config, place), config)
                for batch in self._batches
            ]
            row[LOSS] = round(sum(shares) / len(shares), 6)
        if self._test_set is not None:
            score = torch.zeros((), dtype=torch.float64, device=encoder.device)
            if place.rank == 0 or is_sharded(encoder.model):  # nobody runs a sharded model alone
                from actors.vectors import BrokenVectors
                from pipelines.evaluation.evaluate import evaluate

                watched = self._test_set
                try:
                    result = evaluate(encoder, watched.data, task=watched.task)
                    measured = result.estimates["ndcg_at_10"].mean
                except BrokenVectors:  # the training diverged, which `take_best` reports
                    measured = math.nan
                score += measured if place.rank == 0 else 0
            if place.world > 1:
                dist.all_reduce(score)
            row[NDCG] = round(float(score), 6)
        return row

    def _judge(self, row: MetricsRow, done: int) -> bool:
        """Records a validation and says whether it was the best so far."""
        value = row[NDCG] if NDCG in row else row[LOSS]
        if value is None or math.isnan(value):  # None: read from metrics.jsonl
            return False
        value = value if NDCG in row else -value
        better = value > self._highest
        if better:
            self._highest, self.best = value, done
        return bool(better)
