"""A run folder as the report finds it: finished or not, on a disk or on S3.

The report trusts manifests alone. It needs neither a recipe that still validates nor a model, so
that last year's run, or one that died half-way, can still be read.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.artifacts import Artifact, Json
from cluster.errors import ArtifactError, UserError, excerpt
from cluster.steps import BEGUN, MARKER, State
from cluster.storage import Storage, join, open_storage
from pipelines.fret.fusion import steps_unasked
from pipelines.recipe.graph import OPTIONAL_STAGES, TITLES
from pipelines.recipe.read import read_saved_keys, refuse_other_version

RECIPE = "recipe.yaml"
EXCERPT_CHARACTERS = 700


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """What a run has left behind.

    Attributes:
        storage: The run's folder.
        recipe_text: The recipe it was last run with; empty where none was kept.
        recipe: The same, parsed but not validated.
        artifacts: Step name -> artifact, of the finished steps in their order.
    """

    storage: Storage
    recipe_text: str
    recipe: dict[str, Any]
    artifacts: dict[str, Artifact]

    @property
    def name(self) -> str:
        """The recipe's name, or the folder's."""
        return str(self.recipe.get("name") or self.storage.uri.rstrip("/").rpartition("/")[2])

    @property
    def steps(self) -> list[str]:
        """The run's steps in their order, without those that the recipe does not use."""
        optional = set() if self.recipe.get("evaluation", True) else {"evaluation"}
        for stage in OPTIONAL_STAGES:
            if not self.recipe.get(stage):
                optional |= {f"{stage}_mixture", stage}
        optional |= {
            key for key in ("corpus_queries", "linear_adapter", "gate") if not self.recipe.get(key)
        }
        fusion = _value(self.recipe, "fret", "fusion")
        if fusion != "auto":
            optional.add("probe")
        # The paper's judges are the default.
        optional |= steps_unasked(fusion if isinstance(fusion, str) else "ql+rc")
        if _value(self.recipe, "probe", "sample"):  # it ends with the probe
            names = list(TITLES)
            optional = set(names[names.index("probe") + 1 :])
        return [name for name in TITLES if name in self.artifacts or name not in optional]

    @property
    def unfinished(self) -> list[str]:
        """Steps without a manifest."""
        return [name for name in self.steps if name not in self.artifacts]

    def metrics(self, step: str) -> dict[str, Json]:
        """Returns the metrics of a step's manifest; empty until it is finished."""
        return self.artifacts[step].manifest.metrics if step in self.artifacts else {}

    def state(self, step: str) -> State:
        """Says whether a step is done, begun, waiting, or made from inputs that have changed."""
        if step in self.artifacts:
            return "changed" if step in self.outdated else "done"
        return "unfinished" if self.storage.exists(f"{step}/{BEGUN}") else "waiting"

    @property
    def outdated(self) -> list[str]:
        """Finished steps whose inputs have been rebuilt since, or are themselves outdated."""
        outdated: list[str] = []
        for name, artifact in self.artifacts.items():
            for step, fingerprint in artifact.manifest.inputs.items():
                source = self.artifacts.get(step)
                if source is None or source.manifest.fingerprint != fingerprint or step in outdated:
                    outdated.append(name)
                    break
        return outdated


def _value(recipe: dict[str, Any], part: str, key: str) -> Any:
    """Reads a key of an unvalidated recipe."""
    keys = recipe.get(part)
    return keys.get(key) if isinstance(keys, dict) else None


def open_run_folder(uri: str) -> RunFolder:
    """Opens a run by its manifests.

    Raises:
        UserError: The folder is not a run, or cannot be read; or its recipe is of another version,
            and no step is finished.
    """
    storage = open_storage(uri)
    content = storage.read_bytes(RECIPE) if storage.exists(RECIPE) else b""
    place = join(storage.uri, RECIPE)
    recipe = read_saved_keys(content, place)
    opened = {name: Artifact.open(open_storage(join(storage.uri, name))) for name in TITLES}
    artifacts = {name: artifact for name, artifact in opened.items() if artifact is not None}
    if not artifacts:
        refuse_other_version(recipe, place)
    if not artifacts and not (content and storage.exists(MARKER)):
        raise UserError(
            f"{uri} is no run of Tokay (no finished step, and not both {RECIPE} and {MARKER}): give"
            " the folder that `tokay run` or `tokay demo` wrote to"
        )
    return RunFolder(
        storage=storage, recipe_text=content.decode(), recipe=recipe, artifacts=artifacts
    )


@contextmanager
def files_of_a_run(uri: str) -> Iterator[None]:
    """Turns errors over files of an unexpected form into one line, as a run may be anybody's.

    Raises:
        ArtifactError: The files are not of the form that this version writes.
    """
    try:
        yield
    except (
        *(ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
        *(FileNotFoundError, RecursionError, pa.ArrowException),
    ) as error:
        raise ArtifactError(
            f"run {excerpt(uri)} holds files of a form that this version of Tokay does not write"
            f" ({type(error).__name__}: {excerpt(error)}): run `tokay run` on it again"
        ) from error


def find_passages(passages: Artifact | None, ids: Iterable[str]) -> dict[str, dict[str, str]]:
    """Returns id, title and beginning of those of the named passages that the corpus holds."""
    return _find(passages, "id", ids)


def find_documents(passages: Artifact | None, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Returns the first passage of each named document, by the document's name."""
    by_source = _find(passages, "source", [f"{name}#1" for name in names])
    return {source.removesuffix("#1"): passage for source, passage in by_source.items()}


def _find(passages: Artifact | None, key: str, wanted: Iterable[str]) -> dict[str, dict[str, str]]:
    """Streams the shards, so that a large corpus is never held whole."""
    values = pa.array(sorted(set(wanted)), pa.string())
    by_key: dict[str, dict[str, str]] = {}
    if passages is None or not len(values):
        return by_key
    for table in passages.tables(sorted({"id", "title", "text", key})):
        for row in table.filter(pc.is_in(table[key], values)).to_pylist():
            by_key[row[key]] = {
                "id": row["id"],
                "title": row["title"],
                "text": excerpt(row["text"], EXCERPT_CHARACTERS),
            }
    return by_key
