"""A run with test sets of several kinds and dimensions: one table of all of them."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.artifacts import Json
from pipelines.report.terminal import print_evaluation
from pipelines.report.write import write_report


@pytest.fixture
def document(finished_run: str, tmp_path: Path) -> dict[str, Json]:
    """The report of the finished run, to whose evaluation an STS set and a cut are added."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    path = run / "evaluation" / "results.json"
    results: dict[str, Any] = json.loads(path.read_text())
    retrieval = list(results["results"])
    for place, row in enumerate(retrieval):
        sts = {"dataset": "s", "task_type": "STS", "metric": "cosine_spearman"}
        score = {"cosine_spearman": 0.1 * place, "cosine_spearman_interval": None}
        common = {"model": row["model"], "split": "test", "samples": {}, "per_query": {}}
        results["results"].append({**common, **sts, **score, "dimensions": 4})
        results["results"].append({**row, "dimensions": 2, "ndcg_at_10": 0.0, "score": 0.0})
    results["averages"] = [
        {"model": row["model"], "dimensions": 4, "mean_task": 0.5, "mean_task_type": 0.25}
        for row in retrieval
    ]
    path.write_text(json.dumps(results))
    return write_report(str(run))


def test_report_of_retrieval_alone_needs_no_second_table(report: dict[str, Json]) -> None:
    assert report["scores"] == {}


def test_report_of_several_kinds_shows_each_at_each_dimension(document: dict[str, Json]) -> None:
    rows = document["scores"]["rows"]
    assert [(row["dataset"], row["dimensions"]) for row in rows] == [
        ("questions", 5),
        ("s", 4),
        ("questions", 2),
    ]
    assert rows[1]["student_after"] == {"score": pytest.approx(0.2), "interval": None}
    means = dict.fromkeys(("retriever", "student_before", "student_after"), 0.25)
    assert document["scores"]["means"][1] == {"name": "mean of types", "dimensions": 4, **means}
    page = Path(document["html"]).read_text()
    assert "mean of test sets" in page
    assert "STS, cosine_spearman" in page and "0.200" in page
    console = Console(file=io.StringIO(), width=80)
    print_evaluation(document, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "cosine" not in shown and "0.200" in shown and "mean of types" in shown
    # The run has no such stage.
    assert "pre-finetuned" not in shown and "pre-finetuned" not in page


def test_report_shows_the_queries_of_the_full_vectors(
    document: dict[str, Json], report: dict[str, Json]
) -> None:
    assert document["test_sets"].keys() == {"questions"}
    for key in ("student_after", "difference"):
        assert document["test_sets"]["questions"][key] == report["test_sets"]["questions"][key]


def test_report_shows_the_scores_of_a_retrieval_task_whose_queries_are_not_kept(
    finished_run: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    path = run / "evaluation" / "results.json"
    results = json.loads(path.read_text())
    path.write_text(json.dumps({**results, "queries": {}, "qrels": {}}))  # as of mteb's own tasks
    report = write_report(str(run))
    assert report["test_sets"] == {}
    (row,) = report["scores"]["rows"]
    score = results["results"][-1]["ndcg_at_10"]
    assert row["dataset"] == "questions" and row["student_after"]["score"] == score
