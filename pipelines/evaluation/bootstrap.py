"""How sure a score over a few hundred items is.

Two models a point apart on 200 queries are often the same model; every figure therefore comes with
an interval, and two models are compared item by item.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipelines.evaluation.items import Sample

NUM_RESAMPLES = 2000


class Estimate(NamedTuple):
    """A score, or the difference of two, with its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def interval(self) -> list[float] | None:
        """Low and high, None where there is no interval."""
        return None if np.isnan(self.low) else [self.low, self.high]


def bootstrap(
    samples: Sequence[Sample],
    *,
    before: Sequence[Sample] = (),
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Returns the score and its percentile bootstrap interval (Efron, 1979).

    Args:
        samples: Of each split and language of a test set; the score is the mean over them.
        before: Another model's on the same items, whose score is taken away: the interval is then
            that of the difference, both on the same draws.
        num_resamples: Draws of as many items, with replacement, from each sample.
        seed: Of the draws; the same seed draws the same items for every metric.

    Returns:
        The score; all nan where it is no number.

    >>> right = Sample(statistic="mean", rows=np.array([[1.0, 1.0, 0.0, 1.0, 1.0]]))
    >>> bootstrap([right])
    Estimate(mean=0.8, low=0.4, high=1.0)
    """
    if not samples or not all(sample.rows.size for sample in samples):
        raise ValueError("no items to draw from: give at least one score")
    score = np.mean([sample.score() for sample in samples])
    minus = np.mean([sample.score() for sample in before]) if before else 0.0
    if np.isnan(score - minus):
        return Estimate(float("nan"), float("nan"), float("nan"))
    drawn = []
    for place, new in enumerate(samples):
        rng = np.random.default_rng(seed)
        num_items = new.rows.shape[1]
        scores = []
        for _ in range(num_resamples):
            items = rng.integers(0, num_items, size=(num_items,))
            taken_away = before[place].score(items) if before else 0.0
            scores.append(new.score(items) - taken_away)
        drawn.append(scores)
    # A draw of equal items has no correlation.
    low, high = np.nanpercentile(np.mean(drawn, axis=0), [2.5, 97.5])
    return Estimate(float(score - minus), float(low), float(high))
