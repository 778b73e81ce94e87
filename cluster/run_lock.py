"""A run folder's lock: one process at a time works in it."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Self

from cluster.errors import StorageError, UserError, excerpt
from cluster.storage import LocalStorage, S3Storage, Storage

LOCK = "run.lock"
RENEWED_S = 15.0
EXPIRES_S = 60.0  # without a renewal, by S3's own clock


class RunLock:
    """The lock as its holder has it."""

    def check(self) -> None:
        """Raises UserError if somebody else may have taken it meanwhile."""


@contextlib.contextmanager
def run_lock(storage: Storage) -> Iterator[RunLock]:
    """Holds the lock of a run folder until the block ends.

    On a disk it dies with its process. On S3 it is an object that is renewed all the time; that of
    a process that died is taken over when it has not been for a minute, for which this waits.

    Raises:
        UserError: Another process holds it.
    """
    if isinstance(storage, S3Storage):
        with _S3Lock(storage) as lock:
            yield lock
        return
    assert isinstance(storage, LocalStorage)
    storage.make()
    with (storage.folder / LOCK).open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _taken(storage) from error
        yield RunLock()


def _taken(storage: Storage, holder: str = "") -> UserError:
    who = f"another process{holder} is at work"
    return UserError(f"{who} in {storage.uri}: wait for it, or stop it")


class _S3Lock(RunLock):
    """An object that is only written over the version of it that was read, or if there is none."""

    def __init__(self, storage: S3Storage) -> None:
        self._storage = storage
        self._holder = f"{socket.gethostname()}, process {os.getpid()}"
        self._version, self._renewed = "", 0.0
        self._is_lost = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="run-lock")

    def __enter__(self) -> Self:
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(RENEWED_S)
        with contextlib.suppress(StorageError):  # it expires by itself
            if not self._is_lost:
                self._write(self._version, holder=None)

    def check(self) -> None:
        """Raises UserError if somebody else may have taken it meanwhile."""
        if self._is_lost or time.monotonic() - self._renewed > EXPIRES_S:
            raise UserError(
                f"the lock of {self._storage.uri} was not renewed for {EXPIRES_S:.0f} s, so another"
                " process may be at work there: see that S3 answers, and run again; what is done"
                " stays"
            )

    def _take(self) -> None:
        """Makes the object, or takes it over once it was given back, or not renewed for long."""
        waited_for = ""
        while True:
            try:
                content, version, age_s = self._storage.read_with_age(LOCK)
            except FileNotFoundError:
                if self._write(None, self._holder):
                    return
                continue
            holder = _holder(content)
            if holder is None or age_s > EXPIRES_S:
                if self._write(version, self._holder):
                    return
                holder = _holder(self._storage.read_bytes(LOCK))  # somebody was faster
            elif waited_for in ("", version):
                waited_for = version
                time.sleep(min(EXPIRES_S - age_s, RENEWED_S) + 1)  # a living holder renews it
                continue
            raise _taken(self._storage, f" ({excerpt(holder)})")

    def _keep(self) -> None:
        """Renews the object until it is told to end, or has lost it."""
        while not self._ended.wait(RENEWED_S):
            with contextlib.suppress(StorageError):  # `check` tells, if it lasts
                if not self._write(self._version, self._holder):
                    self._is_lost = True
                    return

    def _write(self, version: str | None, holder: str | None) -> bool:
        """Writes the object over this version of it; says whether it was still that."""
        now = time.monotonic()
        note = {"holder": holder, "once": uuid.uuid4().hex}  # no two of them are alike
        written = self._storage.write_if(LOCK, json.dumps(note).encode(), version)
        if written is not None:
            self._version, self._renewed = written, now
        return written is not None


def _holder(content: bytes) -> str | None:
    """Returns who holds the lock, by its own words, or None where it was given back."""
    try:
        note = json.loads(content)
    except ValueError:
        return "not known"
    return note.get("holder") if isinstance(note, dict) else "not known"
