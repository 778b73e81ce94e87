import threading
from pathlib import Path

import pyarrow as pa
import pytest

from cluster import shard_log
from cluster.errors import StorageError
from cluster.file_list import shard_path
from cluster.files import FileEntry
from cluster.shard_log import LOG, ShardLog
from cluster.storage import LocalStorage, Storage, open_storage, read_table, write_table


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(tmp_path)
    return open_storage(request.getfixturevalue("bucket") + "/step")


def entry(number: int, num_bytes: int = 1) -> FileEntry:
    return FileEntry(path=f"{number:05d}", num_bytes=num_bytes, sha256="0" * 64, num_rows=1)


def part_rows(storage: Storage) -> list[int]:
    return [read_table(storage, path).num_rows for path in storage.list(LOG)]


def test_log_is_read_as_it_was_written(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_log, "_PART_FILES", 10)
    log = ShardLog(storage)
    for number in range(35):
        log.append([entry(number), entry(number + 100)], b"%d" % number)
        log.flush()
    log.append([])
    paths = [entry(number).path for number in (*range(35), *range(100, 135))]
    assert [file.path for file in log.files()] == paths
    rows = part_rows(storage)
    assert rows == [10] * 7  # parts are filled, and end; what belongs together stays together


def test_done_is_what_lies_there_with_its_size(storage: Storage) -> None:
    log = ShardLog(storage)
    for number in range(5):
        shard = write_table(storage, shard_path(number), pa.table({"n": [number]}))
        rejects = write_table(storage, shard_path(number, "rejects"), pa.table({"n": [number]}))
        log.append([rejects, shard], b"%d" % number)
    log.flush()
    storage.delete(shard_path(1))
    storage.write_bytes(shard_path(3), b"of another size")
    write_table(storage, shard_path(7), pa.table({"n": [7]}))  # a crash came before the log
    resumed = ShardLog(storage)
    done, tallies = resumed.resume()
    assert [file.path for file in done.below("shards/")] == [shard_path(n) for n in (0, 2, 4)]
    assert len(done.below("rejects/")) == 5
    assert sorted(tallies) == [b"0", b"2", b"4"]
    resumed.append([entry(9)], b"9")
    assert len(resumed.files()) == 11  # it was gone on with


def test_log_that_is_not_resumed_is_begun_anew(storage: Storage) -> None:
    first = ShardLog(storage)
    first.append([entry(1), entry(2)])
    first.append([entry(2, num_bytes=5)])
    assert [(file.path, file.num_bytes) for file in first.files()] == [
        (entry(1).path, 1),
        (entry(2).path, 5),
    ]
    second = ShardLog(storage)
    second.append([entry(9)])
    assert [file.path for file in second.files()] == [entry(9).path]


def test_appending_does_not_wait_for_the_storage(tmp_path: Path) -> None:
    class Slow(LocalStorage):
        def __init__(self) -> None:
            super().__init__(tmp_path)
            self.may_write, self.num_written = threading.Event(), 0

        def writing(self, path: str):  # type: ignore[no-untyped-def]
            assert self.may_write.wait(20)
            self.num_written += 1
            return super().writing(path)

    storage = Slow()
    log = ShardLog(storage)
    for number in range(500):
        log.append([entry(number)])
    storage.may_write.set()
    log.flush()
    assert storage.num_written <= 2  # what came meanwhile went together
    assert len(log.files()) == 500


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("in the way")
    log = ShardLog(open_storage(tmp_path))
    log.append([entry(1)])
    with pytest.raises(StorageError, match="is a file"):
        log.flush()
    with pytest.raises(StorageError, match="is a file"):
        log.append([entry(2)])
