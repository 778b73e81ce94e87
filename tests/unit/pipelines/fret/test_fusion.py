import numpy as np
import pytest

from pipelines.fret.fret import FretConfig
from pipelines.fret.fusion import Labels, choose_labels, fuse, ranks


def choose(**config: object) -> Labels:
    # Candidates a, b, c, d; QL ranks 2 1 3 4, RC ranks 1 3 2 4.
    return choose_labels(
        ql=[-2.0, -1.0, -3.0, -4.0],
        rc=[-0.1, -0.9, -0.3, -2.0],
        similarities=[0.8, 0.7, 0.65, 0.79],
        seed_place=1,
        config=FretConfig(**config),  # type: ignore[arg-type]
        query_id="q",
    )


def test_ranks_begin_at_one_and_ties_keep_their_order() -> None:
    assert ranks([0.5, 2.0, 0.5]).tolist() == [2, 1, 3]
    scores = [float(place * 7 % 3) for place in range(60)]  # many: NumPy sorts few stably anyway
    best_first = sorted(range(60), key=lambda place: (-scores[place], place))
    found = ranks(scores)
    assert (found[best_first].tolist(), found.dtype) == (list(range(1, 61)), np.int64)


def test_of_equal_fused_scores_the_nearer_is_the_positive_and_the_farther_the_negative() -> None:
    # QL and RC rank 40 candidates in opposite order: each R comes twice, once on either side.
    labels = choose_labels(
        ql=[-float(place) for place in range(40)],
        rc=[float(place) for place in range(40)],
        similarities=[1 - place / 100 for place in range(40)],
        seed_place=5,
        config=FretConfig(num_negatives=40),
        query_id="q",
    )
    order = sorted(range(40), key=lambda place: (-1 / (place + 1) - 1 / (40 - place), place))
    assert labels.positive == 0
    assert labels.negatives == [place for place in order[::-1] if place not in (0, 5)]


def test_fusion_is_the_sum_of_reciprocal_ranks_without_a_constant() -> None:
    fused = fuse([-2.0, -1.0, -3.0, -4.0], [-0.1, -0.9, -0.3, -2.0])
    expected = [1 / 2 + 1, 1 + 1 / 3, 1 / 3 + 1 / 2, 1 / 4 + 1 / 4]
    np.testing.assert_allclose(fused, expected)


def test_positive_is_the_highest_and_negative_the_lowest() -> None:
    labels = choose()
    assert (labels.positive, labels.negatives) == (0, [3])
    assert labels.fused == pytest.approx([1.5, 4 / 3, 5 / 6, 1 / 2])


def test_one_score_alone_changes_the_positive() -> None:
    assert choose(fusion="ql").positive == 1
    assert choose(fusion="rc").positive == 0


def test_seed_can_be_kept_as_the_positive() -> None:
    assert choose(positive="seed").positive == 1


def test_negative_too_near_the_positive_is_passed_over() -> None:
    # 0.95 * 0.8 = 0.76 rules out d (0.79); b is the seed; so c.
    assert choose(max_negative_similarity=0.95).negatives == [2]
    assert choose(max_negative_similarity=0.5).negatives == []
    # As similar as that share of the positive's is too similar.
    found = [
        choose_labels(
            ql=[-1.0, -2.0, -3.0],
            rc=[-1.0, -2.0, -3.0],
            similarities=[0.5, 0.4, similarity],
            seed_place=1,
            config=FretConfig(max_negative_similarity=0.5),
            query_id="q",
        ).negatives
        for similarity in (0.25, 0.2499)
    ]
    assert found == [[], [2]]


def test_seed_is_never_the_negative() -> None:
    labels = choose_labels(
        ql=[-1.0, -9.0],
        rc=[-1.0, -9.0],
        similarities=[0.9, 0.1],
        seed_place=1,
        config=FretConfig(),
        query_id="q",
    )
    assert (labels.positive, labels.negatives) == (0, [])


def test_lowest_negative_is_no_draw_and_a_random_one_is() -> None:
    def drawn(**config: object) -> list[tuple[int, ...]]:
        return [
            tuple(
                choose_labels(
                    ql=[-1.0, -2.0, -3.0, -4.0, -5.0],
                    rc=[-1.0, -2.0, -3.0, -4.0, -5.0],
                    similarities=[0.9, 0.8, 0.7, 0.6, 0.5],
                    seed_place=1,
                    config=FretConfig(**config),  # type: ignore[arg-type]
                    query_id=f"q{number}",
                ).negatives
            )
            for number in range(50)
        ]

    assert set(drawn()) == {(4,)} and set(drawn(num_negatives=2)) == {(4, 3)}
    draws = drawn(negative="random")
    assert set(draws) == {(2,), (3,), (4,)}
    assert draws == drawn(negative="random") != drawn(negative="random", seed=1)
    pairs = set(drawn(negative="random", num_negatives=2))
    assert pairs == {(a, b) for a in (2, 3, 4) for b in (2, 3, 4) if a != b}


def test_random_negative_is_the_same_in_every_run_and_none_is_none() -> None:
    first = choose(negative="random").negatives
    assert first == choose(negative="random").negatives and first in ([2], [3])
    assert choose(negative="none").negatives == []
