import itertools
import json
import threading
import time
from pathlib import Path

import pytest

from cluster import run_lock as run_lock_module
from cluster.errors import StorageError, UserError
from cluster.run_lock import LOCK, run_lock
from cluster.storage import S3Storage, Storage, open_storage


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(tmp_path / "run")
    return request.getfixturevalue("s3")


@pytest.fixture
def s3(bucket: str, monkeypatch: pytest.MonkeyPatch) -> S3Storage:
    """A run folder on S3 whose lock lives for five seconds."""
    monkeypatch.setattr(run_lock_module, "RENEWED_S", 0.5)
    monkeypatch.setattr(run_lock_module, "EXPIRES_S", 5.0)
    storage = open_storage(f"{bucket}/run")
    assert isinstance(storage, S3Storage)
    return storage


def test_one_process_holds_the_lock_and_gives_it_back(storage: Storage) -> None:
    for _ in range(2):
        with run_lock(storage) as lock:
            with (
                pytest.raises(UserError, match=r"another process .*is at work in .*: wait for it"),
                run_lock(open_storage(storage.uri)),
            ):
                pytest.fail("two hold it")
            lock.check()
    assert list(storage.entries()) == [LOCK]


def test_lock_of_a_process_that_died_is_taken_over(s3: S3Storage) -> None:
    s3.write_bytes(LOCK, json.dumps({"holder": "gone, process 7", "once": "1"}).encode())
    start = time.monotonic()
    with run_lock(s3) as lock:
        lock.check()
        assert json.loads(s3.read_bytes(LOCK))["holder"] != "gone, process 7"
    assert 4 < time.monotonic() - start < 60


def test_of_two_that_take_over_a_lock_one_gets_it(s3: S3Storage) -> None:
    s3.write_bytes(LOCK, json.dumps({"holder": "gone", "once": "1"}).encode())
    taken, refused = [], []

    def take() -> None:
        try:
            with run_lock(open_storage(s3.uri)) as lock:
                taken.append(lock)
                time.sleep(8)
                lock.check()
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 2)


def test_lost_lock_is_told_to_its_holder(s3: S3Storage) -> None:
    with run_lock(s3) as lock:
        s3.write_bytes(LOCK, b'{"holder": "somebody else"}')
        with pytest.raises(UserError, match="was not renewed for 5 s"):
            for _ in range(200):
                lock.check()
                time.sleep(0.1)
    assert s3.read_bytes(LOCK) == b'{"holder": "somebody else"}'  # not ours to give back


def test_lock_that_cannot_be_renewed_is_lost_in_time(
    s3: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise StorageError("S3 does not answer")

    with run_lock(s3) as lock:
        monkeypatch.setattr(S3Storage, "write_if", refuse)
        lock.check()
        time.sleep(5.5)
        with pytest.raises(UserError, match="see that S3 answers"):
            lock.check()


def test_what_is_no_lock_of_ours_is_one_line(s3: S3Storage) -> None:
    for content in (b"", b"[]", b"\xff", b'{"holder": "a\\nb"}'):
        s3.write_bytes(LOCK, content)
        ended = threading.Event()

        def renew(content: bytes = content, ended: threading.Event = ended) -> None:
            for spaces in itertools.count(1):  # no version is like one before
                if ended.wait(0.2):
                    return
                s3.write_bytes(LOCK, content + b" " * spaces)

        thread = threading.Thread(target=renew)
        thread.start()
        try:
            with pytest.raises(UserError) as error, run_lock(s3):
                pytest.fail("somebody else holds it")
        finally:
            ended.set()
            thread.join()
        assert "\n" not in str(error.value)
