"""The bootstrap against NumPy and against the normal approximation."""

import numpy as np
import pytest

from pipelines.evaluation.bootstrap import bootstrap


def test_bootstrap_equals_resampling_written_out() -> None:
    scores = np.array([0.0, 0.2, 1.0, 0.7, 0.4])
    draws = np.random.default_rng(3)
    means = np.sort([np.mean([scores[i] for i in draws.integers(0, 5, 5)]) for _ in range(1001)])
    mean, low, high = bootstrap(scores, num_resamples=1001, seed=3)
    assert mean == pytest.approx(0.46)
    # Of 1001 sorted means the 2.5 % and 97.5 % points are those at 25 and 975.
    assert (low, high) == pytest.approx((means[25], means[975]))


def test_bootstrap_of_many_scores_agrees_with_the_normal_interval() -> None:
    scores = np.random.default_rng(0).uniform(size=500)
    mean, low, high = bootstrap(scores, num_resamples=4000)
    half = 1.96 * scores.std() / np.sqrt(len(scores))
    assert mean == pytest.approx(scores.mean())
    assert low == pytest.approx(mean - half, abs=0.1 * half)
    assert high == pytest.approx(mean + half, abs=0.1 * half)


def test_bootstrap_with_the_same_seed_repeats_itself() -> None:
    scores = [0.1, 0.9, 0.3]
    assert bootstrap(scores, seed=1) == bootstrap(scores, seed=1)
    assert bootstrap(scores * 50, seed=1) != bootstrap(scores * 50, seed=2)


def test_bootstrap_of_equal_scores_has_no_width() -> None:
    assert bootstrap([0.5] * 7) == (0.5, 0.5, 0.5)


def test_bootstrap_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="one number for each query"):
        bootstrap([])
