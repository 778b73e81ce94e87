"""Differences and MTEB's means, worked by hand."""

import math
from typing import Any

import numpy as np
import pytest

from pipelines.evaluation.compare import averages, compare
from pipelines.evaluation.evaluate import Result
from pipelines.evaluation.items import Sample


def result(model: str, dataset: str, scores: list[float], **changed: Any) -> Result:
    known: dict[str, Any] = {
        "model": model,
        "dataset": dataset,
        "task_type": "STS",
        "split": "test",
        "task": "",
        "dimensions": 8,
        "metric": "m",
        "mteb_score": float(np.mean(scores)),
        "counts": {},
        "texts_per_s": 0.0,
        "samples": {"m": [Sample(statistic="mean", rows=np.array([scores]))]},
        "top_results": {},
    }
    return Result(**(known | changed))


def sides(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [
        (row["after"], row["after_dimensions"], row["before"], row["before_dimensions"])
        for row in rows
    ]


def test_compare_takes_the_first_model_from_the_others() -> None:
    rows = compare(
        [
            result("a", "x", [0.5, 0.7]),
            result("b", "x", [0.6, 0.8]),
            result("a", "y", [0.1, 0.1]),
            result("b", "y", [0.1, 0.2]),
        ]
    )
    assert sides(rows) == [("b", 8, "a", 8)] * 2
    assert [row["dataset"] for row in rows] == ["x", "y"]
    # 0.1 on each item of x, whichever are drawn.
    assert rows[0]["difference"] == pytest.approx(0.1)
    assert rows[0]["interval"] == pytest.approx([0.1, 0.1])
    assert rows[1]["interval"] == pytest.approx([0.0, 0.1])


def test_compare_has_no_interval_where_one_model_has_no_items() -> None:
    (row,) = compare([result("a", "x", [0.5, 0.7]), result("b", "x", [0.8, 0.8], samples={})])
    assert row["difference"] == pytest.approx(0.2)
    assert row["interval"] is None


def test_compare_takes_a_runs_models_from_its_trained_student() -> None:
    models = ("retriever", "student_before", "student_after")
    rows = compare([result(model, "x", [score]) for score, model in enumerate(models)])
    assert sides(rows) == [
        ("student_after", 8, "retriever", 8),
        ("student_after", 8, "student_before", 8),
    ]
    assert [row["difference"] for row in rows] == [2, 1]


def test_compare_holds_equal_dimensions_together_and_cut_ones_against_full() -> None:
    results = [
        result(model, "x", [0.5], dimensions=size)
        for model, sizes in (("a", (8, 4)), ("b", (6, 4)))
        for size in sizes
    ]
    assert sides(compare(results)) == [("a", 4, "a", 8), ("b", 6, "a", 8), ("b", 4, "a", 4)]


def test_compare_without_single_items_has_no_interval() -> None:
    rows = compare([result(model, "x", [0.5], samples={}) for model in "ab"])
    assert (rows[0]["difference"], rows[0]["interval"]) == (0.0, None)


def test_averages_are_over_test_sets_and_over_types() -> None:
    rows = averages(
        [
            result("a", "x", [0.2]),
            result("a", "y", [0.4]),
            result("a", "z", [0.9], task_type="Retrieval"),
            result("a", "x", [0.1], dimensions=4),
        ]
    )
    assert [(row["dimensions"], row["num_test_sets"]) for row in rows] == [(8, 3), (4, 1)]
    assert rows[0]["types"] == pytest.approx({"STS": 0.3, "Retrieval": 0.9})
    assert rows[0]["mean_task"] == pytest.approx(0.5)
    assert rows[0]["mean_task_type"] == pytest.approx(0.6)


def test_compare_and_means_of_a_score_that_is_none_are_none() -> None:
    rows = [result("a", "x", [0.5, math.nan]), result("b", "x", [0.5, 0.5])]
    (row,) = compare(rows)
    assert (row["difference"], row["interval"]) == (None, None)
    without, found = averages(rows)
    assert (without["types"], without["mean_task"], without["mean_task_type"]) == (
        {"STS": None},
        None,
        None,
    )
    assert found["mean_task"] == 0.5
