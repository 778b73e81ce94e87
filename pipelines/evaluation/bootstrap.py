"""How sure a mean over a few hundred queries is.

Two models a point apart on 200 queries are often the same model; every figure therefore comes with
an interval, and two models are compared query by query.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NUM_RESAMPLES = 2000


class Estimate(NamedTuple):
    """A mean over queries with its 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap(
    scores: Sequence[float] | np.ndarray, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Estimate:
    """Returns the mean and its percentile bootstrap interval (Efron, 1979).

    Args:
        scores: One for each query.
        num_resamples: Draws of as many queries, with replacement.
        seed: Of the draws; the same seed draws the same queries for every metric.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"scores have shape {values.shape}: give one number for each query")
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(num_resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))
