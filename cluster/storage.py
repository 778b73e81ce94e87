"""Files of a run, on a disk or on S3, behind one small interface.

Steps run on any node of a cluster, so nothing but a storage URI may tie them together. Every write
is atomic: a reader sees the whole file or none.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast
from urllib.parse import unquote

from cluster.errors import StorageError, excerpt
from cluster.parquet import parquet_table

if TYPE_CHECKING:
    import pyarrow as pa
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import ListObjectsV2OutputTypeDef


class Storage(Protocol):
    """A folder addressed by a URI.

    Every `path` is relative to it, uses forward slashes and stays within it: a StorageError refuses
    one that begins with a slash or has an empty part, `.` or `..`, be it given, or a key on S3.
    """

    uri: str

    def read_bytes(self, path: str) -> bytes:
        """Returns the whole file; raises FileNotFoundError."""

    def write_bytes(self, path: str, content: bytes) -> None:
        """Writes the whole file atomically, making parent folders."""

    def upload(self, source: Path, path: str) -> None:
        """Copies one local file to `path` atomically."""

    def download(self, path: str, target: Path) -> None:
        """Copies one file to the local `target`; raises FileNotFoundError."""

    def list(self, prefix: str = "") -> list[str]:
        """Returns the sorted paths of all whole files below the folder `prefix`."""

    def entries(self) -> Iterator[str]:
        """Yields the names of the files and folders that lie right in it, in no order."""

    def exists(self, path: str) -> bool:
        """Says whether the file is there."""

    def size(self, path: str) -> int:
        """Returns the file's bytes; raises FileNotFoundError."""

    def delete(self, prefix: str) -> None:
        """Deletes a file, or a folder with all it holds; nothing there is no error."""

    def version(self, path: str) -> str:
        """Returns a short text that changes with the file's content."""


_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(?://([^/]*))?(.*)", re.DOTALL)


def open_storage(uri: str | Path) -> Storage:
    """Opens the folder that `uri` names: a path, `file:///path` or `s3://bucket/prefix`.

    A `#` or `?` is a part of the name; only `%` in a file URI stands for something else.

    Raises:
        StorageError: The scheme is none of these, or an S3 URI names no bucket, or has a part that
            is empty, `.` or `..`.
    """
    text = str(uri)
    parts = _URI.fullmatch(text)
    if not parts:
        return LocalStorage(Path(text))
    scheme, host, path = parts[1].lower(), parts[2], parts[3]
    if "@" in (host or ""):  # not repeated: errors reach logs
        raise StorageError(
            "the storage URI holds credentials, which logs would show: leave them out, and give"
            " them to the machine by its environment or an instance profile"
        )
    given = f"storage {excerpt(text)!r}"
    if scheme == "file":
        if host not in (None, "", "localhost"):
            raise StorageError(f"{given}: write file:///{excerpt(host + path)}, or a path")
        return LocalStorage(Path(unquote(path)))
    if scheme == "s3":
        if not host:
            raise StorageError(f"{given} names no bucket: write s3://BUCKET/PREFIX")
        prefix = path[1:].rstrip("/")
        return S3Storage(host, prefix and checked_path(prefix, given))
    raise StorageError(
        f"{given} has the scheme {scheme!r}: accepted are a folder, file:// and s3:// (a folder of"
        " that name is written with ./ before it)"
    )


def checked_path(path: str, place: str) -> str:
    """Returns a relative path that stays within its folder, and is written in one way only.

    Raises:
        StorageError: It begins with a slash, or a part is empty, `.` or `..`, or holds a zero byte.
    """
    if "\0" in path or {"", ".", ".."}.intersection(path.split("/")):
        raise StorageError(
            f"{excerpt(place)} names {excerpt(path)!r}: a path must be relative, with no part that"
            " is empty, '.' or '..', so that it stays in its folder; rename it"
        )
    return path


def join(uri: str, *parts: str) -> str:
    """Returns the URI of a path below `uri`."""
    return "/".join([uri.rstrip("/"), *parts])


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

    def upload(self, source: Path, path: str) -> None:
        """Copies one local file to `path` atomically."""
        with self._place(path) as file, _replacing(file) as unfinished:
            shutil.copyfile(source, unfinished)

    def download(self, path: str, target: Path) -> None:
        """Copies one file to the local `target`; raises FileNotFoundError."""
        with self._place(path) as file:
            _make_folder(target.parent)
            shutil.copyfile(file, target)

    def list(self, prefix: str = "") -> list[str]:
        """Returns the sorted paths of all whole files below the folder `prefix`.

        A name that is not UTF-8 comes as Python has it from the system, with surrogates for the
        bytes in question; the other methods take it so.
        """
        with self._place(prefix) as top:
            return sorted(
                file.relative_to(self.folder).as_posix()
                for folder, _, names in os.walk(top, onerror=_raise_unless_gone)
                for file in (Path(folder, name) for name in names)
                if file.is_file() and not file.name.endswith(".unfinished")
            )

    def entries(self) -> Iterator[str]:
        """Yields the names of the files and folders that lie right in it, in no order."""
        with self._place("") as folder:
            names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        yield from (name for name in names if not name.endswith(".unfinished"))

    def make(self) -> None:
        """Makes the folder and its parents, where they are missing."""
        _make_folder(self.folder)

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
        with _local_errors(place):
            yield place


def _raise_unless_gone(error: OSError) -> None:
    """Raises an error of `os.walk`, so that an unreadable folder does not pass for an empty one."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Gives a temporary file beside `target`, synced and renamed onto it on success."""
    _make_folder(target.parent)
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


def _make_folder(folder: Path) -> None:
    """Makes a folder and its parents; where /proc and the like refuse, nothing is "not found"."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refusal(folder, error) from error


@contextmanager
def _local_errors(path: Path) -> Iterator[None]:
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


_S3_ATTEMPTS = 8


class S3Storage:
    """A prefix in an S3 bucket. Credentials and endpoint come from boto3's own chain."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")

    def __getstate__(self) -> dict[str, str]:
        return {"bucket": self.bucket, "prefix": self.prefix, "uri": self.uri}

    @cached_property
    def client(self) -> S3Client:
        """The boto3 client, made on first use in each process."""
        import boto3
        from botocore.config import Config

        retries = cast(Any, {"max_attempts": _S3_ATTEMPTS, "mode": "adaptive"})
        # A session of its own: boto3's shared one must not make clients in two threads at once.
        return boto3.Session().client("s3", config=Config(retries=retries))

    def read_bytes(self, path: str) -> bytes:
        """Returns the whole file; raises FileNotFoundError."""
        from botocore.exceptions import (
            IncompleteReadError,
            ReadTimeoutError,
            ResponseStreamingError,
        )

        for attempt in range(1, _S3_ATTEMPTS + 1):
            with _s3_errors(self._uri(path)):
                try:
                    response = self.client.get_object(Bucket=self.bucket, Key=self._key(path))
                    return response["Body"].read()
                # botocore repeats a request that was refused, not one whose answer breaks off.
                except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
                    if attempt == _S3_ATTEMPTS:
                        raise
        raise AssertionError("unreachable")

    def write_bytes(self, path: str, content: bytes) -> None:
        """Writes the whole file; S3 shows an object only when it is complete."""
        with _s3_errors(self._uri(path)):
            self.client.put_object(Bucket=self.bucket, Key=self._key(path), Body=content)

    def upload(self, source: Path, path: str) -> None:
        """Copies one local file to `path` atomically."""
        with _s3_errors(self._uri(path)):
            self.client.upload_file(str(source), self.bucket, self._key(path))

    def download(self, path: str, target: Path) -> None:
        """Copies one file to the local `target`; raises FileNotFoundError."""
        with _local_errors(target), _s3_errors(self._uri(path)):
            _make_folder(target.parent)
            self.client.download_file(self.bucket, self._key(path), str(target))

    def list(self, prefix: str = "") -> list[str]:
        """Returns the sorted paths of all files below the folder `prefix`."""
        start = len(self.prefix) + 1 if self.prefix else 0
        pages = self._pages(self._key(prefix))
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        # A key that ends with a slash is a "folder" that another program made.
        return sorted(checked_path(key[start:], self.uri) for key in keys if key[-1] != "/")

    def entries(self) -> Iterator[str]:
        """Yields the names of the files and folders that lie right in it, in no order."""
        folder = f"{self.prefix}/" if self.prefix else ""
        for page in self._pages(self.prefix, Delimiter="/"):
            keys = [entry["Key"] for entry in page.get("Contents", [])]
            keys += [entry["Prefix"] for entry in page.get("CommonPrefixes", [])]
            yield from (key[len(folder) :].rstrip("/") for key in keys if key != folder)

    def exists(self, path: str) -> bool:
        """Says whether the file is there."""
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def size(self, path: str) -> int:
        """Returns the file's bytes; raises FileNotFoundError."""
        with _s3_errors(self._uri(path)):
            return self.client.head_object(Bucket=self.bucket, Key=self._key(path))["ContentLength"]

    def version(self, path: str) -> str:
        """Returns the object's ETag."""
        with _s3_errors(self._uri(path)):
            return self.client.head_object(Bucket=self.bucket, Key=self._key(path))["ETag"]

    def delete(self, prefix: str) -> None:
        """Deletes a file, or a folder with all it holds; nothing there is no error."""
        with _s3_errors(self._uri(prefix)):
            for path in [prefix, *self.list(prefix)]:
                self.client.delete_object(Bucket=self.bucket, Key=self._key(path))

    def _uri(self, path: str) -> str:
        return f"s3://{self.bucket}/{self._key(path)}"

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{path and checked_path(path, self.uri)}".strip("/")

    def _pages(self, folder: str, **options: Any) -> Iterator[ListObjectsV2OutputTypeDef]:
        """Yields S3's answers about what lies below the key `folder`."""
        paginate = self.client.get_paginator("list_objects_v2").paginate
        with _s3_errors(f"s3://{self.bucket}/{folder}"):
            yield from paginate(Bucket=self.bucket, Prefix=folder and f"{folder}/", **options)


_S3_RIGHTS = "give this identity s3:GetObject, PutObject, ListBucket and DeleteObject on it"
_S3_REMEDIES = {
    "NoSuchBucket": "create the bucket or correct its name",
    "AccessDenied": _S3_RIGHTS,
    "403": _S3_RIGHTS,
}


@contextmanager
def _s3_errors(uri: str) -> Iterator[None]:
    """Turns botocore's refusals into FileNotFoundError or one line for the user."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in ("NoSuchKey", "404", "NotFound"):
            raise FileNotFoundError(uri) from error
        remedy = _S3_REMEDIES.get(code, "check the bucket, the region and the credentials")
        raise StorageError(f"cannot use {excerpt(uri, 300)}: {excerpt(code)}; {remedy}") from error
    except UnicodeEncodeError as error:  # a lone surrogate
        raise StorageError(f"cannot use {excerpt(uri, 300)}: it is no name of an object") from error
    except (BotoCoreError, Boto3Error) as error:
        raise StorageError(
            f"cannot use {excerpt(uri, 300)}: {excerpt(error)}; set AWS credentials (environment,"
            " profile or instance role) and the region"
        ) from error


def read_table(storage: Storage, path: str, columns: list[str] | None = None) -> pa.Table:
    """Reads one Parquet file.

    Raises:
        FileNotFoundError: It is not there.
        StorageError: It is not Parquet, lacks a column, or has one of an extension type.
    """
    return parquet_table(storage.read_bytes(path), columns, join(storage.uri, path))


def write_table(storage: Storage, path: str, table: pa.Table) -> None:
    """Writes one Parquet file atomically."""
    import pyarrow as pa  # here, since encoders and training steps go without it
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    storage.write_bytes(path, sink.getvalue().to_pybytes())
