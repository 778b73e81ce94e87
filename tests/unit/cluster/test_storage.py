import os
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.errors import StorageError
from cluster.storage import LocalStorage, open_storage, read_table, write_table


@pytest.fixture(params=["local", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "run")
    return request.getfixturevalue("bucket") + "/some/run"


def test_storage_gives_back_what_was_written(uri: str, tmp_path: Path) -> None:
    storage = open_storage(uri)
    storage.write_bytes("a/b.bin", b"\x00\x01")
    (tmp_path / "file").write_bytes(b"up")
    storage.upload(tmp_path / "file", "a/c/up.bin")
    storage.download("a/c/up.bin", tmp_path / "down" / "file")
    assert storage.read_bytes("a/b.bin") == b"\x00\x01"
    assert (tmp_path / "down" / "file").read_bytes() == b"up"
    assert storage.list() == ["a/b.bin", "a/c/up.bin"]
    assert storage.list("a/c") == ["a/c/up.bin"]
    assert storage.size("a/b.bin") == 2
    assert storage.exists("a/b.bin") and not storage.exists("a/nothing")
    storage.delete("a/c")
    assert storage.list() == ["a/b.bin"]


def test_storage_does_not_list_a_sibling_that_shares_a_prefix(uri: str) -> None:
    storage = open_storage(uri)
    storage.write_bytes("shards/0", b"")
    storage.write_bytes("shards-old/0", b"")
    assert storage.list("shards") == ["shards/0"]


def test_s3_folder_objects_are_no_files(bucket: str) -> None:
    storage = open_storage(f"{bucket}/run")
    storage.write_bytes("a/b", b"1")
    storage.client.put_object(Bucket=storage.bucket, Key="run/a/", Body=b"")  # type: ignore
    assert storage.list() == ["a/b"]


def test_missing_file_raises_file_not_found(uri: str) -> None:
    with pytest.raises(FileNotFoundError):
        open_storage(uri).read_bytes("nothing")


def test_version_changes_with_content(uri: str) -> None:
    storage = open_storage(uri)
    storage.write_bytes("x", b"one")
    before = storage.version("x")
    storage.write_bytes("x", b"two")
    assert storage.version("x") != before


def test_table_survives_a_round_trip_and_garbage_is_refused(uri: str) -> None:
    storage = open_storage(uri)
    table = pa.table({"id": ["a", "b"], "n": [1, 2]})
    write_table(storage, "t.parquet", table)
    assert read_table(storage, "t.parquet").equals(table)
    storage.write_bytes("bad.parquet", b"half a file")
    with pytest.raises(StorageError, match=r"bad\.parquet is not a readable Parquet"):
        read_table(storage, "bad.parquet")


def test_failed_write_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(tmp_path)
    storage.write_bytes("x", b"old")

    def crash(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(StorageError, match="No space left"):
        storage.write_bytes("x", b"new")
    assert storage.read_bytes("x") == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_unknown_scheme_is_refused_with_the_accepted_ones() -> None:
    with pytest.raises(StorageError, match=r"'gs'.*file:// and s3://"):
        open_storage("gs://bucket/x")


def test_relative_file_uri_is_not_taken_for_an_absolute_path() -> None:
    with pytest.raises(StorageError, match="write file:///runs/x, or a path"):
        open_storage("file://runs/x")


def test_missing_bucket_names_the_mend(bucket: str) -> None:
    with pytest.raises(StorageError, match="NoSuchBucket; create the bucket"):
        open_storage("s3://no-such-bucket-here/x").list()


def test_file_in_the_way_of_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(StorageError, match=r"cannot use .*run.* is a file: give a path"):
        open_storage(tmp_path / "run" / "below").write_bytes("x", b"")
    with pytest.raises(StorageError, match=r"cannot use .*run.* is a file: give a path"):
        open_storage(tmp_path / "run" / "below").read_bytes("x")


def test_folder_that_cannot_be_made_is_one_line_and_not_a_missing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(tmp_path / "run")

    def refuse(folder: Path, *_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", str(folder))  # as /proc does

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageError, match=r"cannot use .*run: No such file .* give another path"):
        storage.write_bytes("x", b"")


@pytest.mark.slow
def test_s3_that_refuses_and_breaks_off_loses_nothing(faulty_bucket: str) -> None:
    storage = open_storage(f"{faulty_bucket}/run")
    contents = {f"shards/{n:05d}.parquet": bytes([n]) * 5000 for n in range(5)}
    for path, content in contents.items():
        storage.write_bytes(path, content)
    assert storage.list() == sorted(contents)
    assert {path: storage.read_bytes(path) for path in contents} == contents
