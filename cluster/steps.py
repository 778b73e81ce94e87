"""Steps and the runner: a recipe is a graph of steps, and a finished step is never run again.

The runner knows nothing of embeddings. It compares fingerprints, clears what an earlier
configuration left, calls a step's work, and writes the manifest last.
"""

import contextlib
import fcntl
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from cluster.artifacts import (
    MANIFEST,
    Artifact,
    Json,
    Manifest,
    fingerprint,
    library_versions,
    list_files,
)
from cluster.errors import TooManyRejects, UserError
from cluster.storage import LocalStorage, Storage, join, open_storage

BEGUN = "work/begun.json"
State = Literal["done", "unfinished", "changed", "waiting"]


class Progress(Protocol):
    """Where a step says how far it is."""

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        """Reports `done` of `total` units and a short note, from the driver process."""


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """What a step's work may touch: its own folder, its finished inputs, the run's folder."""

    storage: Storage
    inputs: dict[str, Artifact]
    run: Storage
    progress: Progress

    def input(self, name: str) -> Artifact:
        """Returns the finished artifact of the step `name`."""
        return self.inputs[name]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One arrow of the data's way.

    Attributes:
        name: The step folder's name, unique in the recipe.
        config: Everything that changes the artifact's content, as JSON.
        inputs: Names of the steps it reads.
        work: Makes the artifact's files in `context.storage`; returns metrics for the manifest.
        max_reject_share: The step fails when a larger share of its rows is refused.
    """

    name: str
    config: dict[str, Json]
    inputs: tuple[str, ...]
    work: Callable[[StepContext], dict[str, Json]]
    max_reject_share: float = 1.0


class RunListener(Protocol):
    """Told of every step, so that a console can show it."""

    def step_found(self, step: Step, artifact: Artifact) -> None:
        """The step was finished by an earlier run."""

    def step_begins(self, step: Step, resumed: bool) -> Progress:
        """The step starts; `resumed` says that unfinished work of it was found."""

    def step_done(self, step: Step, artifact: Artifact) -> None:
        """The step's manifest is written."""


class Run:
    """A run folder and the steps that fill it."""

    def __init__(self, uri: str, steps: Sequence[Step]) -> None:
        self.storage = open_storage(uri)
        self.steps = tuple(steps)
        self._fingerprints: dict[str, str] = {}
        for step in self.steps:
            missing = [name for name in step.inputs if name not in self._fingerprints]
            if missing:
                raise ValueError(f"step {step.name!r} reads {missing}, which no earlier step makes")
            inputs = {name: self._fingerprints[name] for name in step.inputs}
            self._fingerprints[step.name] = fingerprint(
                {"step": step.name, "config": step.config, "inputs": inputs}
            )

    def step_storage(self, step: Step) -> Storage:
        """Returns the step's folder."""
        return open_storage(join(self.storage.uri, step.name))

    def fingerprint(self, step: Step) -> str:
        """Returns what identifies the step's artifact: its configuration and all before it."""
        return self._fingerprints[step.name]

    def artifact(self, step: Step) -> Artifact | None:
        """Returns the step's artifact if it is finished, whatever configuration made it."""
        return Artifact.open(self.step_storage(step))

    def state(self, step: Step) -> State:
        """Says whether the step is done, begun, made by another configuration, or still to do."""
        artifact = self.artifact(step)
        if artifact is not None:
            same = artifact.manifest.fingerprint == self.fingerprint(step)
            return "done" if same else "changed"
        begun = self._begun(step)
        if begun is None:
            return "waiting"
        return "unfinished" if begun["fingerprint"] == self.fingerprint(step) else "changed"

    def execute(
        self, listener: RunListener, *, until: str | None = None, rebuild: bool = False
    ) -> dict[str, Artifact]:
        """Runs every step that is not done, in order, and returns the artifacts.

        Args:
            listener: Told of every step.
            until: The last step to run; all by default.
            rebuild: Makes steps of another configuration anew instead of refusing.

        Raises:
            UserError: A step was made by another configuration, `until` is no step, or another
                process is at work in this folder.
            TooManyRejects: A step refused more rows than it may.
        """
        names = [step.name for step in self.steps]
        if until is not None and until not in names:
            raise UserError(f"--until {until!r} is no step: choose one of {', '.join(names)}")
        steps = self.steps[: names.index(until) + 1] if until else self.steps
        if not rebuild:
            self.check_configuration(steps)
        artifacts: dict[str, Artifact] = {}
        with self._alone():
            for step in steps:
                artifacts[step.name] = self._execute_step(step, artifacts, listener)
        return artifacts

    def check_configuration(self, steps: Sequence[Step]) -> None:
        """Raises UserError if a step's folder was made by another configuration."""
        for step in steps:
            if self.state(step) == "changed":
                raise UserError(
                    f"run {self.storage.uri} holds step {step.name!r} of another configuration"
                    f" ({self._difference(step)}): use --rebuild to make it and what follows anew,"
                    " or another --storage"
                )

    def _execute_step(
        self, step: Step, artifacts: dict[str, Artifact], listener: RunListener
    ) -> Artifact:
        state = self.state(step)
        storage = self.step_storage(step)
        if state == "done":
            found = self.artifact(step)
            assert found is not None
            listener.step_found(step, found)
            return found
        if state == "changed":
            storage.delete(MANIFEST)  # first, so that a half-deleted folder is not taken for whole
            storage.delete("")
        _delete_unfinished(storage)
        begun = {"fingerprint": self.fingerprint(step), "config": step.config}
        storage.write_bytes(BEGUN, json.dumps(begun, sort_keys=True).encode())
        progress = listener.step_begins(step, state == "unfinished")
        start = time.perf_counter()
        inputs = {name: artifacts[name] for name in step.inputs}
        metrics = step.work(
            StepContext(storage=storage, inputs=inputs, run=self.storage, progress=progress)
        )
        artifact = self._finish(step, storage, metrics, time.perf_counter() - start)
        listener.step_done(step, artifact)
        return artifact

    def _finish(
        self, step: Step, storage: Storage, metrics: dict[str, Json], seconds_s: float
    ) -> Artifact:
        manifest = Manifest(
            step=step.name,
            fingerprint=self.fingerprint(step),
            config=step.config,
            inputs={name: self._fingerprints[name] for name in step.inputs},
            files=list_files(storage),
            metrics=metrics,
            seconds_s=round(seconds_s, 3),
            versions=library_versions(),
        )
        artifact = Artifact(storage, manifest)
        num_all = artifact.num_rows + artifact.num_rejects
        if artifact.num_rejects > step.max_reject_share * num_all:
            rejects = artifact.rejects()
            raise TooManyRejects.of(
                step.name,
                Counter(rejects["reason"].to_pylist()),
                [tuple(row.values()) for row in rejects.slice(0, 3).to_pylist()],
                f"accepted is a share of {step.max_reject_share} of {num_all}: look at"
                f" {join(storage.uri, 'rejects')}, mend the input or raise max_reject_share",
            )
        storage.write_bytes(MANIFEST, manifest.to_json())
        storage.delete("work")
        return artifact

    def _begun(self, step: Step) -> dict[str, Any] | None:
        try:
            content = self.step_storage(step).read_bytes(BEGUN)
        except FileNotFoundError:
            return None
        begun: dict[str, Any] = json.loads(content)
        return begun

    def _difference(self, step: Step) -> str:
        artifact = self.artifact(step)
        begun = self._begun(step)
        old = artifact.manifest.config if artifact else (begun or {}).get("config", {})
        before, after = dict(_leaves(old)), dict(_leaves(step.config))
        changes = [
            f"{key}: {_short(before.get(key))} -> {_short(after.get(key))}"
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key)
        ]
        if not changes:
            return "an earlier step differs"
        return ", ".join(changes[:3]) + (f" and {len(changes) - 3} more" if changes[3:] else "")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps a second process out of a local run folder; the lock dies with its process."""
        if not isinstance(self.storage, LocalStorage):
            yield
            return
        self.storage.folder.mkdir(parents=True, exist_ok=True)
        with (self.storage.folder / "run.lock").open("a", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"another process is at work in {self.storage.uri}: wait for it, or stop it"
                ) from error
            yield


def _delete_unfinished(storage: Storage) -> None:
    """Removes temporary files that a killed process left."""
    if isinstance(storage, LocalStorage) and storage.folder.is_dir():
        for file in storage.folder.rglob("*.unfinished"):
            file.unlink(missing_ok=True)


def _leaves(value: Json, path: str = "") -> Iterator[tuple[str, Json]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _leaves(child, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _short(value: Json) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
