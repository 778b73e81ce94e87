"""The bootstrap against NumPy and against the normal approximation."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from pipelines.evaluation.bootstrap import bootstrap
from pipelines.evaluation.items import Sample


def scored(scores: object) -> list[Sample]:
    return [Sample(statistic="mean", rows=np.array([scores], dtype=np.float64))]


def test_bootstrap_equals_resampling_written_out() -> None:
    scores = np.array([0.0, 0.2, 1.0, 0.7, 0.4])
    draws = np.random.default_rng(3)
    means = np.sort([np.mean([scores[i] for i in draws.integers(0, 5, 5)]) for _ in range(1001)])
    mean, low, high = bootstrap(scored(scores), num_resamples=1001, seed=3)
    assert mean == pytest.approx(0.46)
    # Of 1001 sorted means the 2.5 % and 97.5 % points are those at 25 and 975.
    assert (low, high) == pytest.approx((means[25], means[975]))


def test_bootstrap_of_many_scores_agrees_with_the_normal_interval() -> None:
    scores = np.random.default_rng(0).uniform(size=500)
    mean, low, high = bootstrap(scored(scores), num_resamples=4000)
    half = 1.96 * scores.std() / np.sqrt(len(scores))
    assert mean == pytest.approx(scores.mean())
    assert low == pytest.approx(mean - half, abs=0.1 * half)
    assert high == pytest.approx(mean + half, abs=0.1 * half)


def test_bootstrap_with_the_same_seed_repeats_itself() -> None:
    scores = [0.1, 0.9, 0.3]
    assert bootstrap(scored(scores), seed=1) == bootstrap(scored(scores), seed=1)
    assert bootstrap(scored(scores * 50), seed=1) != bootstrap(scored(scores * 50), seed=2)


def test_bootstrap_of_equal_scores_has_no_width() -> None:
    assert bootstrap(scored([0.5] * 7)) == (0.5, 0.5, 0.5)


def test_bootstrap_of_nothing_is_refused() -> None:
    for nothing in ([], scored([])):
        with pytest.raises(ValueError, match="give at least one score"):
            bootstrap(nothing)


def test_bootstrap_of_two_languages_draws_from_each() -> None:
    first, second = scored([0.0] * 30), scored([1.0, 0.0] * 40)
    mean, low, high = bootstrap([*first, *second])
    assert mean == pytest.approx(0.25)
    _, low_second, high_second = bootstrap(second)
    assert (low, high) == pytest.approx((low_second / 2, high_second / 2))


def test_bootstrap_of_a_difference_is_paired() -> None:
    scores = np.random.default_rng(0).uniform(size=50)
    gain = bootstrap(scored(scores + 0.25), before=scored(scores))
    assert gain == pytest.approx((0.25, 0.25, 0.25))


def test_bootstrap_of_a_correlation_equals_resampling_written_out() -> None:
    rng = np.random.default_rng(1)
    gold = rng.integers(0, 6, 40).astype(float)
    found = gold + rng.normal(size=40)
    sample = Sample(statistic="spearman", rows=np.stack([gold, found]))
    draws = np.random.default_rng(2)
    drawn = [draws.integers(0, 40, 40) for _ in range(201)]
    expected = np.sort([spearmanr(gold[items], found[items])[0] for items in drawn])
    mean, low, high = bootstrap([sample], num_resamples=201, seed=2)
    assert mean == pytest.approx(spearmanr(gold, found)[0])
    assert (low, high) == pytest.approx((expected[5], expected[195]))
