"""Gecko's contrastive loss (arXiv 2403.20327, equation 3) over a batch that many workers hold.

For example i of a batch of B, with s the cosine similarity and tau the temperature:

    w  *  -log  e^{s(q_i,p_i+)/tau}
          ------------------------------------------------------------------------------------
          sum_j [ e^{s(q_i,p_j+)/tau} + 1[j != i] e^{s(q_i,q_j)/tau} ]  +  e^{s(q_i,p_i-)/tau}

The last term is a sum where an example has several hard negatives. Each term has its switch in
:class:`pipelines.training.config.LossConfig`, and w is its `contrastive_weight`, 1 in the paper;
where it is 0, nothing of this is computed. Two more may be added, each with its weight:

    KL divergence from the teacher, over C_i = {p_i+, p_i-...} with fused scores f
    (KaLM-Embedding-V2, arXiv 2506.20923; over a list of all scored candidates, CADET, arXiv
    2502.19712):  sum_c P_c log(P_c / Q_c),  P = softmax(f / T),  Q = softmax(s(q_i,c) / t),
    with T `teacher_temperature`, and t `student_temperature` or else tau

    spread-out regulariser (EmbeddingGemma, arXiv 2509.20354):
    1/(B(B-1)) sum_{i != j} [ s(q_i,q_j)^2 + s(p_i+,p_j+)^2 ]

Every worker computes the terms of its own examples against the whole batch; vectors are gathered
with their gradient, so that the summed gradients are those of one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional

from pipelines.training.agreement import agree
from pipelines.training.config import LossConfig

_NEVER = float("-inf")


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """Unit vectors of a worker's examples, and what is known about them.

    Attributes:
        queries: ``[examples, dimensions]``.
        positives: ``[examples, dimensions]``.
        negatives: ``[examples, max_negatives, dimensions]``: each example's hard negatives, padded.
        has_negative: bool ``[examples, max_negatives]``: which of them are not padding.
        teacher_scores: ``[examples, 1 + max_negatives]``: the LLM's scores of the positive and the
            negatives, NaN for padding and where there are none; None: no example has any.
    """

    queries: torch.Tensor
    positives: torch.Tensor
    negatives: torch.Tensor
    has_negative: torch.Tensor
    teacher_scores: torch.Tensor | None = None


def contrastive_loss(
    vectors: Vectors,
    config: LossConfig,
    *,
    sizes: Sequence[int],
    rank: int = 0,
    related: torch.Tensor | None = None,
    symmetric: bool = False,
) -> torch.Tensor:
    """Returns this worker's share of the batch's mean loss: the shares add up to the mean.

    Args:
        vectors: This worker's examples.
        config: Temperature and options.
        sizes: Number of examples of each worker.
        rank: This worker's place among them.
        related: bool ``[batch, batch]`` of :func:`related_examples`, or None to mask nothing; its
            rows and columns are in the order of workers, then of each worker's examples.
        symmetric: Whether the batch is of a symmetric set.

    Returns:
        A scalar with a gradient.

    Raises:
        ValueError: The vectors are shorter than a Matryoshka dimension.
        OutOfMemory: Another worker ran out of memory before or in its loss; raised in the
            backward pass too.
    """
    first, own, batch = sum(sizes[:rank]), sizes[rank], sum(sizes)
    queries, positives = vectors.queries, vectors.positives
    if config.contrastive_weight or config.spread_out_weight:  # else nobody needs another's
        rows = torch.cat([queries, positives], dim=1)
        queries, positives = _gather(rows, sizes, rank).chunk(2, dim=1)
    mine = torch.zeros(own, batch, dtype=torch.bool, device=queries.device)
    mine[torch.arange(own), first + torch.arange(own)] = True
    excluded = mine if related is None else related[first : first + own].to(mine.device) | mine
    losses = []
    weights = _dimension_weights(queries.shape[1], config)
    for size, weight in weights.items():
        cut = replace(
            vectors,
            queries=_cut(vectors.queries, size),
            positives=_cut(vectors.positives, size),
            negatives=_cut(vectors.negatives, size),
        )
        pool = (_cut(queries, size), _cut(positives, size))
        per_example = _example_losses(cut, pool, excluded, config, symmetric)
        if config.spread_out_weight and batch > 1:
            squares = (cut.queries @ pool[0].T) ** 2 + (cut.positives @ pool[1].T) ** 2
            spread = squares.masked_fill(mine, 0).sum(1) / (batch - 1)
            per_example = per_example + config.spread_out_weight * spread
        losses.append(weight * per_example.sum() / batch)
    return torch.stack(losses).sum() / sum(weights.values())


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


def _dimension_weights(full: int, config: LossConfig) -> dict[int, float]:
    """Returns the dimensions to train and the weight of each."""
    sizes = config.matryoshka_dimensions
    if sizes and max(sizes) > full:
        raise ValueError(
            f"matryoshka_dimensions {max(sizes)}: the encoder has only {full} dimensions"
        )
    return {full: 1.0} | dict(
        zip(sizes, config.matryoshka_weights or [1.0] * len(sizes), strict=True)
    )


def _example_losses(
    vectors: Vectors,
    pool: tuple[torch.Tensor, torch.Tensor],
    excluded: torch.Tensor,
    config: LossConfig,
    symmetric: bool,
) -> torch.Tensor:
    """Returns the loss of each own example against the pool's (queries, positives)."""
    own = (vectors.queries * vectors.positives).sum(1, keepdim=True)
    to_negatives = (vectors.queries[:, None] * vectors.negatives).sum(2)
    losses = 0 * own[:, 0]  # of which there is a gradient even where nothing else is added
    if config.contrastive_weight:
        losses = config.contrastive_weight * _contrastive(
            vectors, pool, (own, to_negatives), excluded, config, symmetric
        )
    if config.distillation_weight and vectors.teacher_scores is not None:
        similarity = torch.cat([own, to_negatives], dim=1)
        losses = losses + config.distillation_weight * _divergence(
            vectors.teacher_scores, similarity, config
        )
    return losses


def _contrastive(
    vectors: Vectors,
    pool: tuple[torch.Tensor, torch.Tensor],
    similarities: tuple[torch.Tensor, torch.Tensor],
    excluded: torch.Tensor,
    config: LossConfig,
    symmetric: bool,
) -> torch.Tensor:
    """Returns equation 3; `similarities` are those to the example's own positive and negatives."""
    own, to_negatives = similarities

    def others(similarity: torch.Tensor) -> torch.Tensor:
        left_out = excluded
        if config.mask_margin is not None:
            left_out = excluded | (similarity > own + config.mask_margin)
        return similarity.masked_fill(left_out, _NEVER) / config.temperature

    terms = [own / config.temperature]
    if config.in_batch_negatives:
        terms.append(others(vectors.queries @ pool[1].T))
    if config.hard_negatives:
        scores = to_negatives / config.temperature + config.hardness * to_negatives.detach()
        terms.append(scores.masked_fill(~vectors.has_negative, _NEVER))
    if config.same_tower_negatives == "all" or (
        config.same_tower_negatives == "symmetric" and symmetric
    ):
        terms.append(others(vectors.queries @ pool[0].T))
    return torch.logsumexp(torch.cat(terms, dim=1), dim=1) - terms[0][:, 0]


def _divergence(
    teacher_scores: torch.Tensor, similarity: torch.Tensor, config: LossConfig
) -> torch.Tensor:
    """Returns each example's KL divergence; 0 for one without the teacher's scores."""
    known = ~teacher_scores.isnan()
    taught = known.sum(1) > 1  # a distribution over one candidate teaches nothing
    known = known | ~taught[:, None]
    teacher = torch.where(taught[:, None], teacher_scores, 0.0).masked_fill(~known, _NEVER)
    target = torch.log_softmax(teacher / config.teacher_temperature, dim=1)
    temperature = config.student_temperature or config.temperature
    student = torch.log_softmax(similarity.masked_fill(~known, _NEVER) / temperature, dim=1)
    terms = torch.where(known, target.exp() * (target - student), 0.0)
    return torch.where(taught, terms.sum(1), 0.0)


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
    """all_gather whose gradient is the sum of all workers' gradients of the rows."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sizes: tuple[int, ...], rank: int) -> torch.Tensor:
        ctx.own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        padded = rows.new_zeros(max(sizes), rows.shape[1])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        agree(rows.device)
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        total = gradients[0].contiguous()
        agree(total.device)
        dist.all_reduce(total)
        return total[ctx.own], None, None
