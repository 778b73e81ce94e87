"""Runs of other versions: each is refused in one line, and nothing of it is touched or taken."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.artifacts import FORMAT, MANIFEST, Artifact, Manifest, open_artifact
from cluster.errors import ArtifactError, OtherFormat
from cluster.steps import BEGUN, Progress, Run, Step, StepContext


class Silent:
    def step_found(self, step: Step, artifact: Artifact) -> None: ...
    def step_done(self, step: Step, artifact: Artifact) -> None: ...
    def step_begins(self, step: Step, resumed: bool) -> Progress:
        assert not resumed
        return self

    def update(self, done: float, total: float | None = None, note: str = "") -> None: ...


def work(context: StepContext) -> dict[str, object]:
    context.storage.write_bytes("made", b"")
    return {}


def killed(context: StepContext) -> dict[str, object]:
    raise KeyboardInterrupt


def make(folder: Path, work: Callable[[StepContext], dict[str, object]] = work) -> Run:
    return Run(str(folder), [Step(name="one", config={}, inputs=(), work=work)])


def change(file: Path, **fields: Any) -> None:
    """Sets fields of a JSON file; those that are None are left out."""
    changed = json.loads(file.read_text()) | fields
    kept = {key: value for key, value in changed.items() if value is not None}
    file.write_text(json.dumps(kept))


FORMATS = pytest.mark.parametrize(
    ("given", "said"), [(None, "1"), (FORMAT + 1, str(FORMAT + 1)), ("x" * 99, "'xxxxx")]
)


@FORMATS
def test_finished_step_of_another_format_is_refused(given: Any, said: str, tmp_path: Path) -> None:
    make(tmp_path).execute(Silent())
    change(tmp_path / "one" / MANIFEST, format=given)
    told = (
        rf"one/manifest\.json is of format {said}.*, and this version of Tokay reads format"
        rf" {FORMAT}: make the run anew, in another folder or with --fresh; a model in its"
        r" export/model can still be used"
    )
    for ask in (
        lambda: open_artifact(str(tmp_path / "one")),
        lambda: make(tmp_path).state(make(tmp_path).steps[0]),
        lambda: make(tmp_path).execute(Silent()),
        lambda: make(tmp_path).execute(Silent(), rebuild=True),
    ):
        with pytest.raises(OtherFormat, match=told) as error:
            ask()
        assert error.value.exit_code == 2
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


@FORMATS
def test_unfinished_step_of_another_format_is_not_gone_on_with(
    given: Any, said: str, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, killed).execute(Silent())
    assert make(tmp_path).state(make(tmp_path).steps[0]) == "unfinished"
    change(tmp_path / "one" / BEGUN, format=given)
    with pytest.raises(OtherFormat, match=rf"one/work/begun\.json is of format {said}"):
        make(tmp_path).execute(Silent())


def test_steps_of_another_format_can_be_deleted_and_made_anew(tmp_path: Path) -> None:
    make(tmp_path).execute(Silent())
    change(tmp_path / "one" / MANIFEST, format=None)
    make(tmp_path).delete_steps()
    assert make(tmp_path).execute(Silent())["one"].manifest.format == FORMAT


def test_what_is_no_manifest_has_no_format(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not what this version of Tokay writes") as error:
        Manifest.from_json(b'{"format": 7}', "manifest.json")
    assert not isinstance(error.value, OtherFormat)
