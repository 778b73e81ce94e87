"""Gecko's contrastive loss (arXiv 2403.20327, equation 3) over a batch that many workers hold.

For example i of a batch of B, with s the cosine similarity and tau the temperature:

    -log  e^{s(q_i,p_i+)/tau}
          ------------------------------------------------------------------------------------
          sum_j [ e^{s(q_i,p_j+)/tau} + 1[j != i] e^{s(q_i,q_j)/tau} ]  +  e^{s(q_i,p_i-)/tau}

The last term is a sum where an example has several hard negatives.

Every worker computes the terms of its own examples against the whole batch; vectors are gathered
with their gradient, so that the summed gradients are those of one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional

from pipelines.training.config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """Unit vectors of a worker's examples.

    Attributes:
        queries: ``[examples, dimensions]``.
        positives: ``[examples, dimensions]``.
        negatives: ``[examples, most, dimensions]``: each example's hard negatives, padded.
        has_negative: bool ``[examples, most]``: which of them are no padding.
    """

    queries: torch.Tensor
    positives: torch.Tensor
    negatives: torch.Tensor
    has_negative: torch.Tensor


def contrastive_loss(
    vectors: Vectors,
    config: TrainingConfig,
    *,
    sizes: Sequence[int],
    rank: int = 0,
    related: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns this worker's share of the batch's mean loss: the shares add up to the mean.

    Args:
        vectors: This worker's examples.
        config: Temperature and options.
        sizes: Number of examples of each worker.
        rank: This worker's place among them.
        related: bool ``[batch, batch]`` of :func:`related_examples`, or None to mask nothing; its
            rows and columns are in the order of workers, then of each worker's examples.

    Returns:
        A scalar with a gradient.
    """
    first, own, batch = sum(sizes[:rank]), sizes[rank], sum(sizes)
    queries, positives = _gather(
        torch.cat([vectors.queries, vectors.positives], dim=1), sizes, rank
    ).chunk(2, dim=1)
    mine = torch.zeros(own, batch, dtype=torch.bool, device=queries.device)
    mine[torch.arange(own), first + torch.arange(own)] = True
    excluded = mine if related is None else related[first : first + own].to(mine.device) | mine
    full = queries.shape[1]
    dimensions = sorted({full, *config.matryoshka_dimensions})
    if dimensions[-1] > full:
        raise ValueError(
            f"matryoshka_dimensions {dimensions[-1]}: the encoder has only {full} dimensions"
        )
    losses = []
    for size in dimensions:
        cut = Vectors(
            queries=_cut(vectors.queries, size),
            positives=_cut(vectors.positives, size),
            negatives=_cut(vectors.negatives, size),
            has_negative=vectors.has_negative,
        )
        pool = (_cut(queries, size), _cut(positives, size))
        losses.append(_example_losses(cut, pool, mine, excluded, config).sum() / batch)
    return torch.stack(losses).mean()


def related_examples(query_ids: Sequence[str], positive_ids: Sequence[str]) -> torch.Tensor:
    """Marks pairs of examples that share a text, so that neither is the other's negative.

    Gemini Embedding (arXiv 2503.07891) masks equal queries and equal positives; a query that equals
    the other's positive, which symmetric sets have, is masked too.

    Returns:
        bool ``[batch, batch]``.
    """
    _, numbers = np.unique([*query_ids, *positive_ids], return_inverse=True)
    queries, positives = numbers[: len(query_ids)], numbers[len(query_ids) :]
    crossed = queries[:, None] == positives[None, :]
    same = (queries[:, None] == queries) | (positives[:, None] == positives)
    return torch.from_numpy(same | crossed | crossed.T)


def _example_losses(
    vectors: Vectors,
    pool: tuple[torch.Tensor, torch.Tensor],
    mine: torch.Tensor,
    excluded: torch.Tensor,
    config: TrainingConfig,
) -> torch.Tensor:
    """Returns the loss of each own example against the pool's (queries, positives)."""
    never = float("-inf")
    own = (vectors.queries * vectors.positives).sum(1, keepdim=True)
    to_positives = (vectors.queries @ pool[1].T).masked_fill(excluded & ~mine, never)
    to_negatives = (vectors.queries[:, None] * vectors.negatives).sum(2)
    terms = [to_positives, to_negatives.masked_fill(~vectors.has_negative, never)]
    if config.same_tower_negatives:
        to_queries = vectors.queries @ pool[0].T
        left_out = excluded
        if config.same_tower_margin is not None:
            left_out = excluded | (to_queries > own + config.same_tower_margin)
        terms.append(to_queries.masked_fill(left_out, never))
    scores = torch.cat(terms, dim=1) / config.temperature
    return torch.logsumexp(scores, dim=1) - own[:, 0] / config.temperature


def _cut(vectors: torch.Tensor, dimensions: int) -> torch.Tensor:
    if dimensions == vectors.shape[-1]:
        return vectors
    return functional.normalize(vectors[..., :dimensions], dim=-1)


def _gather(rows: torch.Tensor, sizes: Sequence[int], rank: int) -> torch.Tensor:
    """Returns the rows of all workers, in the order of ranks; one worker has them already."""
    if len(sizes) == 1:
        return rows
    if not rows.requires_grad:  # a worker without examples still takes part in the backward pass
        rows = rows.detach().requires_grad_()
    gathered: torch.Tensor = _Gather.apply(rows, tuple(sizes), rank)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    """all_gather whose gradient is the sum of what every worker did with the rows."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sizes: tuple[int, ...], rank: int) -> torch.Tensor:
        ctx.own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        padded = rows.new_zeros(max(sizes), rows.shape[1])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total[ctx.own], None, None
