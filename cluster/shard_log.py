"""The log of a step's shards: what their writers said of them, on the storage.

The driver is told of each shard by the process that wrote it, and never opens one. The log is
Parquet parts, the last of which is written anew as it fills: S3 cannot append.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.file_list import FILES, FileList, files_table
from cluster.files import FileEntry, StoredFile
from cluster.storage import Storage, read_table, write_table

LOG = "work/log"
_PART_FILES = 1000
_SCHEMA = FILES.append(pa.field("tally", pa.binary()))


class ShardLog:
    """Appends descriptions in the background: what comes while one is written goes with the next.

    The first description begins the log of an earlier run anew, unless the step has resumed it.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._lock = threading.Lock()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="shard-log")
        self._writing: Future[None] = Future()
        self._writing.set_result(None)
        self._is_writing = False
        self._waiting: list[pa.Table] = []
        self._part = _SCHEMA.empty_table()
        # So that nobody overwrites a part of another's, though the lock keeps others out.
        self._name = uuid.uuid4().hex[:8]
        self._number: int | None = None  # of the part that is being filled; None before the first

    def resume(self) -> tuple[FileList, Iterator[bytes]]:
        """Goes on with the log; returns the shards that are done, rejects too, and their tallies.

        Done is what the log names and a listing shows with the size that its writer told.
        """
        parts = self._storage.list(LOG)
        self._number = len(parts)
        known = self.files()
        there = np.zeros(len(known), bool)
        for file, number in known.locate(_listed(self._storage)):
            if number is not None:
                there[number] = known[number].num_bytes == file.num_bytes
        done = known.filter(there)

        def tallies() -> Iterator[bytes]:
            for path in parts:
                part = read_table(self._storage, path, ["path", "tally"])
                is_done = pc.is_in(part["path"], value_set=done.paths)
                yield from part.filter(is_done)["tally"].drop_null().to_pylist()

        return done, tallies()

    def files(self) -> FileList:
        """Waits until all is written; returns the files by path."""
        self.flush()
        parts = [read_table(self._storage, p, FILES.names) for p in self._storage.list(LOG)]
        return FileList.from_table(pa.concat_tables([FILES.empty_table(), *parts]))

    def append(self, files: Sequence[FileEntry], tally: bytes | None = None) -> None:
        """Adds descriptions that belong together, and the tally of the last; returns at once.

        Raises:
            StorageError: What was appended before cannot be written.
        """
        if not files:
            return
        tallies = pa.array([None] * (len(files) - 1) + [tally], pa.binary())
        rows = files_table(files).append_column(_SCHEMA.field("tally"), tallies)
        with self._lock:
            self._waiting.append(rows)
            if self._is_writing:
                return
            self._writing.result()
            self._is_writing = True
            self._writing = self._writer.submit(self._write)

    def flush(self) -> None:
        """Waits until all is written; raises StorageError if it cannot be."""
        self._writing.result()

    def _write(self) -> None:
        try:
            while rows := self._taken():
                if self._number is None:
                    self._storage.delete(LOG)
                    self._number = 0
                self._part = pa.concat_tables([self._part, *rows])
                path = f"{LOG}/{self._number:09d}-{self._name}.parquet"
                write_table(self._storage, path, self._part)
                if self._part.num_rows >= _PART_FILES:
                    self._part, self._number = _SCHEMA.empty_table(), self._number + 1
        except BaseException:
            self._is_writing = False
            raise

    def _taken(self) -> list[pa.Table]:
        """Returns what waits to be written; nothing, when the writing ends."""
        with self._lock:
            rows, self._waiting = self._waiting, []
            self._is_writing = bool(rows)
        return rows


def _listed(storage: Storage) -> Iterator[StoredFile]:
    yield from storage.scan("shards")
    yield from storage.scan("rejects")
