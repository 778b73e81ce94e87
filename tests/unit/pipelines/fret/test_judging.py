"""How often the seed comes first, worked by hand; what is chosen by it, and the verdict."""

import pytest

from pipelines.fret.judging import GECKO, PREFERENCE, RETRIEVER, Judging, Ranking


def test_table_of_three_queries_is_the_one_worked_by_hand() -> None:
    judging = Judging()
    # QL and RC put the seed first, the retriever second. By QL and the retriever, by ranks
    # 1/2 + 1/1 and 1/1 + 1/2, it shares the first place.
    judging.add({"sim": [0.9, 0.8, 0.7], "ql": [-2, -1, -3], "rc": [-3, -1, -2]}, 1)
    # RC turns the order round: with QL's ranks 1 + 1/3, 1/2 + 1/2, 1/3 + 1, z-scores 0, 0, 0.
    judging.add({"sim": [0.9, 0.8, 0.7], "ql": [-1, -2, -3], "rc": [-3, -2, -1]}, 0)
    # The retriever cannot tell the two apart, and both others prefer the wrong one.
    judging.add({"sim": [0.9, 0.9], "ql": [-1, -2], "rc": [-1, -2]}, 1)
    table = [(row.ranking, row.seed_first, row.better, row.worse) for row in judging.table()]
    assert table == [
        ("the retriever", 0.5, 0, 0),
        ("QL", 0.6667, 1, 1),
        ("RC", 0.3333, 1, 2),
        ("QL + RC by ranks", 0.5, 1, 2),
        ("z(QL) + z(RC)", 0.4444, 1, 2),
        ("QL + sim by ranks", 0.5, 1, 1),
        ("z(QL) + z(sim)", 0.5, 1, 1),
        ("QL + RC + sim by ranks", 0.6667, 1, 1),
        ("z(QL) + z(RC) + z(sim)", 0.6667, 1, 1),
    ]
    assert {row.p for row in judging.table()} == {1.0}


def add(judging: Judging, num: int, *, sim: bool, ql: bool, rc: bool = False) -> None:
    """Adds queries of two candidates, and which judges put the seed, the second one, first."""
    right = {"sim": sim, "ql": ql, "rc": rc}
    scores = {judge: [0.5, 0.6 if is_right else 0.4] for judge, is_right in right.items()}
    for _ in range(num):
        judging.add(scores, 1)


def test_ql_alone_is_not_chosen_however_good_it_is() -> None:
    judging = Judging()
    add(judging, 20, sim=True, ql=True)
    add(judging, 20, sim=False, ql=True)  # where the fusion of both wavers
    assert judging.p(Ranking(fusion="ql"), PREFERENCE[0]) < 0.001
    assert judging.choose() == PREFERENCE[0]
    verdict = judging.verdict()
    assert verdict.verdict == "GO"
    assert verdict.reason == (
        "GO: z(QL) + z(sim) ranks the seed first for 75 % of 40 queries, the retriever for 50 %"
        " (p < 0.001)"
    )


def test_best_fusion_is_chosen_where_it_is_better_for_certain() -> None:
    judging = Judging()
    add(judging, 20, sim=True, ql=True, rc=True)
    add(judging, 20, sim=False, ql=True, rc=True)
    assert judging.choose() == GECKO  # by z-scores it is as good


def test_of_fusions_that_chance_may_part_the_preferred_is_chosen() -> None:
    judging = Judging()
    add(judging, 35, sim=True, ql=True, rc=True)
    add(judging, 5, sim=False, ql=True, rc=True)  # five to nothing: p = 1/16
    assert judging.share(GECKO) > judging.share(PREFERENCE[0])
    assert judging.choose() == PREFERENCE[0]
    assert judging.verdict().reason == (
        "MAYBE: z(QL) + z(sim) ranks the seed first for 94 % of 40 queries, the retriever for 88 %,"
        " which may be chance (p = 0.062)"
    )


def test_what_is_not_certainly_better_is_not_chosen_where_something_is() -> None:
    judging = Judging()
    add(judging, 40, sim=False, ql=False, rc=True)
    add(judging, 30, sim=True, ql=True, rc=True)
    add(judging, 6, sim=False, ql=True, rc=False)
    add(judging, 5, sim=True, ql=False, rc=False)
    better = [each for each in PREFERENCE if judging.share(each) > judging.share(RETRIEVER)]
    assert PREFERENCE[0] in better and judging.p(PREFERENCE[0]) > 0.05
    # Both of QL and RC by ranks, which waver forty times, and by z-scores: the paper's goes first.
    assert judging.choose() == GECKO
    assert judging.verdict().verdict == "GO"


def test_teacher_no_better_than_the_retriever_is_skipped() -> None:
    judging = Judging()
    add(judging, 10, sim=True, ql=False)
    assert judging.choose() is None
    assert judging.verdict().reason == (
        "SKIP: no fusion ranks the seed first more often than the retriever, which does for 100 %"
        " of 10 queries; the best, z(QL) + z(sim), does for 50 %"
    )
    metrics = judging.metrics()
    assert (metrics["verdict"], metrics["fusion"], metrics["scale"]) == ("SKIP", None, None)


def test_no_query_to_judge_by_is_said() -> None:
    verdict = Judging().verdict()
    assert verdict.verdict == "SKIP" and "nothing to judge the teacher by" in verdict.reason


def test_order_with_bm25_is_what_the_teacher_has_to_beat_and_is_fused_with() -> None:
    judging = Judging("hybrid")
    # By similarity alone the seed is never first; with BM25 it is, for three of four queries.
    for number in range(40):
        hybrid = [2.0, 2.5] if number % 4 else [2.5, 2.0]
        scores = {"sim": [0.9, 0.1], "hybrid": hybrid, "ql": [-9.0, -1.0], "rc": [-1.0, -2.0]}
        judging.add(scores, 1)
    table = judging.table()
    assert [row.ranking for row in table] == [
        "the retriever with BM25",
        "QL",
        "RC",
        "QL + RC by ranks",
        "z(QL) + z(RC)",
        "QL + hybrid by ranks",
        "z(QL) + hybrid",
        "QL + RC + hybrid by ranks",
        "z(QL) + z(RC) + hybrid",
    ]
    assert (table[0].fusion, table[0].seed_first, table[1].better) == ("hybrid", 0.75, 10)
    # Of QL -1 and 1, of the hybrid scores 2 and 2.5 as they are: the seed is first even where
    # those say otherwise.
    assert judging.share(Ranking(fusion="ql+hybrid")) == 1.0
    verdict = judging.verdict()
    assert verdict.chosen == Ranking(fusion="ql+hybrid")
    assert verdict.reason == (
        "GO: z(QL) + hybrid ranks the seed first for 100 % of 40 queries, the retriever with BM25"
        " for 75 % (p = 0.002)"
    )


def test_teacher_that_beats_the_similarity_but_not_the_order_with_bm25_is_skipped() -> None:
    judging = Judging("hybrid")
    for _ in range(20):
        row = {"seed_id": "b", "seed_rank": 1, "candidate_ids": ["b", "a"]}
        row |= {"similarities": [0.1, 0.9], "hybrid": [2.5, 2.0], "lexical": [9.0, 1.0]}
        judging.add_row({**row, "query_likelihoods": [-1.0, -2.0], "relevances": [-1.0, -2.0]})
    verdict = judging.verdict()
    assert verdict.chosen is None
    assert verdict.reason.startswith(
        "SKIP: no fusion ranks the seed first more often than the retriever with BM25, which does"
        " for 100 % of 20 queries"
    )


@pytest.mark.parametrize(("seed_rank", "counted"), [(1, 1), (2, 1), (3, 0), (0, 0), (None, 0)])
def test_query_counts_where_the_retriever_has_its_seed_among_the_scored(
    seed_rank: int | None, counted: int
) -> None:
    judging = Judging()
    row = {"seed_id": "b", "seed_rank": seed_rank, "candidate_ids": ["a", "b", "c"]}
    row |= {"similarities": [0.9, 0.8, 0.7], "query_likelihoods": [-2.0, -1.0]}
    judging.add_row({**row, "relevances": [-1.0, -2.0]})
    assert judging.num_queries == counted
    assert judging.share(Ranking(fusion="ql")) == counted


@pytest.mark.parametrize(
    ("column", "titles"),
    [
        ("query_likelihoods", ["the retriever", "QL", "QL + sim by ranks", "z(QL) + z(sim)"]),
        ("relevances", ["the retriever", "RC"]),
    ],
)
def test_rankings_whose_judges_were_not_asked_are_left_out(column: str, titles: list[str]) -> None:
    judging = Judging()
    row = {"seed_id": "b", "seed_rank": 2, "candidate_ids": ["a", "b", "c"]}
    row |= {"similarities": [0.9, 0.8, 0.7], "query_likelihoods": [], "relevances": []}
    judging.add_row({**row, column: [-2.0, -1.0]})
    assert judging.num_queries == 1
    assert [each.ranking for each in judging.table()] == titles
    chosen = judging.choose()
    assert chosen is None or chosen.title in titles
    assert any(title in judging.verdict().reason for title in titles[1:])


def test_unscored_query_does_not_count() -> None:
    judging = Judging()
    row = {"seed_id": "b", "seed_rank": 1, "candidate_ids": ["b", "a"]}
    judging.add_row({**row, "similarities": [1.0, 0.5], "query_likelihoods": [], "relevances": []})
    assert judging.num_queries == 0
