"""report.json of a run that is small enough to be worked by hand."""

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from cluster.artifacts import Json
from cluster.errors import UserError
from cluster.storage import open_storage
from pipelines.fret.fret import FretConfig
from pipelines.report.collect import collect_funnel
from pipelines.report.examples import DROPPED, ORDERS, describe_examples
from pipelines.report.inspection import inspect_run, print_examples
from pipelines.report.labels import collect_labels
from pipelines.report.run_folder import RunFolder
from pipelines.report.terminal import print_evaluation
from pipelines.report.test_sets import choose_queries
from pipelines.report.write import write_report

RANK_2 = 1 / math.log2(3)


def copy_of(run: str, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "copy"))


def test_report_equals_figures_worked_by_hand(report: dict[str, Json]) -> None:
    assert report["recipe"] == "tiny"
    assert report["retriever"]["ndcg_at_10"] == 1.0
    before, after = (5 + RANK_2) / 7, (4.5 + 2 * RANK_2) / 7
    assert report["student_before"]["ndcg_at_10"] == pytest.approx(before)
    assert report["student_after"]["ndcg_at_10"] == pytest.approx(after)
    assert report["difference"]["ndcg_at_10"] == pytest.approx(after - before)
    low, high = report["difference"]["interval"]
    assert low < after - before < high
    assert report["student_after"]["recall_at_10"] == 1.0
    assert report["student_after"]["num_parameters"] == 14_000_000
    assert report["test_sets"]["questions"]["student_after"] == report["student_after"]
    assert report["test_sets"]["questions"]["changes"] == {
        "better": 3,
        "worse": 2,
        "unchanged": 2,
    }


def test_report_counts_what_each_step_left(report: dict[str, Json]) -> None:
    assert {row["name"]: row["count"] for row in report["funnel"]} == {
        "documents": 4,
        "passages": 5,
        "seed passages": 5,
        "queries written": 4,
        "queries scored": 3,
        "not repeating an evaluation query": 2,
        "not repeating another query": 2,
        "not nearly repeating another query": 2,
        "with a hard negative": 1,
        "training examples": 2,
    }
    assert report["rejects"] == {
        "passages": {"duplicate": 2, "empty": 1},
    }
    assert report["dropped_by"] == {
        "query too short": 1,
        "repeats an evaluation query": 1,
        "round trip failed": 1,
    }
    assert report["positive_is_not_seed_share"] == pytest.approx(1 / 3)
    assert report["positive_is_not_seed_share_kept"] == 0.5
    assert report["seed_ranks"] == [
        {"rank": 1, "scored": 2, "kept": 1},
        {"rank": 2, "scored": 1, "kept": 1},
        {"rank": 0, "scored": 1, "kept": 0},
    ]
    assert report["training"]["batches"] == 3
    assert report["training"]["loss"] == [[0, 3.0], [1, 2.5], [2, 2.0]]


def test_report_shows_examples_with_the_scores_that_chose_them(
    report: dict[str, Json],
) -> None:
    examples = {example["id"]: example for example in report["examples"]}
    kinds = [(example["id"], example["kind"]) for example in report["examples"]]
    assert kinds == [
        ("q0", "Drawn at random"),
        ("q1", "Drawn at random"),
        ("q4", DROPPED),
        ("q3", DROPPED),
        ("q2", DROPPED),
    ]
    kept = examples["q0"]
    assert kept["positive"] == kept["seed"] == {"id": "p0", "title": "title 0", "text": "text 0"}
    assert [row["id"] for row in kept["negatives"]] == ["p2"]
    assert [candidate["roles"] for candidate in kept["candidates"]] == [
        ["seed", "positive"],
        [],
        ["hard negative"],
    ]
    assert [candidate["fused"] for candidate in kept["candidates"]] == pytest.approx([2, 1, 2 / 3])
    assert examples["q1"]["positive"]["id"] == "p2"
    assert examples["q1"]["negatives"] == []
    assert examples["q3"]["dropped_by"] == "repeats an evaluation query"
    # QL ranks p3, p0, p1; RC ranks p1, p0, p3.
    ranks = {row["id"]: (row["ql_rank"], row["rc_rank"]) for row in examples["q3"]["candidates"]}
    assert ranks == {"p3": (1, 3), "p0": (2, 2), "p1": (3, 1)}


def test_report_shows_queries_that_got_better_and_worse(report: dict[str, Json]) -> None:
    queries = report["test_sets"]["questions"]["queries"]
    assert [query["id"] for query in queries] == ["e1", "e2", "e5", "e4", "e3"]
    assert queries[0]["query"] == "question e1"
    assert queries[0]["ndcg_at_10"] == {"student_before": 0.5, "student_after": 1.0}
    top = queries[0]["top_results"]
    assert [hit["id"] for hit in top["student_before"]] == ["p1", "p2", "p0"]
    assert top["student_after"][0]["title"] == "title 0"


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ({"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.4, "e": 0.5, "f": 0.6}, "fedbc"),
        ({"a": 0.5, "b": -0.1, "c": 0.0, "d": 0.0}, "acdb"),
        ({"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0, "e": 0.0, "f": 0.0}, "abcde"),
    ],
)
def test_choose_queries_fills_five_where_a_kind_is_missing(
    gains: dict[str, float], expected: str
) -> None:
    chosen = choose_queries(dict.fromkeys(gains, 0.5), {q: 0.5 + gain for q, gain in gains.items()})
    assert "".join(chosen) == expected


def test_report_marks_answers_where_the_evaluation_kept_its_qrels(
    finished_run: str, tmp_path: Path
) -> None:
    run = copy_of(finished_run, tmp_path)
    results = run / "evaluation" / "results.json"
    document = json.loads(results.read_text())
    document["qrels"] = {
        "questions": {query: {"p0": 1} for query in document["queries"]["questions"]}
    }
    results.write_text(json.dumps(document))
    query = write_report(str(run))["test_sets"]["questions"]["queries"][0]
    hits = query["top_results"]["student_before"]
    assert [(hit["id"], hit["relevant"]) for hit in hits] == [
        ("p1", False),
        ("p2", False),
        ("p0", True),
    ]


def test_report_finds_texts_by_document_where_the_test_set_is_the_corpus(
    finished_run: str, tmp_path: Path
) -> None:
    run = copy_of(finished_run, tmp_path)
    results = run / "evaluation" / "results.json"
    results.write_text(results.read_text().replace('"p0"', '"document 0"'))
    recipe = (run / "recipe.yaml").read_text()

    def first_hit() -> dict[str, str]:
        queries = write_report(str(run))["test_sets"]["questions"]["queries"]
        hit: dict[str, str] = queries[0]["top_results"]["student_after"][0]
        return hit

    assert (first_hit()["id"], first_hit()["title"]) == ("document 0", "")
    path = recipe.split("path: ")[2].split()[0]
    (run / "recipe.yaml").write_text(recipe.replace("path: corpus.jsonl", f"path: {path}"))
    assert (first_hit()["id"], first_hit()["title"]) == ("document 0", "title 0")


def test_lists_are_shown_as_lists_and_not_as_hard_negatives(
    build_run: Callable[..., str],
) -> None:
    labels = FretConfig(negative="all", fusion="ql+sim", scale="z-scores")
    document = write_report(build_run(until="fret", labels=labels))
    assert "with a hard negative" not in [row["name"] for row in document["funnel"]]
    kept = next(example for example in document["examples"] if example["id"] == "q0")
    assert kept["negatives"] is None
    roles = [candidate["roles"] for candidate in kept["candidates"]]
    assert roles == [["seed", "positive"], [], []]
    z = 1.5**0.5
    fused = [candidate["fused"] for candidate in kept["candidates"]]
    assert fused == pytest.approx([2 * z, 0, -2 * z], abs=1e-6)
    assert "Hard negative" not in Path(document["html"]).read_text()


def test_report_says_how_well_the_teacher_judges(report: dict[str, Json]) -> None:
    judges = report["judges"]
    first = {row["ranking"]: row["seed_first"] for row in judges["judges"]}
    assert judges["num_judged"] == 3
    assert (first["the retriever"], first["QL"], first["RC"]) == (0.6667, 0.6667, 0.3333)
    assert (judges["step"], judges["relabels"]) == ("fret", True)
    page = Path(report["html"]).read_text()
    assert "How well the teacher judges" in page and judges["reason"] in page
    assert "did not relabel" not in page


def test_report_says_that_a_teacher_was_skipped(build_run: Callable[..., str]) -> None:
    labels = FretConfig(fusion="auto", max_negative_similarity=None)
    document = write_report(build_run(until="fret", labels=labels))
    assert document["judges"]["relabels"] is False
    assert {row["name"]: row["count"] for row in document["funnel"]}["queries labelled"] == 3
    assert document["labels"]["ql_rc_correlation"] is None
    assert document["positive_is_not_seed_share"] == 0
    kept = next(example for example in document["examples"] if example["id"] == "q0")
    assert [row["roles"] for row in kept["candidates"]] == [
        ["seed", "positive"],
        [],
        ["hard negative"],
    ]
    assert {row["ql"] for row in kept["candidates"]} == {None}
    assert "the teacher did not relabel" in Path(document["html"]).read_text()
    console = Console(file=io.StringIO(), width=200)
    print_evaluation(document, console)
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Teacher: SKIP: " in told and "the teacher did not relabel" in told
    (shown,) = inspect_run(
        document["run"], task=None, dropped_by=None, order="hardest", num_examples=1
    )
    print_examples([shown], console)
    assert "0.90" in console.file.getvalue()  # type: ignore[attr-defined]


def test_report_of_a_partial_run_says_what_is_missing(build_run: Callable[..., str]) -> None:
    run = build_run(until="fret")
    document = write_report(run)
    assert document["student_after"] is None and document["test_sets"] == {}
    assert document["training"] is None
    assert [row["name"] for row in document["funnel"]][-1] == "with a hard negative"
    missing = ["embeddings", "pairs", "student", "mixture", "training", "export", "index"]
    assert document["unfinished"] == [*missing, "evaluation"]
    page = Path(document["html"]).read_text()
    assert "not finished" in page and "has not been trained yet" in page
    assert json.loads((Path(run) / "report.json").read_text()) == document


def test_report_of_a_run_without_a_finished_step_is_written(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: begun\nevaluation: []\n")
    (tmp_path / ".tokay").touch()
    document = write_report(str(tmp_path))
    assert document["recipe"] == "begun" and document["funnel"] == []
    assert "evaluation" not in document["unfinished"]
    assert "No step has finished yet" in (tmp_path / "report.html").read_text()


def test_report_says_which_steps_are_outdated(finished_run: str, tmp_path: Path) -> None:
    run = copy_of(finished_run, tmp_path)
    assert write_report(str(run))["outdated"] == []
    manifest = run / "mixture" / "manifest.json"
    fields = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**fields, "fingerprint": "anew"}))
    document = write_report(str(run))
    assert document["outdated"] == ["training", "export", "evaluation"]
    assert "rebuilt or deleted since: training" in (run / "report.html").read_text()


def test_report_of_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run of Tokay"):
        write_report(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_report_is_written_into_a_run_on_s3(finished_run: str, bucket: str) -> None:
    source, target = open_storage(finished_run), open_storage(f"{bucket}/tiny")
    for path in source.list():
        target.write_bytes(path, source.read_bytes(path))
    document = write_report(f"{bucket}/tiny/")
    assert document["html"] == f"{bucket}/tiny/report.html"
    assert json.loads(target.read_bytes("report.json")) == document
    assert target.read_bytes("report.html").startswith(b"<!DOCTYPE html>")


def test_report_says_what_each_accepted_example_cost(report: dict[str, Json]) -> None:
    costs = report["costs"]
    assert [row["name"] for row in costs["steps"]] == ["queries", "candidates", "scores", "fret"]
    queries = costs["steps"][0]
    assert (queries["prompt_tokens"], queries["computed_tokens"]) == (1200, 1000)
    # 2 actors at $36 an hour, for the seconds of two steps; 2 examples were kept.
    seconds = sum(row["seconds_s"] for row in costs["steps"] if "cost_usd" in row)
    assert costs["total"]["cost_usd"] == pytest.approx(seconds * 0.02)
    assert costs["per_accepted"]["computed_tokens"] == 500
    assert report["labels"]["near_duplicate_share"] == 0
    assert '<th class="n">cost</th>' in Path(report["html"]).read_text()


def test_page_shows_no_cost_where_the_recipe_names_no_price(
    finished_run: str, tmp_path: Path
) -> None:
    run = copy_of(finished_run, tmp_path)
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("36.0", "0.0"))
    page = Path(write_report(str(run))["html"]).read_text()
    assert "What the examples cost" in page and '<th class="n">cost</th>' not in page
    assert "$0.0" not in page


def test_funnel_counts_each_reason_of_decontamination() -> None:
    dropped = {
        "repeats an evaluation query": 1,
        "nearly repeats an evaluation query": 2,
        "shares words with an evaluation query": 4,
        "repeats another query": 8,
        "nearly repeats another query": 16,
    }
    counts = {"num_scored": 40, "num_kept": 9, "num_without_negative": 0, "dropped_by": dropped}
    storage: Any = None
    artifacts: Any = {"fret": SimpleNamespace(manifest=SimpleNamespace(metrics=counts, config={}))}
    run = RunFolder(storage=storage, recipe_text="", recipe={}, artifacts=artifacts)
    assert {row["name"]: row["count"] for row in collect_funnel(run)} == {
        "queries scored": 40,
        "not repeating an evaluation query": 33,
        "not repeating another query": 25,
        "not nearly repeating another query": 9,
        "with a hard negative": 9,
    }


def test_funnel_and_labels_leave_out_what_was_held_out_for_the_gate() -> None:
    queries = SimpleNamespace(
        num_rows=50, manifest=SimpleNamespace(metrics={"num_unusable": 10, "num_held_out": 15})
    )
    storage: Any = None
    artifacts: Any = {"queries": queries}
    run = RunFolder(storage=storage, recipe_text="", recipe={}, artifacts=artifacts)
    assert collect_funnel(run) == [
        {"name": "queries written", "count": 40},
        {"name": "not held out for the gate", "count": 25},
    ]
    artifacts["corpus_queries"] = SimpleNamespace(num_rows=7)
    (*_, own) = collect_funnel(run)
    assert own == {"name": "with titles and sentences of the corpus", "count": 32}
    del artifacts["corpus_queries"]
    row = {
        "task": "t",
        "query": "how do bees dance",
        "dropped_by": None,
        "positive_is_seed": True,
        "query_likelihoods": [-1.0],
        "relevances": [-1.0],
        "fused": [1.0],
        "candidate_ids": ["a"],
        "positive_id": "a",
    }
    held_out = row | {"dropped_by": "held out for the gate", "query_likelihoods": [], "fused": []}
    fret: Any = SimpleNamespace(tables=lambda columns: [pa.Table.from_pylist([row, held_out])])
    labels = collect_labels(fret)
    assert labels is not None and labels["tasks"][0]["num_queries"] == 1


def test_candidate_that_the_llm_has_not_scored_has_neither_ql_nor_rc() -> None:
    row = {
        "id": "q",
        "task": "t",
        "query": "how do bees dance",
        "dropped_by": None,
        "positive_is_seed": False,
        "seed_rank": 1,
        "seed_id": "a",
        "candidate_ids": ["a", "b", "c"],
        "similarities": [0.9, 0.8, 0.7],
        "query_likelihoods": [-1.0, -2.0],
        "relevances": [-0.5, -0.25],
        "fused": [0.5, -1.0, 0.75],
        "positive_id": "c",
        "negative_ids": ["b", "a"],
    }
    fret: Any = SimpleNamespace(manifest=SimpleNamespace(config={"negative": "all"}))
    (example,) = describe_examples([row], fret, None)
    found = [(each["id"], each["ql"], each["rc_rank"]) for each in example["candidates"]]
    assert found == [("c", None, None), ("a", -1.0, 2), ("b", -2.0, 1)]
    assert ORDERS["hardest"](row) == float("-inf")  # what the best explains is not known
    assert ORDERS["hardest"](row | {"fused": [0.5, 1.0, 0.0]}) == 2
    likely = row | {"relevances": []}  # which were not asked for
    (example,) = describe_examples([likely], fret, None)
    assert [(c["ql"], c["rc"], c["rc_rank"]) for c in example["candidates"]][1] == (
        -1.0,
        None,
        None,
    )
    assert ORDERS["doubt"](likely) == -1
    tables: Any = SimpleNamespace(tables=lambda columns: [pa.Table.from_pylist([likely])])
    labels = collect_labels(tables)
    assert labels is not None and labels["ql_rc_correlation"] is None
    unscored = row | {"query_likelihoods": [], "relevances": []}
    (example,) = describe_examples([unscored], fret, None)
    assert {each["ql"] for each in example["candidates"]} == {None}
    assert ORDERS["doubt"](unscored) == -1
    tables = SimpleNamespace(tables=lambda columns: [pa.Table.from_pylist([unscored])])
    labels = collect_labels(tables)
    assert labels is not None and labels["ql_rc_correlation"] is None
    assert labels["rank_shifts"] == [{"rank": 3, "count": 1}]
