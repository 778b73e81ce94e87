import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.artifacts import (
    MANIFEST,
    Artifact,
    Manifest,
    list_files,
    open_artifact,
    write_rejects,
    write_shards,
)
from cluster.errors import ArtifactError
from cluster.storage import open_storage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished step's folder with one shard."""
    storage = open_storage(tmp_path / "step")
    write_shards(storage, pa.table({"id": ["a"]}), 10)
    manifest = Manifest(
        step="step", fingerprint="f", config={}, inputs={}, files=list_files(storage)
    )
    storage.write_bytes(MANIFEST, manifest.to_json())
    return tmp_path / "step"


def change(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads((folder / MANIFEST).read_text())
    change(fields)
    (folder / MANIFEST).write_text(json.dumps(fields))


@pytest.mark.parametrize(
    "path",
    [
        "../../../private.parquet",
        "/private.parquet",
        "shards/../../../private.parquet",
        "shards/private.parquet",
        "shards/00000.parquet/",
        "shards//00000.parquet",
        "shards/-1.parquet",
        "shards/\u0661.parquet",  # a digit, but none of ours
        "rejects/x/00000.parquet",
        "rejects/00000.parquet\n",
        "a\0b",
        "",
        7,
        None,
    ],
)
def test_manifest_that_names_a_file_elsewhere_is_refused(path: object, folder: Path) -> None:
    change(folder, lambda fields: fields["files"][0].update(path=path))
    with pytest.raises(ArtifactError, match=r"manifest\.json is not what this version") as error:
        open_artifact(str(folder))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_manifest_may_name_files_below_folders(folder: Path) -> None:
    entry = {"path": "validation/shards/x.parquet", "num_bytes": 1, "sha256": "", "num_rows": None}
    change(folder, lambda fields: fields["files"].append(entry))
    assert len(open_artifact(str(folder)).manifest.files) == 2


NOT_OURS: dict[str, bytes] = {
    "broken": b'{"step": ',
    "not UTF-8": b'{"step": "\xff"}',
    "a list": b"[]",
    "a number": b"7",
    "empty": b"",
    "deep": b"[" * 100_000,
    "deep and whole": b'{"a":' * 500 + b"1" + b"}" * 500,
    "a long number": b'{"seconds_s": ' + b"9" * 10_000 + b"}",
    "an unknown key": b'{"x": 1}',
    "long": b'{"' + b"x" * 100_000 + b'": 1}',
    "of a web page": b'{"name": "My app", "icons": []}',
}


@pytest.mark.parametrize("content", NOT_OURS.values(), ids=NOT_OURS)
def test_manifest_that_is_none_is_one_line(content: bytes, folder: Path) -> None:
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError, match="move its folder away, or run with --fresh") as error:
        open_artifact(str(folder))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
    "wrong",
    [
        {"files": "shards"},
        {"files": [7]},
        {"files": [{"path": "a", "num_bytes": -1, "sha256": ""}]},
        {"files": [{"path": "a", "num_bytes": 10**30, "sha256": ""}]},
        {"files": [{"path": "a", "num_bytes": 1, "sha256": "", "num_rows": 1.5}]},
        {"inputs": {"a": 1}},
        {"inputs": ["a"]},
        {"config": None},
        {"metrics": []},
        {"seconds_s": "soon"},
        {"seconds_s": float("nan")},
        {"versions": {"ray": None}},
        {"step": None},
        {"more": 1},
    ],
)
def test_manifest_with_a_wrong_type_is_one_line(wrong: dict[str, Any], folder: Path) -> None:
    change(folder, lambda fields: fields.update(wrong))
    with pytest.raises(ArtifactError, match=next(iter(wrong))) as error:
        open_artifact(str(folder))
    assert "\n" not in str(error.value)


def test_figure_that_is_no_number_becomes_null(folder: Path) -> None:
    metrics = {"loss": math.nan, "all": [1.0, math.inf], "name": "NaN"}
    manifest = Manifest(step="s", fingerprint="f", config={}, inputs={}, files=(), metrics=metrics)
    content = manifest.to_json()
    expected = {"loss": None, "all": [1.0, None], "name": "NaN"}
    assert json.loads(content, parse_constant=pytest.fail)["metrics"] == expected
    change(folder, lambda fields: fields.update(metrics=metrics))  # as an earlier version wrote it
    assert open_artifact(str(folder)).manifest.metrics == expected


@pytest.mark.parametrize("link", ["shards/00001.parquet", "shards/deep", "results.json", "more"])
def test_symbolic_link_in_a_steps_folder_is_refused(
    link: str, folder: Path, tmp_path: Path
) -> None:
    private = tmp_path / "private"
    private.mkdir()
    (folder / link).symlink_to(private)
    with pytest.raises(ArtifactError, match=rf"{link} is a symbolic link"):
        open_artifact(str(folder))


def test_rejects_take_any_string(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    given = ["\ud83d", "a\udc80b", "\0", "\u2028", "", "x" * 100_000, "😀", "\\ud83d"]
    write_rejects(storage, [(text, text, text) for text in given])
    manifest = Manifest(step="s", fingerprint="", config={}, inputs={}, files=list_files(storage))
    rejects = Artifact(storage, manifest).rejects()
    expected = ["\\ud83d", "a\\udc80b", *given[2:]]
    assert rejects.to_pydict() == {"id": expected, "reason": expected, "text": expected}
