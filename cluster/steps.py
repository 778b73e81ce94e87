"""Steps and the runner: a recipe is a graph of steps, and a finished step is never run again.

The runner knows nothing of embeddings. It compares fingerprints, clears what an earlier
configuration left, calls a step's work, and writes the manifest last.
"""

import contextlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Literal, Protocol

from cluster.artifacts import (
    FORMAT,
    MANIFEST,
    Artifact,
    FileTotals,
    Json,
    Manifest,
    check_format,
    count_reasons,
    fingerprint,
    library_versions,
    list_files,
    parse_object,
    reject_tables,
    write_artifact,
)
from cluster.errors import DUPLICATES, ArtifactError, TooManyRejects, UserError, excerpt
from cluster.run_lock import LOCK, RunLock, run_lock
from cluster.shard_log import ShardLog
from cluster.storage import LocalStorage, Storage, join, open_storage

BEGUN = "work/begun.json"
MARKER = ".tokay"
_MARKER_TEXT = b"A run of Tokay: with --fresh or --rebuild it deletes its steps' folders in here.\n"
State = Literal["done", "unfinished", "changed", "waiting"]


class Progress(Protocol):
    """Where a step says how far it is."""

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        """Reports `done` of `total` units and a short note, from the driver process."""


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """What a step's work may touch: its own folder and its finished inputs.

    A step that tells `log` of one of its shards, or of one of its rejects, tells it of all.
    """

    storage: Storage
    inputs: dict[str, Artifact]
    progress: Progress

    @cached_property
    def log(self) -> ShardLog:
        """Where the step's shards are noted as their writers described them."""
        return ShardLog(self.storage)

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
        max_reject_share: The step fails when a larger share of its rows, duplicates left out, is
            refused.
    """

    name: str
    config: dict[str, Json]
    inputs: tuple[str, ...]
    work: Callable[[StepContext], dict[str, Json]]
    max_reject_share: float = 1.0


class RunListener(Protocol):
    """Hears of every step, so that a console can show it."""

    def step_found(self, step: Step, artifact: Artifact) -> None:
        """The step was finished by an earlier run."""

    def step_begins(self, step: Step, resumed: bool) -> Progress:
        """The step starts; `resumed` says that an earlier run began it."""

    def step_done(self, step: Step, artifact: Artifact) -> None:
        """The step's manifest is written."""


class Run:
    """A run folder and the steps that fill it.

    A folder is a run once it carries our marker, which only an empty folder gets. Within it a
    step's folder is ours once it has a manifest or the note that its work has begun. Nothing else
    is ever deleted.
    """

    def __init__(self, uri: str, steps: Sequence[Step]) -> None:
        self.storage = open_storage(uri)
        self.steps = tuple(steps)
        self._held = False
        self._lock = RunLock()
        self._fingerprints: dict[str, str] = {}
        for step in self.steps:
            if not re.fullmatch(r"[\w-]+", step.name):
                raise ValueError(f"step {step.name!r}: give it the name of a folder")
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
        begun = self._begun(step).get("fingerprint")
        if not begun:
            return "waiting"  # or half deleted
        return "unfinished" if begun == self.fingerprint(step) else "changed"

    def execute(
        self, listener: RunListener, *, until: str | None = None, rebuild: bool = False
    ) -> dict[str, Artifact]:
        """Runs every step that is not done, in order, and returns the artifacts.

        Args:
            listener: Hears of every step.
            until: The last step to run; all by default.
            rebuild: Makes steps of another configuration again instead of refusing them.

        Raises:
            UserError: A step was made by another configuration, `until` is no step, another
                process is at work in this folder, or files of somebody else are in the way.
            TooManyRejects: A step refused more rows than it may.
        """
        self.check_folder()
        steps = self.steps_until(until)
        if not rebuild:
            self.check_configuration(steps)
        artifacts: dict[str, Artifact] = {}
        with self.alone():
            for step in steps:
                self._refuse_foreign(step)
            for step in steps:
                artifacts[step.name] = self._execute_step(step, artifacts, listener)
        return artifacts

    def steps_until(self, until: str | None) -> tuple[Step, ...]:
        """Returns the steps up to the named one, or all; raises UserError for an unknown name."""
        names = [step.name for step in self.steps]
        if until is not None and until not in names:
            raise UserError(
                f"--until {excerpt(until)!r} is no step: choose one of {', '.join(names)}"
            )
        return self.steps[: names.index(until) + 1] if until else self.steps

    def check_configuration(self, steps: Sequence[Step]) -> None:
        """Raises UserError if a step's folder was made by another configuration."""
        for step in steps:
            if self.state(step) == "changed":
                raise UserError(
                    f"run {self.storage.uri} holds step {step.name!r} of another configuration"
                    f" ({self._difference(step)}): use --rebuild to make it and what follows anew,"
                    " or another --storage"
                )

    def check_folder(self) -> None:
        """Raises UserError if the folder holds files but is not a run; touches nothing."""
        if (
            self.storage.exists(MARKER)
            or any(map(self._is_ours, self.steps))  # a run from before there were markers
            or all(name == LOCK for name in self.storage.entries())
        ):
            return
        raise UserError(
            f"{self.storage.uri} is no run of Tokay, and holds files, which stay as they are: give"
            " a new or an empty folder as --storage"
        )

    def delete_steps(self) -> None:
        """Deletes the folders of all steps, once all of them are known to be ours.

        Raises:
            UserError: Another process is at work in this folder, it is not a run, or a step's
                folder holds files that no step has made; nothing was deleted.
        """
        with self.alone():
            for step in self.steps:
                self._refuse_foreign(step)
            for step in self.steps:
                self._delete(step)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Makes the folder a run and keeps a second process out.

        The lock may be taken again by what runs within the block.

        Raises:
            UserError: Another process is at work in this folder, or it holds files and is no run.
        """
        if self._held:
            yield
            return
        self.check_folder()
        with run_lock(self.storage) as self._lock:
            if not self.storage.exists(MARKER):
                self.storage.write_bytes(MARKER, _MARKER_TEXT)
            self._held = True
            try:
                yield
            finally:
                self._held = False

    def _is_ours(self, step: Step) -> bool:
        """Says whether a step of this name, of whatever configuration or version, made a folder."""
        if self._note(step, MANIFEST).get("step") == step.name:
            return True
        return {"fingerprint", "config"} <= self._note(step, BEGUN).keys()

    def _note(self, step: Step, path: str) -> dict[str, Json]:
        try:
            return parse_object(self.step_storage(step).read_bytes(path), path)
        except (FileNotFoundError, ArtifactError):
            return {}

    def _refuse_foreign(self, step: Step) -> None:
        """Raises UserError if a step's folder holds files, and no step of that name made them."""
        storage = self.step_storage(step)
        if isinstance(storage, LocalStorage) and storage.folder.is_symlink():
            what = "is a symbolic link"
        elif self._is_ours(step) or not any(storage.entries()):
            return
        else:
            what = f"holds files that no step {step.name!r} made"
        raise UserError(
            f"{storage.uri} {what}; nothing was touched: move it away, or give another --storage"
        )

    def _delete(self, step: Step) -> None:
        """Deletes a step's folder; a half-deleted one is recognised as ours, and as no result."""
        storage = self.step_storage(step)
        if not any(storage.entries()):
            return
        storage.write_bytes(BEGUN, _begun_note("", {}))
        for path in [MANIFEST, *storage.list()]:
            if path != BEGUN:
                storage.delete(path)
        storage.delete("")

    def _execute_step(
        self, step: Step, artifacts: dict[str, Artifact], listener: RunListener
    ) -> Artifact:
        state = self.state(step)
        storage = self.step_storage(step)
        if state == "done":
            finished = self.artifact(step)
            assert finished is not None
            storage.delete("work")  # of which a process that was killed at the very end left some
            listener.step_found(step, finished)
            return finished
        self._lock.check()
        if state in ("changed", "waiting"):
            self._delete(step)
        _delete_unfinished(storage)
        storage.write_bytes(BEGUN, _begun_note(self.fingerprint(step), step.config))
        progress = listener.step_begins(step, state == "unfinished")
        start = time.perf_counter()
        inputs = {name: artifacts[name] for name in step.inputs}
        context = StepContext(storage=storage, inputs=inputs, progress=progress)
        try:
            metrics = step.work(context)
        finally:
            context.log.flush()
        artifact = self._finish(step, context, metrics, time.perf_counter() - start)
        listener.step_done(step, artifact)
        return artifact

    def _finish(
        self, step: Step, context: StepContext, metrics: dict[str, Json], seconds_s: float
    ) -> Artifact:
        storage = context.storage
        _delete_unfinished(storage)
        files = list_files(storage, context.log.files())
        manifest = Manifest(
            step=step.name,
            fingerprint=self.fingerprint(step),
            config=step.config,
            inputs={name: self._fingerprints[name] for name in step.inputs},
            files=FileTotals.of(files),
            metrics=metrics,
            seconds_s=round(seconds_s, 3),
            versions=library_versions(),
        )
        found = Artifact(storage, manifest)
        num_all = found.num_rows + found.num_rejects
        if found.num_rejects > step.max_reject_share * num_all:
            tables = reject_tables(storage, files)
            rows = (tuple(row.values()) for table in tables for row in table.to_pylist())
            reasons = count_reasons(storage, files)
            raise TooManyRejects.of(
                step.name,
                Counter({r: num for r, num in reasons.items() if r not in DUPLICATES}),
                list(islice((row for row in rows if row[1] not in DUPLICATES), 3)),
                f"accepted is a share of {step.max_reject_share} of {num_all}: look at"
                f" {join(storage.uri, 'rejects')}, correct the input or raise max_reject_share",
            )
        self._lock.check()
        artifact = write_artifact(storage, manifest, files)
        storage.delete("work")
        return artifact

    def _begun(self, step: Step) -> dict[str, Json]:
        storage = self.step_storage(step)
        place = join(storage.uri, BEGUN)
        try:
            fields = parse_object(storage.read_bytes(BEGUN), place)
        except FileNotFoundError:
            return {}
        check_format(fields, place)
        return fields

    def _difference(self, step: Step) -> str:
        artifact = self.artifact(step)
        old = artifact.manifest.config if artifact else self._begun(step).get("config", {})
        before, after = dict(_leaves(old)), dict(_leaves(step.config))
        changes = [
            f"{excerpt(key, 60)}: {_short(before.get(key))} -> {_short(after.get(key))}"
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key)
        ]
        if not changes:
            return "an earlier step differs"
        return ", ".join(changes[:3]) + (f" and {len(changes) - 3} more" if changes[3:] else "")


def _begun_note(fingerprint: str, config: Json) -> bytes:
    note = {"format": FORMAT, "fingerprint": fingerprint, "config": config}
    return json.dumps(note, sort_keys=True).encode()


def _delete_unfinished(storage: Storage) -> None:
    """Removes temporary files that killed processes left, such as those of a lost node."""
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
    return excerpt(json.dumps(value), 60)
