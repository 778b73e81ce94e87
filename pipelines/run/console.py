"""What the user sees while a run is under way: one line per step, live on a terminal."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from cluster.artifacts import Artifact
from cluster.plain_json import dump_json
from cluster.steps import Step
from pipelines.recipe.graph import TITLES

SECONDS_BETWEEN_LINES = 10.0


class RunConsole:
    """Shows steps as they are found, begin, progress and end; a `cluster.steps.RunListener`."""

    def __init__(self, console: Console) -> None:
        """Writes to `console`: live bars on a terminal, else a line now and then."""
        self.console = console
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}", markup=False),
            TextColumn("{task.fields[clock]}", markup=False),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=console,
            transient=True,
        )

    def __enter__(self) -> "RunConsole":
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.progress.stop()

    def step_found(self, step: Step, artifact: Artifact) -> None:
        """Says that the step was finished before."""
        self._line(step, artifact, "done before")

    def step_begins(self, step: Step, resumed: bool) -> "StepConsole":
        """Starts the step's line."""
        return StepConsole(self, step, resumed)

    def step_done(self, step: Step, artifact: Artifact) -> None:
        """Ends the step's line."""
        for task in self.progress.task_ids:
            self.progress.remove_task(task)
        self._line(step, artifact, f"{artifact.manifest.seconds_s:.1f} s")

    def _line(self, step: Step, artifact: Artifact, time_text: str) -> None:
        text = f" {step.name:<11} {TITLES.get(step.name, ''):<38} {_summary(artifact):<34} "
        line = Text.assemble(("✓", "green"), text, (time_text, "dim"))
        self.console.print(line, soft_wrap=True)


class StepConsole:
    """One running step; a `cluster.steps.Progress`."""

    def __init__(self, run: RunConsole, step: Step, resumed: bool) -> None:
        """Adds the step's bar."""
        self._run, self._step = run, step
        self._begin = self._last = time.monotonic()
        note = "going on where it stopped" if resumed else ""
        title = f"{step.name:<11} {TITLES.get(step.name, '')}"
        self._task = run.progress.add_task(title, total=None, count="", clock="", note=note)
        if resumed and not run.console.is_terminal:
            run.console.print(Text(f"… {step.name}: {note}"))

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        """Moves the bar, or prints a line every ten seconds where there is no terminal."""
        now = time.monotonic()
        count = f"{done:,.0f}" + (f"/{total:,.0f}" if total else "")
        clock = f"{now - self._begin:.0f} s"
        self._run.progress.update(
            self._task, completed=done, total=total, count=count, clock=clock, note=note
        )
        if not self._run.console.is_terminal and now - self._last > SECONDS_BETWEEN_LINES:
            self._last = now
            line = f"… {self._step.name}: {count} after {clock} {note}".rstrip()
            self._run.console.print(Text(line), soft_wrap=True)


class JsonLines:
    """The same for a program: one JSON object per line; a `cluster.steps.RunListener`."""

    def step_found(self, step: Step, artifact: Artifact) -> None:
        """Prints that the step was finished before."""
        _print({"event": "step_found", "step": step.name, "num_rows": artifact.num_rows})

    def step_begins(self, step: Step, resumed: bool) -> "JsonLines":
        """Prints that the step begins."""
        _print({"event": "step_begins", "step": step.name, "resumed": resumed})
        return self

    def step_done(self, step: Step, artifact: Artifact) -> None:
        """Prints that the step is finished."""
        _print(
            {
                "event": "step_done",
                "step": step.name,
                "num_rows": artifact.num_rows,
                "num_rejects": artifact.num_rejects,
                "num_duplicates": artifact.num_duplicates,
                "seconds_s": artifact.manifest.seconds_s,
            }
        )

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        """Leaves out progress."""


def _print(row: dict[str, Any]) -> None:
    print(dump_json(row), flush=True)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _summary(artifact: Artifact) -> str:
    metrics = artifact.manifest.metrics
    parts = []
    if artifact.num_shards:
        parts.append(_counted(artifact.num_rows, "row"))
    if "num_kept" in metrics:
        parts.append(f"{metrics['num_kept']:,} kept")
    if artifact.num_rejects:
        parts.append(_counted(artifact.num_rejects, "reject"))
    if artifact.num_duplicates:
        parts.append(_counted(artifact.num_duplicates, "duplicate"))
    if artifact.manifest.step == "probe":
        skipped = "" if metrics["fusion"] else ", it does not relabel"
        parts = [f"{metrics['num_judged']:,} queries: {metrics['verdict']}{skipped}"]
    if metrics.get("final_loss") is not None:
        parts.append(f"loss {metrics['final_loss']:.3f}")
    if "exported" in metrics:
        parts.append(f"exports {metrics['exported']}")
    if "parity_cosine" in metrics:
        parts.append(f"parity {metrics['parity_cosine']:.5f}")
    return ", ".join(parts)
