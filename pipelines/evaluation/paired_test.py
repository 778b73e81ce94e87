"""Whether one of several models is better than the model that all of them come from.

Scores of known-item queries tie more often than not, queries of one document go up and down
together, and the best of several candidates looks good by chance. The test here is exact about all
three.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NUM_DRAWS = 10_000
_DRAWS_AT_ONCE = 100


class Gain(NamedTuple):
    """What a model gains over another on the same queries.

    Attributes:
        mean: Of the differences.
        low: Lower end of its 95 % interval.
        high: Upper end.
        p: How often as large a gain, of the best of all models, would come by chance.
    """

    mean: float
    low: float
    high: float
    p: float


def gains(differences: np.ndarray, groups: Sequence[str], *, seed: int = 0) -> list[Gain]:
    """Tests whether models gain on the model that their differences are from; one-sided.

    Fisher's randomisation test, which Smucker, Allan and Carterette ("A comparison of statistical
    significance tests for information retrieval evaluation", CIKM 2007) recommend: had neither
    model anything over the other, each difference could as well have had the other sign. The signs
    are drawn for whole groups, since queries of one document are no independent witnesses; a tie
    has no sign and no say. A model's statistic is the sum of its groups' differences over the root
    of the sum of their squares, which stays the same whatever the signs.

    Of several models the best is looked at, and so is the best of each draw: a model's p is the
    share of draws whose highest statistic of any model reaches its own (maxT of Westfall and Young,
    "Resampling-based multiple testing", 1993). All models get the same signs, so that those which
    are nearly alike, as interpolations are, cost little. The chance that any model without a gain
    has a p below 0.05 is 0.05.

    The intervals are percentiles of a bootstrap over groups, and are not widened for the number of
    models.

    Args:
        differences: Score minus the other model's, ``[models, queries]``.
        groups: Of each query; queries of one group stand or fall together.
        seed: Of the draws.

    Returns:
        One gain a model. Without any query its numbers are 0 and its p is 1.
    """
    num_models, num_queries = differences.shape
    if num_queries == 0:
        return [Gain(0.0, 0.0, 0.0, 1.0)] * num_models
    _, places = np.unique(np.asarray(groups), return_inverse=True)
    sizes = np.bincount(places)
    sums = np.stack([np.bincount(places, weights=row) for row in differences])
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    scaled = np.divide(sums, norms, out=np.zeros_like(sums), where=norms > 0)
    # A draw that differs from what was found in its last bits alone is as high.
    found = scaled.sum(axis=1)[:, None] - 1e-9
    rng = np.random.default_rng(seed)
    reached, means = np.zeros(num_models), []
    for _ in range(NUM_DRAWS // _DRAWS_AT_ONCE):
        signs = rng.choice((-1.0, 1.0), size=(_DRAWS_AT_ONCE, len(sizes)))
        reached += ((signs @ scaled.T).max(axis=1) >= found).sum(axis=1)
        drawn = rng.integers(0, len(sizes), size=(_DRAWS_AT_ONCE, len(sizes)))
        means.append(sums[:, drawn].sum(axis=2) / sizes[drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(means, axis=1), [2.5, 97.5], axis=1)
    chance = (1 + reached) / (1 + NUM_DRAWS)
    columns = (differences.mean(axis=1), low, high, chance)
    return [Gain(*map(float, row)) for row in zip(*columns, strict=True)]
