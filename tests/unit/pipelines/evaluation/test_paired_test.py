"""A gain is a gain only where chance, ties and several candidates do not explain it."""

from itertools import product

import numpy as np
import pytest

from pipelines.evaluation.paired_test import NUM_DRAWS, gains

ALONE = [str(n) for n in range(1000)]


def gains_alone(*rows: list[float]) -> list[float]:
    return [gain.p for gain in gains(np.array(rows), ALONE[: len(rows[0])])]


def test_p_is_the_share_of_signs_that_give_as_much() -> None:
    differences = [3.0, 2.0, 1.0, -2.0]
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in product((-1, 1), repeat=4)
    ]
    exact = np.mean([each >= sum(differences) for each in sums])
    (p,) = gains_alone(differences)
    assert p == pytest.approx(exact, abs=0.015)


def test_ties_change_no_p() -> None:
    (alone,) = gains_alone([1.0] * 5 + [-1.0])
    (among_ties,) = gains_alone([1.0] * 5 + [-1.0] + [0.0] * 300)
    exact = (6 + 1) / 64  # at most one sign of six against
    assert alone == pytest.approx(exact, abs=0.01)
    assert among_ties == pytest.approx(exact, abs=0.01)


def test_equal_models_have_p_1() -> None:
    (gain,) = gains(np.zeros((1, 50)), ALONE[:50])
    assert gain == (0.0, 0.0, 0.0, 1.0)


def test_no_query_shows_nothing() -> None:
    assert gains(np.zeros((2, 0)), []) == [(0.0, 0.0, 0.0, 1.0)] * 2


def test_queries_of_one_document_are_one_witness() -> None:
    differences = np.array([[0.1] * 12])
    (alone,) = gains(differences, ALONE[:12])
    (together,) = gains(differences, ["a"] * 12)
    (three,) = gains(differences, ["a"] * 4 + ["b"] * 4 + ["c"] * 4)
    assert alone.p == pytest.approx(1 / 4096, abs=0.001)
    assert together.p == pytest.approx(1 / 2, abs=0.02)
    assert three.p == pytest.approx(1 / 8, abs=0.02)
    assert alone.mean == together.mean == three.mean == pytest.approx(0.1)


def test_interval_is_that_of_a_bootstrap_over_documents() -> None:
    # Of two documents, one of which gains 1 in each of its two queries: 0, 2/3 or 1, by 1:2:1.
    (gain,) = gains(np.array([[1.0, 1.0, 0.0]]), ["a", "a", "b"])
    assert (gain.low, gain.high) == (0.0, 1.0)
    assert gain.mean == pytest.approx(2 / 3)


def test_best_of_several_has_to_beat_the_best_of_several_by_chance() -> None:
    rng = np.random.default_rng(1)
    models = rng.normal(size=(20, 40))
    alone = [gain.p for row in models for gain in gains(row[None], ALONE[:40])]
    together = [gain.p for gain in gains(models, ALONE[:40])]
    assert min(alone) < 0.05 < min(together)
    assert np.argmin(alone) == np.argmin(together)


def test_models_that_are_nearly_alike_cost_little() -> None:
    rng = np.random.default_rng(2)
    row = rng.normal(0.25, 1, size=60)
    (alone,) = gains_alone(list(row))
    together = gains_alone(list(row), list(row * 0.5), list(row * 0.25))
    assert together == pytest.approx([alone] * 3, abs=0.01)


def test_models_without_a_gain_are_seldom_taken_for_better() -> None:
    rng = np.random.default_rng(3)
    found = 0
    for _ in range(200):
        base = rng.normal(size=60) * (rng.random(60) < 0.3)  # most queries tie
        noise = rng.normal(size=(3, 60)) * (base != 0)
        found += min(gain.p for gain in gains(base + 0.5 * noise, ALONE[:60])) <= 0.05
    assert found <= 20  # 10 are expected, with a deviation of 3


def test_p_is_never_0() -> None:
    (p,) = gains_alone([1.0] * 200)
    assert p == 1 / (1 + NUM_DRAWS)
