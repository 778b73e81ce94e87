"""Files read by range, written as a stream, and listed with their sizes and versions."""

import hashlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import s3_storage
from cluster.errors import StorageError
from cluster.storage import (
    LocalStorage,
    S3Storage,
    Storage,
    file_versions,
    open_storage,
    read_table,
    write_table,
)


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(tmp_path / "run")
    return open_storage(request.getfixturevalue("bucket") + "/some/run")


@pytest.fixture
def s3(bucket: str) -> S3Storage:
    storage = open_storage(f"{bucket}/run")
    assert isinstance(storage, S3Storage)
    return storage


def calls_of(storage: S3Storage, monkeypatch: pytest.MonkeyPatch, *names: str) -> list[Any]:
    """Notes the arguments and answers of the client's methods from now on."""
    calls: list[Any] = []
    for name in names:
        method = getattr(storage.client, name)

        def noted(name: str = name, method: Any = method, **arguments: Any) -> Any:
            answer = method(**arguments)
            calls.append((name, arguments, answer))
            return answer

        monkeypatch.setattr(storage.client, name, noted)
    return calls


def test_ranges_of_a_file_are_read(storage: Storage) -> None:
    content = np.random.default_rng(0).bytes(300_000)
    storage.write_bytes("a/file", content)
    with storage.open("a/file") as file:
        assert file.read(10) == content[:10]
        assert file.seek(-5, 2) == 299_995 and file.read() == content[-5:]
        assert file.seek(100_000) == file.tell() == 100_000
        assert file.read(150_000) == content[100_000:250_000]
        assert file.seek(7, 1) == 250_007 and file.read(3) == content[250_007:250_010]
        assert file.seek(400_000) == 400_000 and file.read(1) == b""
        file.seek(0)
        assert hashlib.file_digest(file, "sha256").digest() == hashlib.sha256(content).digest()
    for small in (b"", b"x"):
        storage.write_bytes("small", small)
        with storage.open("small") as file:
            assert file.read() == small
    with pytest.raises(FileNotFoundError):
        storage.open("nothing")


def test_column_is_read_without_its_neighbours(
    s3: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(0)
    table = pa.table(
        {
            "before": [draw.bytes(2000) for _ in range(1000)],
            "id": pa.array(range(1000)),
            "after": [draw.bytes(2000) for _ in range(1000)],
        }
    )
    entry = write_table(s3, "shards/0", table)
    assert entry.num_bytes > 4_000_000
    calls = calls_of(s3, monkeypatch, "get_object", "head_object")
    assert read_table(s3, "shards/0", ["id"]).equals(table.select(["id"]))
    assert sum(answer["ContentLength"] for _, _, answer in calls) < 100_000
    assert len(calls) <= 2
    calls.clear()
    assert read_table(s3, "shards/0").equals(table)
    assert len(calls) <= 4 and sum(answer["ContentLength"] for _, _, answer in calls) < 4_300_000
    calls.clear()
    write_table(s3, "shards/1", table.slice(0, 3))
    assert read_table(s3, "shards/1", ["after", "id"])["id"].to_pylist() == [0, 1, 2]
    assert len(calls) == 1  # a small file is one request


def test_answer_that_breaks_off_goes_on_where_it_stopped(
    s3: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import ResponseStreamingError

    monkeypatch.setattr(s3_storage, "_CHUNK_BYTES", 1000)
    content = np.random.default_rng(0).bytes(200_000)
    s3.write_bytes("file", content)
    get, given = s3.client.get_object, 0

    class Broken:
        def __init__(self, body: Any) -> None:
            self.body = body

        def iter_chunks(self, size: int) -> Any:
            nonlocal given
            for number, chunk in enumerate(self.body.iter_chunks(size)):
                if number == 50:
                    raise ResponseStreamingError(error="gone")
                given += len(chunk)
                yield chunk

    def broken(**arguments: Any) -> Any:
        answer = get(**arguments)
        return {**answer, "Body": Broken(answer["Body"])}

    monkeypatch.setattr(s3.client, "get_object", broken)
    assert s3.read_bytes("file") == content and given == len(content)
    given = 0
    with s3.open("file") as file:
        assert file.read(120_000) == content[:120_000]
    assert given == 120_000 + (1 << 16)


def test_file_that_changes_while_it_is_read_is_told(s3: S3Storage) -> None:
    s3.write_bytes("file", b"a" * 200_000)
    with s3.open("file") as file:
        assert file.read(5) == b"aaaaa"
        s3.write_bytes("file", b"b" * 200_000)
        file.seek(100_000)
        with pytest.raises(StorageError, match="was written anew while it was read"):
            file.read(5)


def test_stream_is_described_and_seen_only_when_it_is_whole(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_storage, "_PART_BYTES", 5 << 20)
    content = np.random.default_rng(0).bytes(12 << 20)
    with storage.writing("a/big") as file:
        for start in range(0, len(content), 1 << 20):
            assert file.write(content[start : start + (1 << 20)]) == 1 << 20
            assert not storage.exists("a/big")
    entry = file.entry(7)
    assert (entry.path, entry.num_bytes, entry.num_rows) == ("a/big", len(content), 7)
    assert entry.sha256 == hashlib.sha256(content).hexdigest()
    assert storage.read_bytes("a/big") == content
    with storage.writing("empty"):
        pass
    assert storage.read_bytes("empty") == b""
    for size in (1, 11 << 20):
        with pytest.raises(RuntimeError, match="killed"), storage.writing("a/big") as file:
            file.write(content[:size])
            raise RuntimeError("killed")
    assert storage.read_bytes("a/big") == content
    assert storage.list() == ["a/big", "empty"]
    if isinstance(storage, S3Storage):
        assert not storage.client.list_multipart_uploads(Bucket=storage.bucket).get("Uploads")


def test_written_table_is_described(storage: Storage) -> None:
    table = pa.table({"id": ["a", "b"]})
    entry = write_table(storage, "shards/0", table)
    content = storage.read_bytes("shards/0")
    assert (entry.num_bytes, entry.num_rows) == (len(content), 2)
    assert entry.sha256 == hashlib.sha256(content).hexdigest()
    assert pq.read_table(pa.BufferReader(content)).equals(table)


def test_listing_tells_sizes_and_on_s3_versions(storage: Storage) -> None:
    storage.write_bytes("a/one", b"1")
    storage.write_bytes("a/two", b"22")
    storage.write_bytes("b", b"")
    assert sorted((file.path, file.num_bytes) for file in storage.scan("a")) == [
        ("a/one", 1),
        ("a/two", 2),
    ]
    for file in storage.scan():
        version = storage.version(file.path) if isinstance(storage, S3Storage) else None
        assert file.version == version


def test_a_thousand_files_are_listed_in_one_request(
    s3: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1001):
        s3.write_bytes(f"{number}", b"x" * (number % 3))
    pages: list[Any] = []
    s3.client.meta.events.register("after-call.s3", lambda model, **_: pages.append(model.name))
    assert sum(file.num_bytes for file in s3.scan()) == sum(n % 3 for n in range(1001))
    assert pages == ["ListObjectsV2"] * 2
    pages.clear()
    paths = ["7", "1000", "3"]
    versions = file_versions(s3, paths)
    assert pages == ["ListObjectsV2"] * 2
    assert versions == [(path, s3.version(path)) for path in paths]


def test_a_folder_is_deleted_many_files_at_once(
    s3: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_storage, "_DELETED_AT_ONCE", 3)
    for path in ["a/1", "a/2", "a/b/3", "a/4", "ab", "5"]:
        s3.write_bytes(path, b"x")
    requests: list[str] = []
    s3.client.meta.events.register("after-call.s3", lambda model, **_: requests.append(model.name))
    s3.delete("a")
    assert s3.list() == ["5", "ab"]
    assert requests == ["ListObjectsV2", "DeleteObjects", "DeleteObjects", "ListObjectsV2"]
    s3.delete("nothing")


def test_a_file_that_may_not_be_deleted_is_an_error(
    s3: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(Delete: Any, **_: Any) -> Any:
        key = Delete["Objects"][-1]["Key"]
        return {"Errors": [{"Key": key, "Code": "AccessDenied", "Message": "Access Denied"}]}

    s3.write_bytes("a/1", b"x")
    monkeypatch.setattr(s3.client, "delete_objects", refuse)
    with pytest.raises(StorageError, match="a/1: AccessDenied; give this identity"):
        s3.delete("a")


def test_file_is_written_on_condition(s3: S3Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    first = s3.write_if("lock", b"1", None)
    assert first == s3.version("lock")
    assert s3.write_if("lock", b"2", None) is None and s3.read_bytes("lock") == b"1"
    second = s3.write_if("lock", b"2", first)
    assert second not in (None, first)
    assert s3.write_if("lock", b"3", first) is None and s3.read_bytes("lock") == b"2"
    assert s3.write_if("lock", b"2", first) == second  # its answer was lost, and it was repeated
    s3.delete("lock")
    assert s3.write_if("lock", b"4", second) is None and not s3.exists("lock")


def test_versions_of_local_files_are_read_at_once_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{number:02}" for number in range(20)]
    for name in names:
        (tmp_path / name).write_text(f"content of {name}")
    meeting, version = threading.Barrier(2), LocalStorage.version

    def met(storage: LocalStorage, path: str) -> str:
        meeting.wait(30)  # for another file's reader
        return version(storage, path)

    monkeypatch.setattr(LocalStorage, "version", met)
    found = file_versions(open_storage(tmp_path), names)
    assert found == [(n, hashlib.sha256(f"content of {n}".encode()).hexdigest()) for n in names]
    with pytest.raises(FileNotFoundError):
        file_versions(open_storage(tmp_path), ["00", "gone"])
