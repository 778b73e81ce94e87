"""Files of a run in a folder of a file system."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cluster.errors import StorageError, excerpt
from cluster.files import DescribedWriter, StoredFile, checked_path


class LocalStorage:
    """A folder on a file system that every node sees (one machine, or a shared mount)."""

    def __init__(self, folder: Path) -> None:
        try:
            self.folder = folder.expanduser().absolute()
        except RuntimeError as error:  # ~NAME of nobody
            raise StorageError(f"storage {excerpt(folder)!r}: {excerpt(error)}") from error
        self.uri = str(self.folder)

    def read_bytes(self, path: str) -> bytes:
        """Returns the whole file; raises FileNotFoundError."""
        with self._place(path) as file:
            return file.read_bytes()

    def write_bytes(self, path: str, content: bytes) -> None:
        """Writes the whole file atomically, making parent folders."""
        with self._place(path) as file, _replacing(file) as unfinished:
            unfinished.write_bytes(content)

    def open(self, path: str) -> BinaryIO:
        """Opens a file to be read by ranges; raises FileNotFoundError."""
        with self._place(path) as file:
            return file.open("rb")

    @contextmanager
    def writing(self, path: str) -> Iterator[DescribedWriter]:
        """Gives a file to write to, which is at `path` once the block has ended well."""
        with self._place(path) as file, _replacing(file) as part, part.open("wb") as sink:
            yield DescribedWriter(path, sink)

    def upload(self, source: Path, path: str) -> None:
        """Copies one local file to `path` atomically."""
        with self._place(path) as file, _replacing(file) as unfinished:
            shutil.copyfile(source, unfinished)

    def download(self, path: str, target: Path) -> None:
        """Copies one file to the local `target`; raises FileNotFoundError."""
        with self._place(path) as file:
            make_folder(target.parent)
            shutil.copyfile(file, target)

    def list(self, prefix: str = "") -> list[str]:
        """Returns the sorted paths of all whole files below the folder `prefix`.

        A name that is not UTF-8 comes as Python has it from the system, with surrogates for the
        bytes in question; the other methods take it so.
        """
        return sorted(file.path for file in self.scan(prefix))

    def scan(self, prefix: str = "") -> Iterator[StoredFile]:
        """Yields all whole files below the folder `prefix` with their sizes, in no order."""
        with self._place(prefix) as top:
            for folder, _, names in os.walk(top, onerror=_raise_unless_gone):
                for file in (Path(folder, name) for name in names):
                    if file.name.endswith(".unfinished") or not file.is_file():
                        continue
                    with suppress(FileNotFoundError):  # deleted meanwhile
                        num_bytes = file.stat().st_size
                        path = file.relative_to(self.folder).as_posix()
                        yield StoredFile(path=path, num_bytes=num_bytes, version=None)

    def entries(self) -> Iterator[str]:
        """Yields the names of the files and folders that lie right in it, in no order."""
        with self._place("") as folder:
            names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        yield from (name for name in names if not name.endswith(".unfinished"))

    def make(self) -> None:
        """Makes the folder and its parents, where they are missing."""
        make_folder(self.folder)

    def symbolic_link(self) -> Path | None:
        """Returns a symbolic link that lies in the folder, or None."""
        with self._place("") as top:
            for folder, folders, files in os.walk(top, onerror=_raise_unless_gone):
                for name in (*folders, *files):
                    if (path := Path(folder, name)).is_symlink():
                        return path
        return None

    def exists(self, path: str) -> bool:
        """Says whether the file is there."""
        with self._place(path) as file:
            return file.is_file()

    def find(self, path: str) -> StoredFile | None:
        """Returns the file as a listing shows it, or None."""
        if not self.exists(path):
            return None
        return StoredFile(path=path, num_bytes=self.size(path), version=None)

    def size(self, path: str) -> int:
        """Returns the file's bytes; raises FileNotFoundError."""
        with self._place(path) as file:
            return file.stat().st_size

    def version(self, path: str) -> str:
        """Returns the SHA-256 of the file's content."""
        with self._place(path) as place, place.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def delete(self, prefix: str) -> None:
        """Deletes a file, or a folder with all it holds; nothing there is no error.

        Raises:
            StorageError: A symbolic link leads to the folder.
        """
        with self._place(prefix) as target:
            if not target.is_dir():
                target.unlink(missing_ok=True)
            elif target.is_symlink():
                raise StorageError(
                    f"cannot delete {target}: it is a symbolic link to a folder, whose files may be"
                    " somebody else's; remove it yourself"
                )
            else:
                shutil.rmtree(target)

    @contextmanager
    def _place(self, path: str) -> Iterator[Path]:
        """Gives a path's place on the disk; what the system refuses there becomes one line."""
        place = self.folder / (path and checked_path(path, self.uri))
        with local_errors(place):
            yield place


def _raise_unless_gone(error: OSError) -> None:
    """Raises an error of `os.walk`, so that an unreadable folder does not pass for an empty one."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Gives a temporary file beside `target`, synced and renamed onto it on success."""
    make_folder(target.parent)
    handle, name = tempfile.mkstemp(
        dir=target.parent, prefix=f".{target.name}.", suffix=".unfinished"
    )
    os.close(handle)
    unfinished = Path(name)
    try:
        yield unfinished
        unfinished.chmod(0o644)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


_LOCAL_REMEDIES = {
    errno.ENOTDIR: "a part of this path is a file: give a path below folders only",
    errno.EEXIST: "a part of this path is a file: give a path below folders only",
    errno.ENOENT: "this file system makes no folders there: give another path",
    errno.EROFS: "it is read-only: give another path",
    errno.ENOSPC: "the disk is full: make room or give another path",
}


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents; where /proc and the like refuse, nothing is "not found"."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refusal(folder, error) from error


@contextmanager
def local_errors(path: Path) -> Iterator[None]:
    """Turns the operating system's refusals into one line for the user."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _refusal(path, error) from error
    except ValueError as error:  # a lone surrogate, a zero byte
        raise StorageError(f"cannot use {excerpt(path)}: it is no name of a file") from error


def _refusal(path: Path, error: OSError) -> StorageError:
    remedy = _LOCAL_REMEDIES.get(
        error.errno or 0, "check that its owner and permissions let you read and write it"
    )
    return StorageError(f"cannot use {excerpt(path, 300)}: {excerpt(error.strerror)}; {remedy}")
