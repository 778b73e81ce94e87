"""How each stage of the training went, from the rows that it wrote batch by batch."""

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from cluster.artifacts import Json
from pipelines.recipe.graph import OPTIONAL_STAGES
from pipelines.report.run_folder import RunFolder
from pipelines.training.metrics import MetricsRow, read_metrics

# The training steps, and the step that each gets its batches from.
STAGES = {stage: f"{stage}_mixture" for stage in OPTIONAL_STAGES} | {"training": "mixture"}
CURVES = ("loss", "learning_rate", "examples_per_s", "validation_loss", "validation_ndcg_at_10")


def collect_stage(run: RunFolder, step: str) -> dict[str, Json] | None:
    """Returns the figures of one of `STAGES`; None until its step is done.

    A curve is a list of ``[batch, value]``, empty where the training wrote no such value.
    ``first_loss`` and ``last_loss`` are means over a set's first and last tenth of batches,
    throughputs are medians, `batches` is the number planned and `done` the number trained on.
    """
    artifact = run.artifacts.get(step)
    if artifact is None:
        return None
    mixture, rows = run.metrics(STAGES[step]), read_metrics(artifact.storage)
    return {
        "batches": mixture.get("num_batches", len(rows)),
        "done": len(rows),
        **{name: _curve(rows, name) for name in CURVES},
        "median_examples_per_s": _median(rows, "examples_per_s"),
        "median_tokens_per_s": _median(rows, "tokens_per_s"),
        "sets": [_set(name, num, rows) for name, num in mixture.get("sets", {}).items()],
    }


def _set(name: str, num_examples: int, rows: Sequence[MetricsRow]) -> dict[str, Json]:
    loss = _curve([row for row in rows if row.get("dataset") == name], "loss")
    values = [value for _, value in loss]
    tenth = -(-len(values) // 10)
    return {
        "name": name,
        "examples": num_examples,
        "loss": loss,
        "first_loss": fmean(values[:tenth]) if values else None,
        "last_loss": fmean(values[-tenth:]) if values else None,
    }


def _curve(rows: Sequence[MetricsRow], key: str) -> list[list[Any]]:
    return [[row["batch"], row[key]] for row in rows if row.get(key) is not None]


def _median(rows: Sequence[MetricsRow], key: str) -> float | None:
    values = [value for _, value in _curve(rows, key)]
    return median(values) if values else None
