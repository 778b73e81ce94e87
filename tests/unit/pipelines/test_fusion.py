import numpy as np

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


def test_fusion_is_the_sum_of_reciprocal_ranks_without_a_constant() -> None:
    fused = fuse([-2.0, -1.0, -3.0, -4.0], [-0.1, -0.9, -0.3, -2.0])
    expected = [1 / 2 + 1, 1 + 1 / 3, 1 / 3 + 1 / 2, 1 / 4 + 1 / 4]
    np.testing.assert_allclose(fused, expected)


def test_positive_is_the_highest_and_negative_the_lowest() -> None:
    labels = choose()
    assert (labels.positive, labels.negatives) == (0, [3])


def test_one_score_alone_changes_the_positive() -> None:
    assert choose(fusion="ql").positive == 1
    assert choose(fusion="rc").positive == 0


def test_seed_can_be_kept_as_the_positive() -> None:
    assert choose(positive="seed").positive == 1


def test_negative_too_near_the_positive_is_passed_over() -> None:
    # 0.95 * 0.8 = 0.76 rules out d (0.79); b is the seed; so c.
    assert choose(max_negative_similarity=0.95).negatives == [2]
    assert choose(max_negative_similarity=0.5).negatives == []


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


def test_random_negative_is_the_same_in_every_run_and_none_is_none() -> None:
    first = choose(negative="random").negatives
    assert first == choose(negative="random").negatives and first in ([2], [3])
    assert choose(negative="none").negatives == []
