"""mteb's benchmarks by name, with Gecko's prompts, for figures to set beside the leaderboard."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.errors import UserError
from pipelines.evaluation.mteb_model import MtebEncoder, TextEncoder, quiet_mteb


@dataclass(frozen=True, kw_only=True)
class MtebResult:
    """One model on one mteb task.

    Attributes:
        model: Name of the model.
        dataset: mteb's name of the task.
        task_type: mteb's type of the task, such as ``STS``.
        metric: mteb's main score of the task, such as ``ndcg_at_10``.
        score: The main score, mean over the task's splits and languages.
        duration_s: Of encoding and scoring, loading of the data left out.
    """

    model: str
    dataset: str
    task_type: str
    metric: str
    score: float
    duration_s: float

    def to_json(self) -> dict[str, Any]:
        """Returns plain strings and numbers."""
        return asdict(self)


def evaluate_mteb(
    encoder: TextEncoder,
    names: Sequence[str],
    *,
    model: str = "model",
    on_progress: Callable[[int], None] | None = None,
) -> list[MtebResult]:
    """Runs mteb tasks, whose data comes from the hub or its local cache.

    Args:
        encoder: The model.
        names: mteb's names; all are looked up before the first is run.
        model: Name of the model.
        on_progress: Called with the number of texts just encoded.

    Raises:
        UserError: A name is unknown or no text task, or its data cannot be fetched.
    """
    with quiet_mteb():
        tasks = find_mteb_tasks(names)
        return [_run(encoder, task, model, on_progress) for task in tasks]


def find_mteb_tasks(names: Sequence[str]) -> list[Any]:
    """Returns mteb's tasks of these names; call inside ``quiet_mteb``.

    Raises:
        UserError: A name is unknown, with the names like it, or the task is not about text.
    """
    import mteb
    from mteb.get_tasks import _TASKS_REGISTRY

    by_lower = {name.lower(): name for name in _TASKS_REGISTRY}
    tasks = []
    for name in names:
        if name not in _TASKS_REGISTRY:
            close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
            meant = " or ".join(by_lower[match] for match in close)
            raise UserError(
                f"mteb {mteb.__version__} has no task {name!r}"
                + (f"; did you mean {meant}?" if meant else "; see mteb's list of tasks")
            )
        task = mteb.get_task(name)
        if set(task.metadata.modalities) != {"text"}:
            raise UserError(
                f"mteb task {name!r} is about {', '.join(task.metadata.modalities)}; "
                "an encoder of texts can be measured on text tasks only"
            )
        tasks.append(task)
    return tasks


def _run(
    encoder: TextEncoder, task: Any, model: str, on_progress: Callable[[int], None] | None
) -> MtebResult:
    import mteb

    for part in getattr(task, "tasks", [task]):  # several where mteb aggregates
        try:
            part.load_data()
        except OSError as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"data of mteb task {part.metadata.name!r} cannot be fetched ({reason}): check the "
                "network and HF_ENDPOINT, or measure on a local folder with --beir"
            ) from error
    wrapped = MtebEncoder(encoder, name=model, on_progress=on_progress)
    started = time.perf_counter()
    outcome = mteb.evaluate(
        wrapped, task, cache=None, co2_tracker=False, show_progress_bar=False
    ).task_results[0]
    return MtebResult(
        model=model,
        dataset=task.metadata.name,
        task_type=task.metadata.type,
        metric=task.metadata.main_score,
        score=float(outcome.get_score()),
        duration_s=time.perf_counter() - started,
    )
