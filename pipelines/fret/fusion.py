"""Rank fusion and the choice of positive and hard negative, as pure functions.

Source: "Gecko: Versatile Text Embeddings Distilled from Large Language Models", arXiv 2403.20327,
section 3 ("LLM-based positive and negative mining").
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pipelines.fret.fret import FretConfig


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Places of the positive and the hard negatives among the candidates; maybe none is fit."""

    positive: int
    negatives: list[int]
    fused: list[float]


def ranks(scores: Sequence[float]) -> np.ndarray:
    """Returns ranks from 1 for the highest score; equal scores rank in their given order.

    >>> ranks([0.5, 2.0, 0.5]).tolist()
    [2, 1, 3]
    """
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    result = np.empty(len(scores), dtype=np.int64)
    result[order] = np.arange(1, len(scores) + 1)
    return result


def fuse(ql: Sequence[float], rc: Sequence[float], fusion: str = "ql+rc") -> np.ndarray:
    """Returns R(q, p) = 1 / rank_QL + 1 / rank_RC for each candidate (Gecko, section 3).

    `fusion` is `ql+rc`, or one of them, for ablations.

    >>> fuse(ql=[-2.0, -1.0, -3.0], rc=[-0.1, -0.9, -2.0]).round(2).tolist()
    [1.5, 1.5, 0.67]
    """
    kinds = {"ql": ql, "rc": rc}
    fused: np.ndarray = np.sum([1.0 / ranks(kinds[kind]) for kind in fusion.split("+")], axis=0)
    return fused


def choose_labels(
    *,
    ql: Sequence[float],
    rc: Sequence[float],
    similarities: Sequence[float],
    seed_place: int,
    config: FretConfig,
    query_id: str,
) -> Labels:
    """Chooses the positive (highest R) and the hard negatives (lowest R first, or a draw).

    `ql`, `rc` and `similarities` hold one number a candidate, in the retriever's order; the seed
    passage stands at `seed_place` among them. `query_id` seeds the draw of random negatives.
    """
    fused = fuse(ql, rc, config.fusion)
    # Of equal R, the nearer candidate is the better positive and the worse negative.
    order = [int(place) for place in np.argsort(-fused, kind="stable")]
    positive = seed_place if config.positive == "seed" else order[0]
    limit = float("inf")
    if config.max_negative_similarity is not None:
        limit = config.max_negative_similarity * similarities[positive]
    fit = [
        place
        for place in order
        if place not in (positive, seed_place) and similarities[place] < limit
    ]
    fit.reverse()
    if config.negative == "none":
        fit = []
    elif config.negative == "random":
        random.Random(f"{config.seed} {query_id}").shuffle(fit)
    return Labels(
        positive=positive,
        negatives=fit[: config.num_negatives],
        fused=[float(value) for value in fused],
    )
