"""The cross-encoder's scores of pairs, and what they become as a judge."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from actors.cross_encoder import CrossEncoder
from cluster.artifacts import Artifact, write_shards
from cluster.stages import StageOutput, StageResources
from cluster.steps import Run, Step, StepContext
from pipelines.datasets.decontamination import Decontamination
from pipelines.fret.cross_scores import CrossEncoderConfig, CrossScorePairs
from pipelines.fret.fret import FretConfig, make_fret
from pipelines.fret.fusion import steps_unasked
from pipelines.fret.judging import judging_of
from pipelines.records import CANDIDATES, CROSS_SCORES, PAIRS, PASSAGE
from pipelines.run.console import JsonLines

SHARD = pa.Table.from_pylist(
    [
        {
            "passage_id": "a",
            "title": "Bees",
            "text": "They dance in the shape of an eight.",
            "query_ids": ["q1", "q2"],
            "queries": ["how do bees dance", "wing"],
        },
        {
            "passage_id": "b",
            "title": "",
            "text": "A wing in the wind tunnel.",
            "query_ids": ["q1"],
            "queries": ["how do bees dance"],
        },
    ],
    schema=PAIRS,
)


def scored(folder: Path, **config: Any) -> StageOutput:
    cross_encoder = CrossEncoderConfig(model=str(folder), **config)
    stage = CrossScorePairs(cross_encoder=cross_encoder, resources=StageResources())

    async def run() -> StageOutput:
        return await stage.load()(SHARD)

    return asyncio.run(run())


def test_each_pair_of_a_shard_gets_its_own_score(
    tiny_classifier: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_classifier(tmp_path / "model")
    bees = "Bees They dance in the shape of an eight."
    pairs = [("how do bees dance", bees), ("wing", bees)]
    pairs.append(("how do bees dance", "A wing in the wind tunnel."))
    expected = [float(score) for score in CrossEncoder.load(str(folder)).score(pairs)]
    output = scored(folder)
    assert output.rows.schema == CROSS_SCORES
    rows = output.rows.to_pylist()
    assert [row["passage_id"] for row in rows] == ["a", "b"]
    assert [row["query_ids"] for row in rows] == [["q1", "q2"], ["q1"]]
    found = [score for row in rows for score in row["cross_scores"]]
    assert found == pytest.approx(expected, abs=1e-5)
    assert [row["errors"] for row in rows] == [[None, None], [None]]
    assert output.metrics == {"num_pairs": 3} and not output.unusable


def test_score_that_is_no_number_is_an_error_and_the_others_stay(
    tiny_classifier: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = CrossEncoder.score_prepared

    def broken(*args: Any, **options: Any) -> Any:
        scores = score(*args, **options)
        scores[1] = float("nan")
        return scores

    monkeypatch.setattr(CrossEncoder, "score_prepared", broken)
    output = scored(tiny_classifier(tmp_path / "model"))
    rows = output.rows.to_pylist()
    reason = "the cross-encoder's score is no number"
    assert rows[0]["errors"] == [None, reason] and rows[0]["cross_scores"][1] is None
    assert rows[1]["errors"] == [None] and rows[1]["cross_scores"][0] is not None
    assert output.unusable == [("query q2 with passage a", reason, "wing")]


IDS = ["a", "b", "c"]


def query(id_: str, text: str, seed: str = "a", seed_rank: int = 1) -> dict[str, Any]:
    return {
        "id": id_,
        "seed_id": seed,
        "task": "search result",
        "query": text,
        "dropped_by": None,
        "candidate_ids": IDS,
        "similarities": [0.9, 0.8, 0.7],
        "seed_rank": seed_rank,
    }


def cross(scores: dict[str, dict[str, float | None]]) -> pa.Table:
    """Turns scores by query and passage into the table of the step."""
    rows = []
    for id_ in IDS:
        own = {name: of[id_] for name, of in scores.items() if id_ in of}
        errors = [None if score is not None else "no number" for score in own.values()]
        rows.append(
            {
                "passage_id": id_,
                "query_ids": list(own),
                "cross_scores": list(own.values()),
                "errors": errors,
            }
        )
    return pa.Table.from_pylist(rows, schema=CROSS_SCORES)


def fret(folder: Path, queries: list[Any], tables: dict[str, pa.Table], **config: Any) -> Artifact:
    passages = [{"id": i, "title": "", "text": f"text {i}", "source": i} for i in IDS]

    def step(name: str, table: pa.Table) -> Step:
        def work(context: StepContext) -> dict[str, Any]:
            write_shards(context.storage, table, 2)
            return {}

        return Step(name=name, config={}, inputs=(), work=work)

    tables = {
        "passages": pa.Table.from_pylist(passages, schema=PASSAGE),
        "candidates": pa.Table.from_pylist(queries, schema=CANDIDATES),
        **tables,
    }
    steps = [step(name, table) for name, table in tables.items()]

    def work(context: StepContext) -> dict[str, Any]:
        return make_fret(FretConfig(**config), Decontamination([]), context)

    steps.append(Step(name="fret", config={}, inputs=tuple(tables), work=work))
    return Run(str(folder), steps).execute(JsonLines())["fret"]


def test_cross_encoder_alone_judges_what_it_scored(tmp_path: Path) -> None:
    queries = [
        query("q1", "what makes bread rise"),
        query("q2", "why is the sky blue"),
        query("q3", "how do bees dance", seed="c", seed_rank=3),
    ]
    scores: dict[str, dict[str, float | None]] = {
        "q1": {"a": -1.0, "c": 3.0},  # b was not scored
        "q2": {"a": 1.0, "b": None, "c": 2.0},
        "q3": {"a": 1.0, "b": 2.0, "c": 3.0},
    }
    made = fret(tmp_path, queries, {"cross_scores": cross(scores)}, fusion="ce", negative="all")
    first, second, third = made.read().to_pylist()
    assert first["candidate_ids"] == ["a", "c", "b"]
    assert first["cross_scores"] == [-1.0, 3.0]
    assert first["fused"] == [0.5, 1.0]
    assert (first["positive_id"], first["negative_ids"]) == ("c", ["a"])
    assert (first["query_likelihoods"], first["relevances"]) == ([], [])
    assert (second["dropped_by"], second["positive_id"]) == ("no number", None)
    assert (third["positive_id"], third["negative_ids"]) == ("c", ["a", "b"])
    metrics = made.manifest.metrics
    # It puts the seed first for q3, and the retriever for q1.
    rows = {row["ranking"]: (row["better"], row["worse"]) for row in metrics["judges"]}
    assert rows["CE"] == (1, 1) and rows["the retriever"] == (0, 0)
    assert not {"QL", "RC"} & rows.keys()
    assert (metrics["num_judged"], metrics["num_scored"]) == (2, 2)


def test_llm_and_cross_encoder_judge_the_same_pairs_together(
    tmp_path: Path, by_passage: Callable[[list[dict[str, Any]]], pa.Table]
) -> None:
    asked = query("q1", "what makes bread rise")
    llm = by_passage([asked | {"query_likelihoods": [-3.0, -1.0, -2.0], "relevances": [-1.0] * 3}])
    # By QL b, c, a; by the cross-encoder a, c, b with a far ahead.
    tables = {"scores": llm, "cross_scores": cross({"q1": {"a": 9.0, "b": 0.0, "c": 0.5}})}
    made = fret(tmp_path, [asked], tables, fusion="ql+ce", scale="z-scores", negative="all")
    (row,) = made.read().to_pylist()
    assert row["query_likelihoods"] == [-3.0, -1.0, -2.0]
    assert row["cross_scores"] == [9.0, 0.0, 0.5]
    z = 1.5**0.5
    mean, deviation = 9.5 / 3, (sum((n - 9.5 / 3) ** 2 for n in (9.0, 0.0, 0.5)) / 3) ** 0.5
    expected = [(9 - mean) / deviation - z, -mean / deviation + z, (0.5 - mean) / deviation]
    assert row["fused"] == pytest.approx(expected, abs=1e-5)
    assert row["positive_id"] == "b"
    titles = [judge["ranking"] for judge in made.manifest.metrics["judges"]]
    assert {"QL", "RC", "CE", "z(QL) + z(CE)"} <= set(titles) and len(set(titles)) == len(titles)


def test_cross_encoder_that_ranks_the_seed_first_more_often_is_worth_its_labels() -> None:
    judging = judging_of("ce", "ranks")
    for _ in range(20):
        judging.add({"sim": [0.9, 0.8], "ce": [-1.0, 1.0]}, 1)
    verdict = judging.verdict()
    assert verdict.verdict == "GO" and verdict.chosen is not None
    assert verdict.chosen.fusion == "ce"
    assert verdict.reason.startswith("GO: CE ranks the seed first for 100 % of 20 queries")


def test_cross_encoder_has_to_beat_the_order_that_bm25_had_a_part_in() -> None:
    judging = judging_of("ce+sim", "z-scores", "hybrid")
    for _ in range(20):
        judging.add({"sim": [0.9, 0.8], "hybrid": [1.0, 1.5], "ce": [1.0, -1.0]}, 1)
    assert [row.ranking for row in judging.table()] == [
        *("the retriever with BM25", "CE", "z(CE) + hybrid", "CE + hybrid by ranks"),
        "z(CE) + z(sim)",  # the run's own, as it is
    ]
    verdict = judging.verdict()
    assert (verdict.verdict, verdict.chosen) == ("SKIP", None)
    assert "more often than the retriever with BM25, which does for 100 %" in verdict.reason


def test_judge_of_the_llm_that_was_not_asked_is_no_row_beside_the_cross_encoder() -> None:
    judging = judging_of("ql+ce", "z-scores")
    row = {"seed_id": "b", "seed_rank": 2, "candidate_ids": ["a", "b"], "relevances": []}
    row |= {"similarities": [0.9, 0.8], "query_likelihoods": [-2.0, -1.0]}
    judging.add_row({**row, "cross_scores": [-1.0, 3.0], "lexical": [], "hybrid": []})
    assert judging.num_queries == 1
    assert {each.ranking for each in judging.table()} == {
        *("the retriever", "QL", "CE", "z(QL) + z(sim)", "QL + sim by ranks"),
        *("z(CE) + z(sim)", "CE + sim by ranks", "z(QL) + z(CE)"),
    }
    assert judging.verdict().chosen is not None


@pytest.mark.parametrize(
    ("fusion", "unasked"),
    [
        ("auto", {"cross_scores"}),
        ("ql+rc", {"cross_scores"}),
        ("ce+sim", {"scores"}),
        ("ql+ce", set()),
        ("sim", {"pairs", "scores", "cross_scores"}),
    ],
)
def test_steps_are_those_that_the_judges_need(fusion: str, unasked: set[str]) -> None:
    assert steps_unasked(fusion) == unasked
