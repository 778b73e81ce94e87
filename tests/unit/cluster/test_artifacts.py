import json
import math
import pickle
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.artifacts import (
    FILE_LIST,
    MANIFEST,
    Artifact,
    FileEntry,
    FileTotals,
    Joined,
    Manifest,
    fingerprint,
    library_versions,
    list_files,
    open_artifact,
    parse_object,
    unfinished_artifact,
    write_artifact,
    write_rejects,
    write_shards,
)
from cluster.errors import ArtifactError
from cluster.file_list import FileList, shard_path
from cluster.storage import open_storage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished step's folder with one shard."""
    storage = open_storage(tmp_path / "step")
    write_shards(storage, pa.table({"id": ["a"]}), 10)
    manifest = Manifest(step="step", fingerprint="f", config={}, inputs={})
    write_artifact(storage, manifest, list_files(storage))
    return tmp_path / "step"


def change(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads((folder / MANIFEST).read_text())
    change(fields)
    (folder / MANIFEST).write_text(json.dumps(fields))


def test_manifest_may_name_files_below_folders(folder: Path) -> None:
    entry = FileEntry(path="validation/shards/x.parquet", num_bytes=1, sha256="0" * 64)
    artifact = open_artifact(str(folder))
    write_artifact(artifact.storage, artifact.manifest, artifact.files.plus([entry]))
    assert len(open_artifact(str(folder)).files) == 2


def test_list_of_files_is_the_one_that_the_manifest_vouches_for(folder: Path) -> None:
    artifact = open_artifact(str(folder))
    other = FileEntry(path="shards/000000001.parquet", num_bytes=1, sha256="0" * 64, num_rows=1)
    (folder / FILE_LIST).write_bytes(artifact.files.plus([other]).to_parquet())
    with pytest.raises(ArtifactError, match=r"files\.parquet does not match its checksum"):
        len(open_artifact(str(folder)).shards)
    (folder / FILE_LIST).write_bytes(b"PAR1" * 5)
    with pytest.raises(ArtifactError, match=r"files\.parquet is not what this version") as error:
        len(open_artifact(str(folder)).shards)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    (folder / FILE_LIST).unlink()
    with pytest.raises(ArtifactError, match=r"files\.parquet is missing"):
        len(open_artifact(str(folder)).shards)


def test_artifact_travels_without_the_list_of_its_files(folder: Path) -> None:
    artifact = open_artifact(str(folder))
    before = len(pickle.dumps(artifact))
    assert len(artifact.shards) == 1
    assert len(pickle.dumps(artifact)) == before
    assert pickle.loads(pickle.dumps(artifact)).shards == artifact.shards


def test_joined_artifacts_are_read_as_one_and_each_shard_where_it_lies(tmp_path: Path) -> None:
    parts = []
    for name, ids in (("few", ["a", "b", "c"]), ("none", []), ("more", ["d", "e"])):
        storage = open_storage(tmp_path / name)
        files = write_shards(storage, pa.table({"id": pa.array(ids, pa.string()), "x": ids}), 2)
        manifest = Manifest(step=name, fingerprint="", config={}, inputs={})
        parts.append(write_artifact(storage, manifest, FileList.of(files)))
    whole = pickle.loads(pickle.dumps(Joined.of(*parts)))  # as Ray hands it to its actors
    assert [shard.path for shard in whole.shards] == [shard_path(number) for number in range(4)]
    assert (whole.num_rows, whole.num_shards) == (5, 4)
    assert [whole.shard(s)["id"].to_pylist() for s in whole.shards] == [
        ["a", "b"],
        ["c"],
        [],
        ["d", "e"],
    ]
    assert whole.shard(whole.shards[3], ["x"]).column_names == ["x"]
    assert whole.read(["id"])["id"].to_pylist() == list("abcde")
    (tmp_path / "more" / shard_path(0)).unlink()
    with pytest.raises(ArtifactError, match=r"more: shards/000000000\.parquet is missing"):
        whole.shard(whole.shards[3])


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
        {"files": {"num_rows": -1}},
        {"files": {"num_rows": 10**30}},
        {"files": {"num_bytes": 1.5}},
        {"files": {"more": 1}},
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
    manifest = Manifest(step="s", fingerprint="f", config={}, inputs={}, metrics=metrics)
    content = manifest.to_json()
    expected = {"loss": None, "all": [1.0, None], "name": "NaN"}
    assert json.loads(content, parse_constant=pytest.fail)["metrics"] == expected
    change(folder, lambda fields: fields.update(metrics=metrics))  # as an earlier version wrote it
    assert open_artifact(str(folder)).manifest.metrics == expected


@pytest.mark.parametrize(
    "link", ["shards/000000001.parquet", "shards/deep", "results.json", "more"]
)
def test_symbolic_link_in_a_steps_folder_is_refused(
    link: str, folder: Path, tmp_path: Path
) -> None:
    private = tmp_path / "private"
    private.mkdir()
    (folder / link).symlink_to(private)
    with pytest.raises(ArtifactError, match=rf"{link} is a symbolic link"):
        open_artifact(str(folder))


def test_folder_without_a_manifest_is_no_artifact(folder: Path) -> None:
    assert Artifact.open(open_storage(folder)) is not None
    (folder / MANIFEST).unlink()
    assert Artifact.open(open_storage(folder)) is None
    with pytest.raises(ArtifactError, match=r"step holds no finished artifact"):
        open_artifact(str(folder))


def finished(folder: Path, **fields: Any) -> Artifact:
    storage = open_storage(folder)
    settings = {"step": "s", "fingerprint": "f", "config": {}, "inputs": {}}
    write_artifact(storage, Manifest(**{**settings, **fields}), list_files(storage))
    return open_artifact(str(folder))


def test_shards_hold_the_rows_in_their_order(tmp_path: Path) -> None:
    table = pa.table({"id": [str(n) for n in range(7)], "more": range(7)})
    write_shards(open_storage(tmp_path), table, 3)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "note").touch()
    artifact = finished(tmp_path)
    paths = [f"shards/{number:09d}.parquet" for number in range(3)]
    assert [entry.path for entry in artifact.files] == paths
    assert [entry.num_rows for entry in artifact.shards] == [3, 3, 1]
    assert (artifact.num_rows, artifact.num_rejects, artifact.num_duplicates) == (7, 0, 0)
    assert artifact.read().equals(table)
    assert artifact.read(["more"]).column_names == ["more"]
    assert [part["more"].to_pylist() for part in artifact.tables(["more"])] == [
        [0, 1, 2],
        [3, 4, 5],
        [6],
    ]


def test_empty_table_keeps_its_columns_in_one_shard(tmp_path: Path) -> None:
    table = pa.table({"id": pa.array([], pa.string())})
    write_shards(open_storage(tmp_path), table, 3)
    artifact = finished(tmp_path)
    assert ([entry.num_rows for entry in artifact.shards], artifact.read()) == ([0], table)
    write_shards(open_storage(tmp_path), pa.table({"id": ["a"]}), 1)
    assert [entry.num_rows for entry in finished(tmp_path).shards] == [1]


def test_artifact_without_shards_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"abc")
    artifact = finished(tmp_path)
    assert [(f.path, f.num_bytes, f.num_rows) for f in artifact.files] == [("model.bin", 3, None)]
    with pytest.raises(ArtifactError, match="holds no shards"):
        artifact.read()


def test_duplicates_are_counted_apart_from_other_rejects(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    write_shards(storage, pa.table({"id": ["a"]}), 10)
    write_rejects(storage, [("b", "empty", ""), ("c", "duplicate", "x")])
    write_rejects(storage, [("d", "empty", "")], number=1)
    write_rejects(storage, [], number=2)
    artifact = finished(tmp_path, metrics={"num_duplicates": 1})
    assert (artifact.num_rows, artifact.num_rejects, artifact.num_duplicates) == (1, 2, 1)
    assert artifact.rejects().to_pylist() == [
        {"id": "b", "reason": "empty", "text": ""},
        {"id": "c", "reason": "duplicate", "text": "x"},
        {"id": "d", "reason": "empty", "text": ""},
    ]
    assert finished(tmp_path, metrics={"num_duplicates": "1"}).num_rejects == 3  # not of ours


def test_file_that_is_missing_short_or_changed_is_named(folder: Path) -> None:
    artifact = open_artifact(str(folder))
    artifact.verify()
    shard = folder / "shards/000000000.parquet"
    write_shards(open_storage(folder), pa.table({"id": ["a", "b"]}), 10)
    with pytest.raises(ArtifactError, match=r"shards/000000000\.parquet has 2 rows, not 1"):
        artifact.read()
    with pytest.raises(ArtifactError, match=r"000000000\.parquet does not match its checksum"):
        artifact.verify()
    shard.unlink()
    for call in (artifact.read, artifact.verify):
        with pytest.raises(ArtifactError, match=r"shards/000000000\.parquet is missing"):
            call()


def test_manifest_comes_back_as_it_was_written() -> None:
    manifest = Manifest(
        step="s",
        fingerprint="f",
        config={"a": [1, {"b": None}]},
        inputs={"x": "1"},
        files=FileTotals(num_shards=1, num_rows=2, num_rejects=3, num_bytes=4, sha256="a"),
        metrics={"loss": 0.5},
        seconds_s=1.5,
        versions={"ray": "2"},
    )
    content = manifest.to_json()
    assert Manifest.from_json(content, "") == manifest
    assert content.startswith(b'{\n "config"')  # for people, and the same in every run
    with pytest.raises(ArtifactError, match=r"manifest\.json is not what"):
        Manifest.from_json(b'{"a":' * 100 + b"{}" + b"}" * 100, "manifest.json")


def test_depth_of_json_is_bounded_at_a_hundred() -> None:
    for opened, closed in ((b"[", b"]"), (b'{"a":', b"}")):
        assert parse_object(b'{"a":' + opened * 98 + b"{}" + closed * 98 + b"}", "")
        with pytest.raises(ArtifactError, match="nested more than 100 deep"):
            parse_object(b'{"a":' + opened * 100 + b"1" + closed * 100 + b"}", "")


def test_fingerprint_is_that_of_every_run_and_changes_with_any_part() -> None:
    value = {"step": "s", "config": {"b": [1, 2.5, None, True], "a": "\u00e9"}}
    assert fingerprint(value) == fingerprint(dict(reversed(value.items()))) == "95758803cca0333e"
    others = ({**value, "step": "t"}, {**value, "config": {"b": [1, 2.5, None, False], "a": "é"}})
    assert len({fingerprint(other) for other in (value, *others)}) == 3


def test_manifest_names_the_libraries_that_change_a_number() -> None:
    needed = {"tokay", "ray", "torch", "transformers", "sentence-transformers", "mteb", "numpy"}
    found = library_versions()
    assert needed | {"pyarrow", "icu4py"} <= found.keys()
    assert all(found[name] == version(name) for name in found)


def test_rejects_take_any_string(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    given = ["\ud83d", "a\udc80b", "\0", "\u2028", "", "x" * 100_000, "😀", "\\ud83d"]
    write_rejects(storage, [(text, text, text) for text in given])
    rejects = unfinished_artifact(storage, list_files(storage)).rejects()
    expected = ["\\ud83d", "a\\udc80b", *given[2:]]
    assert rejects.to_pydict() == {"id": expected, "reason": expected, "text": expected}
