"""Models and dimensions side by side: differences, and means by type as MTEB takes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pipelines.evaluation.evaluate import Result, difference, known

# The model of a run that the others are compared with.
STUDENT_AFTER = "student_after"


def compare(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Returns the differences between one model and all others, on every test set.

    In a run that model is the trained student, and each difference is its score minus another's;
    otherwise it is the first model, whose score is subtracted from each of the others'. Results are
    paired at the same number of dimensions, or with the model's largest number where it was not
    measured at that one. Its own shorter vectors are compared with its full ones.
    """
    is_run = any(result.model == STUDENT_AFTER for result in results)
    base = STUDENT_AFTER if is_run else next((result.model for result in results), "")
    rows = []
    for result in results:
        partner = _partner(result, base, results)
        if partner is None:
            continue
        after_base = is_run and result.model != base
        before, after = (result, partner) if after_base else (partner, result)
        gain = difference(before, after)
        rows.append(
            {
                "before": before.model,
                "before_dimensions": before.dimensions,
                "after": after.model,
                "after_dimensions": after.dimensions,
                "dataset": after.dataset,
                "split": after.split,
                "metric": after.metric,
                "difference": known(gain.mean),
                "interval": gain.interval,
            }
        )
    return rows


def _partner(result: Result, base: str, results: Iterable[Result]) -> Result | None:
    test = (result.dataset, result.task_type, result.split)
    candidates = [
        each
        for each in results
        if each.model == base and (each.dataset, each.task_type, each.split) == test
    ]
    largest = max(candidates, key=lambda each: each.dimensions, default=None)
    if result.model == base:
        return largest if largest and result.dimensions < largest.dimensions else None
    same = [each for each in candidates if each.dimensions == result.dimensions]
    return same[0] if same else largest


def averages(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Returns MTEB's means of the main scores for each model and number of dimensions.

    ``types`` is the mean over the test sets of each type, ``mean_task`` the mean over all test
    sets, ``mean_task_type`` the mean over the types' means (MTEB's "Mean (Task)" and "Mean
    (TaskType)"). A mean over a score that is none is None.
    """
    grouped: dict[tuple[str, int], dict[str, list[float]]] = {}
    for result in results:
        types = grouped.setdefault((result.model, result.dimensions), {})
        types.setdefault(result.task_type, []).append(result.score.mean)
    rows = []
    for (model, dimensions), types in grouped.items():
        means = {name: sum(scores) / len(scores) for name, scores in types.items()}
        scores = [score for each in types.values() for score in each]
        mean_type = sum(means.values()) / len(means)
        rows.append(
            {
                "model": model,
                "dimensions": dimensions,
                "num_test_sets": len(scores),
                "types": {name: known(mean) for name, mean in means.items()},
                "mean_task": known(sum(scores) / len(scores)),
                "mean_task_type": known(mean_type),
            }
        )
    return rows
