import numpy as np
import pytest
from pydantic import ValidationError

from pipelines.fret.fret import FretConfig
from pipelines.fret.fusion import JUDGES, Labels, choose_labels, fuse, ranks, z_scores
from pipelines.records import FRET

# Candidates a, b, c, d; QL ranks 2 1 3 4, RC ranks 1 3 2 4, the retriever 1 3 4 2.
SCORES = {
    "ql": [-2.0, -1.0, -3.0, -4.0],
    "rc": [-0.1, -0.9, -0.3, -2.0],
    "sim": [0.8, 0.7, 0.65, 0.79],
}


def choose(**config: object) -> Labels:
    return choose_labels(
        SCORES,
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


def test_score_that_is_not_known_counts_as_the_mean_of_those_that_are() -> None:
    nan = float("nan")
    np.testing.assert_allclose(z_scores([1.0, nan, 3.0, nan]), [-1, 0, 1, 0])
    assert z_scores([nan, 2.0, nan]).tolist() == [0, 0, 0]
    scores = SCORES | {"ql": [-2.0, -1.0, nan, nan]}
    fused = fuse(scores, "ql+sim", "z-scores")
    np.testing.assert_allclose(fused, np.add(z_scores(SCORES["sim"]), [-1, 1, 0, 0]))


@pytest.mark.parametrize(
    ("fusion", "asks"), [("sim", False), ("ql", True), ("sim+rc", True), ("ql+rc", True)]
)
def test_llm_is_asked_where_it_is_a_judge(fusion: str, asks: bool) -> None:
    assert FretConfig(fusion=fusion).asks_llm == asks


def test_of_equal_fused_scores_the_nearer_is_the_positive_and_the_farther_the_negative() -> None:
    # QL and RC rank 40 candidates in opposite order: each R comes twice, once on either side.
    labels = choose_labels(
        {
            "ql": [-float(place) for place in range(40)],
            "rc": [float(place) for place in range(40)],
            "sim": [1 - place / 100 for place in range(40)],
        },
        seed_place=5,
        config=FretConfig(num_negatives=40),
        query_id="q",
    )
    order = sorted(range(40), key=lambda place: (-1 / (place + 1) - 1 / (40 - place), place))
    assert labels.positive == 0
    assert labels.negatives == [place for place in order[::-1] if place not in (0, 5)]


def test_fusion_is_the_sum_of_reciprocal_ranks_without_a_constant() -> None:
    fused = fuse(SCORES)
    expected = [1 / 2 + 1, 1 + 1 / 3, 1 / 3 + 1 / 2, 1 / 4 + 1 / 4]
    np.testing.assert_allclose(fused, expected)


def test_positive_is_the_highest_and_negative_the_lowest() -> None:
    labels = choose()
    assert (labels.positive, labels.negatives) == (0, [3])
    assert labels.fused == pytest.approx([1.5, 4 / 3, 5 / 6, 1 / 2])


def test_one_score_alone_changes_the_positive() -> None:
    assert choose(fusion="ql").positive == 1
    assert choose(fusion="rc").positive == 0


def test_retriever_may_judge_too() -> None:
    # R of QL and the retriever: 1/2 + 1, 1 + 1/3, 1/3 + 1/4, 1/4 + 1/2.
    assert choose(fusion="ql+sim").fused == pytest.approx([3 / 2, 4 / 3, 7 / 12, 3 / 4])
    assert choose(fusion="sim+rc+ql").fused == pytest.approx([5 / 2, 5 / 3, 13 / 12, 1])
    assert (choose(fusion="sim").positive, choose(fusion="sim").negatives) == (0, [2])


def test_scores_are_standardised_over_the_scored_candidates_and_added_up() -> None:
    # QL: mean -2.5, deviation sqrt(1.25); RC: mean -0.825, deviation sqrt(0.546875).
    ql = np.array([0.5, 1.5, -0.5, -1.5]) / np.sqrt(1.25)
    rc = np.array([0.725, -0.075, 0.525, -1.175]) / np.sqrt(0.546875)
    np.testing.assert_allclose(fuse(SCORES, "ql", "z-scores"), ql)
    np.testing.assert_allclose(fuse(SCORES, "ql+rc", "z-scores"), ql + rc)
    chosen = choose(scale="z-scores")
    assert chosen.fused == pytest.approx(list(ql + rc))
    assert (chosen.positive, chosen.negatives) == (0, [3])
    # Ranks hide by how much: QL is all but undecided between a and b, RC is not.
    scores = {"ql": [-1.1, -1.0, -9.0], "rc": [-0.1, -1.0, -3.0]}
    assert np.argmax(fuse(scores)) == 0 == np.argmax(fuse(scores, "ql+rc", "z-scores"))
    scores["ql"][1] = 3.0
    assert np.argmax(fuse(scores)) == 0
    assert np.argmax(fuse(scores, "ql+rc", "z-scores")) == 1


def test_hybrid_is_standardised_over_the_corpus_already() -> None:
    scores = {"ql": [-1.0, -3.0], "hybrid": [4.0, 3.5]}
    np.testing.assert_allclose(fuse(scores, "hybrid", "z-scores"), [4.0, 3.5])
    np.testing.assert_allclose(fuse(scores, "ql+hybrid", "z-scores"), [5.0, 2.5])
    np.testing.assert_allclose(fuse(scores, "hybrid"), [1.0, 0.5])


def test_judge_whose_scores_are_all_equal_says_nothing() -> None:
    # The mean of three times 0.1 is not 0.1.
    assert z_scores([0.1, 0.1, 0.1]).tolist() == [0.0, 0.0, 0.0]
    assert z_scores([-7.0]).tolist() == [0.0]
    scores = {"ql": [-2.0, -1.0, -3.0], "rc": [0.1, 0.1, 0.1]}
    both, one = fuse(scores, "ql+rc", "z-scores"), fuse(scores, "ql", "z-scores")
    assert both.tolist() == one.tolist()


@pytest.mark.parametrize(
    "fusion", ["best", "bm25", "ql+", "+", "", "ql+ql", "ql-rc", "QL", "ql + rc"]
)
def test_fusion_that_is_not_made_of_judges_is_refused(fusion: str) -> None:
    accepted = r"accepted are auto, or ql, rc, ce, sim, lex, hybrid, each once"
    with pytest.raises(ValidationError, match=accepted):
        FretConfig(fusion=fusion)


def test_judges_have_columns_of_scores() -> None:
    assert [str(FRET.field(name).type) for name in JUDGES.values()] == ["list<item: float>"] * 6


def test_list_holds_every_other_candidate_the_worst_first() -> None:
    # Near ones and the seed b too, and more of them than are asked for.
    ruled = {"max_negative_similarity": 0.5, "num_negatives": 1}
    assert choose(negative="all", **ruled).negatives == [3, 2, 1]
    kept = choose(negative="all", positive="seed", **ruled)
    assert (kept.positive, kept.negatives) == (1, [3, 2, 0])
    by_retriever = choose(negative="all", fusion="sim", scale="z-scores")
    assert (by_retriever.positive, by_retriever.negatives) == (0, [2, 1, 3])


def test_seed_can_be_kept_as_the_positive() -> None:
    assert choose(positive="seed").positive == 1


def test_negative_too_near_the_positive_is_passed_over() -> None:
    # 0.95 * 0.8 = 0.76 rules out d (0.79); b is the seed; so c.
    assert choose(max_negative_similarity=0.95).negatives == [2]
    assert choose(max_negative_similarity=0.5).negatives == []
    # As similar as that share of the positive's is too similar.
    found = [
        choose_labels(
            {
                "ql": [-1.0, -2.0, -3.0],
                "rc": [-1.0, -2.0, -3.0],
                "sim": [0.5, 0.4, similarity],
            },
            seed_place=1,
            config=FretConfig(max_negative_similarity=0.5),
            query_id="q",
        ).negatives
        for similarity in (0.25, 0.2499)
    ]
    assert found == [[], [2]]


def test_seed_is_never_the_negative() -> None:
    labels = choose_labels(
        {"ql": [-1.0, -9.0], "rc": [-1.0, -9.0], "sim": [0.9, 0.1]},
        seed_place=1,
        config=FretConfig(),
        query_id="q",
    )
    assert (labels.positive, labels.negatives) == (0, [])


def test_lowest_negative_is_no_draw_and_a_random_one_is() -> None:
    falling = [-1.0, -2.0, -3.0, -4.0, -5.0]
    scores = {"ql": falling, "rc": falling, "sim": [0.9, 0.8, 0.7, 0.6, 0.5]}

    def drawn(**config: object) -> list[tuple[int, ...]]:
        return [
            tuple(
                choose_labels(
                    scores,
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
