"""Fusion of scores and the choice of positive and hard negatives, as pure functions.

Source: "Gecko: Versatile Text Embeddings Distilled from Large Language Models", arXiv 2403.20327,
section 3 ("LLM-based positive and negative mining").

The paper fuses the ranks of two judges, QL and RC. Others may be named, and their scores fused.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pipelines.fret.fret import FretConfig


# Who judges a candidate, and the column that holds the scores, the higher the better. The first
# three have not scored every candidate; the last two have no scores without `candidates.lexical`.
JUDGES = {
    "ql": "query_likelihoods",
    "rc": "relevances",
    "ce": "cross_scores",
    "sim": "similarities",
    "lex": "lexical",
    "hybrid": "hybrid",
}


LLM_JUDGES = ("ql", "rc")
CROSS_ENCODER = "ce"
# Those of pairs that were scored for them, with the columns.
SCORED = {judge: JUDGES[judge] for judge in (*LLM_JUDGES, CROSS_ENCODER)}


def asks_llm(fusion: str) -> bool:
    """Says whether a judge of a fusion is the LLM; of `auto`, which is no judge's name, it is."""
    return not set(fusion.split("+")) <= JUDGES.keys() - set(LLM_JUDGES)


def asks_cross_encoder(fusion: str) -> bool:
    """Says whether a judge of a fusion is the cross-encoder."""
    return CROSS_ENCODER in fusion.split("+")


def steps_unasked(fusion: str) -> set[str]:
    """Returns the steps that score pairs, or prepare it, for judges that a fusion does not have."""
    steps = {"scores": asks_llm(fusion), "cross_scores": asks_cross_encoder(fusion)}
    steps["pairs"] = any(steps.values())
    return {step for step, asked in steps.items() if not asked}


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


def z_scores(scores: Sequence[float]) -> np.ndarray:
    """Returns scores with a mean of 0 and a population standard deviation of 1; 0 if all are equal.

    A score of NaN is unknown: it does not count, and becomes 0, the mean.

    >>> z_scores([1.0, 3.0, 5.0, 3.0]).round(2).tolist()
    [-1.41, 0.0, 1.41, 0.0]
    """
    values = np.asarray(scores, dtype=np.float64)
    known = values[~np.isnan(values)]
    if len(np.unique(known)) < 2:  # of equal ones the mean may differ by rounding
        return np.zeros_like(values)
    standardised: np.ndarray = np.nan_to_num((values - known.mean()) / known.std())
    return standardised


def fuse(
    scores: Mapping[str, Sequence[float]], fusion: str = "ql+rc", scale: str = "ranks"
) -> np.ndarray:
    """Returns R of each candidate: what the judges that `fusion` names say together.

    Args:
        scores: Of each judge, one a candidate.
        fusion: Keys of `scores`, joined by ``+``.
        scale: ``ranks``: R is the sum of 1 / rank, with `ql+rc` Gecko's R(q, p) (section 3);
            ``z-scores``: the sum of scores, each judge's standardised over the candidates; those
            of `hybrid` stay as they are, standardised over the corpus.

    >>> fuse({"ql": [-2.0, -1.0, -3.0], "rc": [-0.1, -0.9, -2.0]}).round(2).tolist()
    [1.5, 1.5, 0.67]
    """
    parts = []
    for judge in fusion.split("+"):
        if scale == "ranks":
            parts.append(1.0 / ranks(scores[judge]))
        elif judge == "hybrid":
            parts.append(np.asarray(scores[judge], dtype=np.float64))
        else:
            parts.append(z_scores(scores[judge]))
    fused: np.ndarray = np.sum(parts, axis=0)
    return fused


def choose_labels(
    scores: Mapping[str, Sequence[float]], *, seed_place: int, config: FretConfig, query_id: str
) -> Labels:
    """Chooses the positive (highest R) and the negatives (lowest R first, or a draw).

    Args:
        scores: Of each of `JUDGES`, one a candidate, in the retriever's order.
        seed_place: Where the seed passage stands among the candidates.
        config: Who judges, and which candidates become negatives.
        query_id: Seeds the draw of random negatives.
    """
    fused, similarities = fuse(scores, config.fusion, config.scale), scores["sim"]
    # Of equal R, the nearer candidate is the better positive and the worse negative.
    order = [int(place) for place in np.argsort(-fused, kind="stable")]
    positive = seed_place if config.positive == "seed" else order[0]
    others = [place for place in reversed(order) if place != positive]
    if config.negative == "all":
        negatives = others
    elif config.negative == "none":
        negatives = []
    else:
        limit = float("inf")
        if config.max_negative_similarity is not None:
            limit = config.max_negative_similarity * similarities[positive]
        fit = [place for place in others if place != seed_place and similarities[place] < limit]
        if config.negative == "random":
            random.Random(f"{config.seed} {query_id}").shuffle(fit)
        negatives = fit[: config.num_negatives]
    return Labels(positive=positive, negatives=negatives, fused=[float(value) for value in fused])
