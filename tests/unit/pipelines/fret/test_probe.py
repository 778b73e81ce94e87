"""The probe: which queries it draws, that it scores no others, and that they are scored once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.artifacts import Artifact, Json, write_shards
from cluster.steps import Run, Step, StepContext
from pipelines.fret import probe
from pipelines.fret.pairs import Queries, pairs_to_score
from pipelines.fret.probe import draw_queries
from pipelines.fret.prompts import PairPrompts
from pipelines.recipe.read import load_recipe
from pipelines.run.console import JsonLines

IDS = ["a", "b", "c"]
Row = dict[str, Any]
Mined = Callable[[list[Row]], list[Step]]


def found(number: int, seed_rank: int | None = 1, dropped_by: str | None = None) -> Row:
    return {
        "id": f"q{number:02}",
        "seed_id": IDS[(seed_rank or 3) - 1],
        "task": "question answering",
        "query": f"query {number}",
        "dropped_by": dropped_by,
        "candidate_ids": [] if seed_rank is None else IDS,
        "similarities": [] if seed_rank is None else [0.9, 0.8, 0.7],
        "seed_rank": seed_rank,
    }


def test_drawn_are_queries_that_can_tell_and_more_contain_the_fewer(
    tmp_path: Path, mined: Mined
) -> None:
    fit = [found(number, seed_rank=1 + number % 2) for number in range(20)]
    unfit = [found(20, seed_rank=3), found(21, 0), found(22, None, "query too short")]
    unfit.append(found(23, 2, "round trip failed"))
    unfit += [found(24) | {"task": "title"}, found(25) | {"task": "sentence"}]
    artifact = Run(str(tmp_path), mined([*unfit, *fit])).execute(JsonLines())["candidates"]
    drawn = [draw_queries(artifact, num, num_scored=2) for num in (0, 5, 12, 100)]
    assert [len(each) for each in drawn] == [0, 5, 12, 20]
    assert drawn[1] < drawn[2] < drawn[3] == {row["id"] for row in fit}
    assert drawn[1] != {row["id"] for row in fit[:5]}


def test_queries_are_those_named_or_all_the_others() -> None:
    only, others = Queries(ids=frozenset("a"), only=True), Queries(ids=frozenset("a"))
    assert "a" in only and "b" not in only
    assert "a" not in others and "b" in others
    assert "a" in Queries()


@pytest.mark.parametrize("ql", [[-3.0, -1.0, -2.0], [-1.0, -2.0, -3.0]])
def test_probe_scores_the_drawn_queries_alone_and_says_how_the_teacher_did(
    tmp_path: Path,
    mined: Mined,
    by_passage: Any,
    monkeypatch: pytest.MonkeyPatch,
    ql: list[float],
) -> None:
    rows = [found(number, seed_rank=2) for number in range(40)]
    asked: list[Queries] = []
    sources: list[Artifact] = []

    def group(num_scored: int, context: StepContext, queries: Queries, num_shards: int) -> Any:
        assert (num_scored, num_shards) == (3, 1)
        asked.append(queries)
        context.log.append(write_shards(context.storage, pa.table({"x": [1, 2]}), 1))
        return {"num_passages": 3, "num_pairs": 60}

    def score(prompts: PairPrompts, _: Any, pairs: Artifact, context: StepContext) -> Any:
        assert prompts.judges == ("ql", "rc")
        sources.append(pairs)
        judged = [row for row in rows if row["id"] in asked[0]]
        scores = {"query_likelihoods": ql, "relevances": [-1.0, -2.0, -3.0]}
        table = by_passage([row | scores for row in judged])
        context.log.append(write_shards(context.storage, table, 2))
        return {"num_pairs": 60, "num_prompt_tokens": 9}

    monkeypatch.setattr(probe, "group_pairs", group)
    monkeypatch.setattr(probe, "score_pairs", score)
    recipe = load_recipe(
        "laptop", ["fret.fusion=auto", "probe.num_queries=20", "scores.num_scored=3"]
    )
    step = probe.step(recipe)
    run = Run(str(tmp_path), [*mined(rows), step])
    artifact = run.execute(JsonLines())["probe"]
    assert asked[0].only and len(asked[0].ids) == 20
    assert sources[0].num_rows == 2 and sources[0].manifest.metrics["num_pairs"] == 60
    metrics = artifact.manifest.metrics
    assert (metrics["num_queries"], metrics["num_judged"], metrics["num_scored"]) == (20, 20, 3)
    assert metrics["num_prompt_tokens"] == 9
    if ql[1] == -1.0:  # QL finds the seed; the retriever, like RC, never does
        chosen = [metrics[key] for key in ("verdict", "fusion", "scale")]
        assert chosen == ["GO", "ql+sim", "z-scores"]
    else:
        assert (metrics["verdict"], metrics["fusion"]) == ("SKIP", None)
    assert artifact.shards and not (tmp_path / "probe/work").exists()
    assert artifact.read().column_names[0] == "passage_id"


def test_probe_compares_with_the_order_that_bm25_had_a_part_in(
    tmp_path: Path, mined: Mined, by_passage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By similarity the seed is the second, with BM25 and by QL the first.
    hybrid = {"seed_rank": 1, "similarities": [0.8, 0.9, 0.7], "hybrid": [3.0, 2.0, 1.0]}
    rows = [found(number) | hybrid | {"lexical": [9.0, 1.0, 0.0]} for number in range(9)]
    scores = {"query_likelihoods": [-1.0, -2.0, -3.0], "relevances": [-1.0, -2.0, -3.0]}

    def score(_: Any, __: Any, pairs: Artifact, context: StepContext) -> Any:
        table = by_passage([row | scores for row in rows])
        context.log.append(write_shards(context.storage, table, 2))
        return {"num_pairs": 27}

    monkeypatch.setattr(probe, "group_pairs", lambda *_, **__: {"num_passages": 3, "num_pairs": 27})
    monkeypatch.setattr(probe, "score_pairs", score)
    settings = ["fret.fusion=auto", "candidates.lexical.weight=0.25", "scores.num_scored=3"]
    run = Run(str(tmp_path), [*mined(rows), probe.step(load_recipe("laptop", settings))])
    metrics = run.execute(JsonLines())["probe"].manifest.metrics
    assert (metrics["verdict"], metrics["fusion"]) == ("SKIP", None)
    retriever = metrics["judges"][0]
    assert (retriever["fusion"], retriever["seed_first"]) == ("hybrid", 1.0)


def test_nothing_is_left_to_score_after_a_skip(tmp_path: Path, mined: Mined) -> None:
    def skip(context: StepContext) -> dict[str, Json]:
        return {"fusion": None}

    steps = [
        *mined([found(0)]),
        Step(name="probe", config={}, inputs=(), work=skip),
        Step(
            name="pairs",
            config={},
            inputs=("candidates", "probe", "passages"),
            work=lambda context: pairs_to_score(3, context),
        ),
    ]
    pairs = Run(str(tmp_path), steps).execute(JsonLines())["pairs"]
    assert pairs.num_shards == 0
    assert pairs.manifest.metrics == {"num_passages": 0, "num_pairs": 0}
