"""Reading a run's examples, and the figures over all of them."""

import io
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from cluster.errors import UserError
from pipelines.report.inspection import ORDERS, inspect_run, print_examples
from pipelines.report.labels import rank_correlation
from pipelines.report.write import write_report


def look(run: str, order: str = "stored", **only: str | None) -> list[dict[str, object]]:
    chosen = {"task": None, "dropped_by": None} | only
    return inspect_run(run, order=order, num_examples=50, **chosen)


@pytest.mark.parametrize("order", ORDERS)
def test_inspect_shows_the_kept_queries_in_every_order(finished_run: str, order: str) -> None:
    labels = write_report(finished_run)["labels"]
    found = look(finished_run, order)
    assert found and all(example["dropped_by"] is None for example in found)
    assert len(found) == sum(task["num_kept"] for task in labels["tasks"])
    printed = io.StringIO()
    print_examples(found, Console(width=100, file=printed))
    assert all(str(example["query"]) in printed.getvalue() for example in found)


def test_lexical_scores_are_shown_of_queries_that_have_them(finished_run: str) -> None:
    found = look(finished_run)
    for examples, shown in ((found[:1], True), (found[1:], False)):
        assert examples
        printed = io.StringIO()
        print_examples(examples, Console(width=100, file=printed))
        assert ("BM25" in printed.getvalue(), "7.25" in printed.getvalue()) == (shown, shown)
    page = Path(write_report(finished_run)["html"]).read_text()
    assert page.count(">BM25</th>") == page.count(">7.250</td>") == 1


def test_orders_put_first_what_they_promise() -> None:
    calm = {
        "candidate_ids": ["a", "b", "c"],
        "positive_id": "a",
        "query_likelihoods": [-1.0, -2.0, -3.0],
        "relevances": [-0.1, -0.2, -0.3],
        "fused": [2.0, 1.0, 0.7],
    }
    moved = calm | {
        "positive_id": "c",
        "query_likelihoods": [-2.0, -1.0, -9.0],
        "relevances": [-0.2, -0.3, -0.1],
        "fused": [1.0, 1.3, 1.4],
    }
    for order in ("shift", "doubt", "hardest"):
        assert ORDERS[order](moved) > ORDERS[order](calm), order


def test_inspect_finds_what_was_dropped(finished_run: str) -> None:
    found = look(finished_run, dropped_by="any")
    assert found and all(example["dropped_by"] for example in found)
    reason = str(found[0]["dropped_by"])
    assert all(reason in str(e["dropped_by"]) for e in look(finished_run, dropped_by=reason))


@pytest.mark.parametrize(
    ("only", "order", "message"),
    [
        ({"task": "poetry"}, "stored", "no such query; its reasons for dropping are: "),
        ({}, "colour", "--by 'colour': accepted are shift, doubt, hardest, stored"),
    ],
)
def test_inspect_says_what_there_is_instead(
    only: dict[str, str], order: str, message: str, finished_run: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        look(finished_run, order, **only)


def test_labels_count_every_query_once(finished_run: str) -> None:
    report = write_report(finished_run)
    labels, fret = report["labels"], {step["name"]: step for step in report["steps"]}["fret"]
    assert sum(task["num_queries"] for task in labels["tasks"]) == fret["num_rows"]
    assert sum(task["num_scored"] for task in labels["tasks"]) == fret["metrics"]["num_scored"]
    assert sum(s["count"] for s in labels["rank_shifts"]) == fret["metrics"]["num_scored"]
    kept = [task["num_kept"] for task in labels["tasks"] if task["num_kept"]]
    entropy = -sum(n / sum(kept) * math.log2(n / sum(kept)) for n in kept)
    assert labels["task_entropy_bits"] == pytest.approx(entropy)


@pytest.mark.parametrize(
    ("right", "expected"), [([1, 2, 3, 4], 1.0), ([4, 3, 2, 1], -1.0), ([2, 1, 4, 3], 0.6)]
)
def test_rank_correlation_is_spearmans(right: list[float], expected: float) -> None:
    assert rank_correlation([1, 2, 3, 4], right) == pytest.approx(expected)
