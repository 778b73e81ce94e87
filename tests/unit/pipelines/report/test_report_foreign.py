"""A run of somebody else may hold anything where this version writes something."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ArtifactError
from pipelines.report.inspection import inspect_run
from pipelines.report.write import write_report


def in_metrics(step: str, value: object) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        manifest = run / step / "manifest.json"
        fields = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**fields, "metrics": value}))

    return change


def in_results(content: str) -> Callable[[Path], None]:
    return lambda run: (run / "evaluation" / "results.json").write_text(content) and None


CHANGES: dict[str, Callable[[Path], None]] = {
    "no metrics": in_metrics("fret", {"num_kept": "many"}),
    "metrics of other types": in_metrics("fret", {"num_scored": "7", "dropped_by": []}),
    "broken results": in_results("{"),
    "a list of results": in_results("[]"),
    "other results": in_results('{"differences": [{}], "results": 7}'),
    "deep results": in_results("[" * 100_000),
    "no results": lambda run: (run / "evaluation" / "results.json").unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_report_of_a_run_with_odd_files_is_one_line(
    change: Callable[[Path], None], finished_run: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    change(run)
    with pytest.raises(ArtifactError, match="of a form that this version of Tokay does") as error:
        write_report(str(run))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_report_and_inspection_follow_no_symbolic_link(finished_run: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    results: Any = run / "evaluation" / "results.json"
    results.rename(tmp_path / "private.json")
    results.symlink_to(tmp_path / "private.json")
    with pytest.raises(ArtifactError, match=r"results\.json is a symbolic link"):
        write_report(str(run))
    with pytest.raises(ArtifactError, match=r"results\.json is a symbolic link"):
        inspect_run(str(run), task=None, dropped_by=None, order="stored", num_examples=1)
