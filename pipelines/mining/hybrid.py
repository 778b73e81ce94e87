"""The retriever's similarity and BM25's score in one sum, which orders a query's candidates.

Both are standardised over the corpus, so that a weight means the same for every query.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from actors.lexical_index import LexicalHits, StemmedLanguage
from cluster.config import Config

NUM_SAMPLED = 2000
"""Passages over which a query's similarities are standardised."""
DEPTH = 5
"""The retriever and BM25 each name so many times the candidates wanted: the best sum may be of a
passage that neither has among its very first."""
_SMALLEST_STD = 1e-6  # less is rounding: all passages score the same


class LexicalConfig(Config):
    """Orders candidates by z(similarity) + weight * z(BM25), with z over the corpus."""

    weight: float = Field(default=0.25, gt=0, description="of BM25; the similarity's is 1")
    k1: float = Field(
        default=0.9, ge=0, description="of BM25: how slowly further occurrences of a word add up"
    )
    b: float = Field(
        default=0.4, ge=0, le=1, description="of BM25: how much a long passage is marked down"
    )
    stemmer: StemmedLanguage | None = Field(
        default=None,
        description="language of the corpus, whose endings are cut off; null: words stay as they"
        " are",
    )


def standardised(values: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Returns z-scores of ``[queries, n]``; 0 where the passages of a query do not differ."""
    differ = std > _SMALLEST_STD
    scores: np.ndarray = (values - mean[:, None]) / np.where(differ, std, np.inf)[:, None]
    return scores


def hybrid_scores(
    similarities: np.ndarray,
    queries: np.ndarray,
    sample: np.ndarray,
    lexical: LexicalHits,
    weight: float,
) -> np.ndarray:
    """Returns z(similarity) + weight * z(BM25), float32 ``[queries, n]``.

    Args:
        similarities: Of the queries to the passages of `lexical`, ``[queries, n]``.
        queries: Their vectors, ``[queries, dimensions]``.
        sample: Vectors of the passages that stand for the corpus, ``[passages, dimensions]``.
        lexical: The passages, with their scores and those of the corpus.
        weight: Of BM25.
    """
    sampled = queries.astype(np.float64) @ sample.astype(np.float64).T
    near = standardised(similarities, sampled.mean(axis=1), sampled.std(axis=1))
    words = standardised(lexical.scores, lexical.mean, lexical.std)
    # Of float32 equal sums are equal, whatever the order in which float64 was added up.
    return (near + weight * words).astype(np.float32)


def best_places(ids: np.ndarray, scores: np.ndarray, k: int) -> np.ndarray:
    """Returns the places of a query's k best passages, best first, equal ones in the order of ids.

    Args:
        ids: Of passages, as bytes ``[n]``; empty is none, others may come twice.
        scores: Theirs, ``[n]``.
        k: How many; fewer come back where there are fewer.
    """
    in_order, places = np.unique(ids, return_index=True)
    places = places[in_order != b""]
    best: np.ndarray = places[np.argsort(-scores[places], kind="stable")[:k]]
    return best
