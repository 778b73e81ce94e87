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


ESCAPES = ["/etc/x", "../x", "a/../../x", "a/..", "a//b", "./a", "a/./b", "a/", "a\0b"]


@pytest.mark.parametrize("path", ESCAPES)
def test_path_that_leaves_its_folder_is_refused_by_every_method(
    path: str, uri: str, tmp_path: Path
) -> None:
    (tmp_path / "x").write_bytes(b"private")
    (tmp_path / "file").write_bytes(b"up")
    storage = open_storage(uri)
    storage.write_bytes("a/b", b"")
    for method in (
        storage.read_bytes,
        storage.exists,
        storage.size,
        storage.version,
        storage.list,
        storage.delete,
        lambda path: storage.write_bytes(path, b""),
        lambda path: storage.upload(tmp_path / "file", path),
        lambda path: storage.download(path, tmp_path / "down" / "file"),
    ):
        with pytest.raises(StorageError, match="a path must be relative") as error:
            method(path)
        assert "\n" not in str(error.value)
    assert (tmp_path / "x").read_bytes() == b"private"


@pytest.mark.parametrize("key", ["/etc/x", "../x", "a/../x", "./a", "a/./b", "a//b"])
def test_s3_key_that_leaves_its_folder_is_refused_by_name(
    key: str, bucket: str, tmp_path: Path
) -> None:
    storage = open_storage(f"{bucket}/model")
    storage.write_bytes("config.json", b"{}")
    storage.client.put_object(  # type: ignore[attr-defined]
        Bucket=storage.bucket,  # type: ignore[attr-defined]
        Key=f"model/{key}",
        Body=b"",
    )
    with pytest.raises(StorageError, match=rf"{bucket}/model names {key!r}: a path must"):
        storage.list()


def test_backslash_in_an_s3_key_is_a_plain_character(bucket: str, tmp_path: Path) -> None:
    storage = open_storage(f"{bucket}/x")
    storage.write_bytes("..\\..\\a", b"1")
    storage.download("..\\..\\a", tmp_path / "y" / storage.list()[0])
    assert [file.name for file in (tmp_path / "y").iterdir()] == ["..\\..\\a"]


def test_two_s3_objects_of_which_one_is_the_others_folder_are_one_line(
    bucket: str, tmp_path: Path
) -> None:
    storage = open_storage(f"{bucket}/x")
    for path in ("a", "a/b"):
        storage.write_bytes(path, b"1")
    storage.download("a", tmp_path / "a")
    with pytest.raises(StorageError, match="a part of this path is a file"):
        storage.download("a/b", tmp_path / "a" / "b")


@pytest.mark.parametrize(
    ("given", "uri"),
    [
        ("s3://b/a#1?x=2&y", "s3://b/a#1?x=2&y"),
        ("s3://b/a%20b/", "s3://b/a%20b"),
        ("S3://b", "s3://b"),
        ("file:///tmp/a#1?x", "/tmp/a#1?x"),
        ("file:///tmp/a%23b", "/tmp/a#b"),
        ("file://localhost/tmp/a", "/tmp/a"),
        ("/tmp/a#1?x%20", "/tmp/a#1?x%20"),
        ("/tmp/a:b", "/tmp/a:b"),
    ],
)
def test_nothing_of_a_uri_is_cut(given: str, uri: str) -> None:
    assert open_storage(given).uri == uri
    assert open_storage(given.rstrip("/") + "/c#d").uri == f"{uri}/c#d"


@pytest.mark.parametrize("uri", ["s3://b//x", "s3://b/../x", "s3://b/x/./y", "s3://b/x//y"])
def test_s3_uri_with_an_odd_part_is_refused(uri: str) -> None:
    with pytest.raises(StorageError, match=r"no part that is empty, '\.' or '\.\.'"):
        open_storage(uri)


@pytest.mark.parametrize("uri", ["s3:b/x", "s3:///x", "s3://"])
def test_s3_uri_without_a_bucket_is_refused(uri: str) -> None:
    with pytest.raises(StorageError, match="names no bucket: write s3://BUCKET/PREFIX"):
        open_storage(uri)


def test_file_whose_name_is_not_utf8_is_listed_and_read(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"1")
    (tmp_path / "z.txt").write_bytes(b"2")
    storage = open_storage(tmp_path)
    assert storage.list() == ["caf\udce9.txt", "z.txt"]
    assert [storage.read_bytes(path) for path in storage.list()] == [b"1", b"2"]
    assert storage.version("caf\udce9.txt") and storage.size("caf\udce9.txt") == 1


def test_half_a_surrogate_pair_in_a_name_is_one_line(uri: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="it is no name of a") as error:
        open_storage(uri).read_bytes("a\ud800")
    str(error.value).encode()


def test_home_of_nobody_is_one_line() -> None:
    with pytest.raises(StorageError, match=r"'~no-such-user/x'.*home"):
        open_storage("~no-such-user/x")


def test_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "corpus.jsonl").write_bytes(b"")
    scandir = os.scandir

    def refuse(folder: str) -> object:  # a test may run as root, who may read all
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StorageError, match="Permission denied; check that its owner"):
        open_storage(tmp_path).list()


def test_folder_behind_a_symbolic_link_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "index").symlink_to(tmp_path / "thesis")
    for storage, path in (
        (open_storage(tmp_path / "run"), "index"),
        (open_storage(tmp_path / "run" / "index"), ""),
    ):
        with pytest.raises(StorageError, match="is a symbolic link to a folder"):
            storage.delete(path)
    assert (tmp_path / "thesis" / "chapter.txt").exists()


def test_error_about_a_long_name_is_short(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="File name too long") as error:
        open_storage(tmp_path).read_bytes("\x1b[31m" + "x" * 5000)
    assert len(str(error.value)) < 500 and str(error.value).isprintable()
