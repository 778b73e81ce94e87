"""A run folder's lock: one process at a time works in it."""

import contextlib
import fcntl
from collections.abc import Iterator

from cluster.errors import UserError
from cluster.storage import LocalStorage, Storage

LOCK = "run.lock"


@contextlib.contextmanager
def run_lock(storage: Storage) -> Iterator[None]:
    """Holds the lock of a run folder, if it is a local one; it dies with its process.

    Raises:
        UserError: Another process holds it.
    """
    if not isinstance(storage, LocalStorage):
        yield
        return
    storage.make()
    with (storage.folder / LOCK).open("a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is at work in {storage.uri}: wait for it, or stop it"
            ) from error
        yield
