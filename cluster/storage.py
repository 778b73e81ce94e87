"""Files of a run, on a disk or on S3, behind one small interface.

Steps run on any node of a cluster, so nothing but a storage URI may tie them together. Every write
is atomic: a reader sees the whole file or none.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast
from urllib.parse import unquote, urlsplit

from cluster.errors import StorageError

if TYPE_CHECKING:
    import pyarrow as pa
    from mypy_boto3_s3 import S3Client


class Storage(Protocol):
    """A folder addressed by a URI; every `path` is relative to it and uses forward slashes."""

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

    def exists(self, path: str) -> bool:
        """Says whether the file is there."""

    def size(self, path: str) -> int:
        """Returns the file's bytes; raises FileNotFoundError."""

    def delete(self, prefix: str) -> None:
        """Deletes a file, or a folder with all it holds; nothing there is no error."""

    def version(self, path: str) -> str:
        """Returns a short text that changes with the file's content."""


def open_storage(uri: str | Path) -> Storage:
    """Opens the folder that `uri` names: a path, `file:///path` or `s3://bucket/prefix`.

    Raises:
        StorageError: The scheme is none of these, or an S3 URI names no bucket.
    """
    text = str(uri)
    parts = urlsplit(text)
    if parts.scheme and "@" in parts.netloc:  # not repeated: errors reach logs
        raise StorageError(
            "the storage URI holds credentials, which logs would show: leave them out, and give"
            " them to the machine by its environment or an instance profile"
        )
    if parts.scheme == "file" and parts.netloc not in ("", "localhost"):
        raise StorageError(f"storage {text!r}: write file:///{parts.netloc}{parts.path}, or a path")
    if parts.scheme in ("", "file"):
        return LocalStorage(Path(unquote(parts.path) if parts.scheme else text))
    if parts.scheme == "s3":
        if not parts.netloc:
            raise StorageError(f"storage {text!r} names no bucket: write s3://BUCKET/PREFIX")
        return S3Storage(parts.netloc, parts.path.strip("/"))
    raise StorageError(
        f"storage {text!r} has the scheme {parts.scheme!r}: accepted are a folder, file:// and s3://"
    )


def join(uri: str, *parts: str) -> str:
    """Returns the URI of a path below `uri`."""
    return "/".join([uri.rstrip("/"), *parts])


class LocalStorage:
    """A folder on a file system that every node sees (one machine, or a shared mount)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().absolute()
        self.uri = str(self.folder)

    def read_bytes(self, path: str) -> bytes:
        """Returns the whole file; raises FileNotFoundError."""
        with _local_errors(self.folder / path):
            return (self.folder / path).read_bytes()

    def write_bytes(self, path: str, content: bytes) -> None:
        """Writes the whole file atomically, making parent folders."""
        with _local_errors(self.folder / path), _replacing(self.folder / path) as unfinished:
            unfinished.write_bytes(content)

    def upload(self, source: Path, path: str) -> None:
        """Copies one local file to `path` atomically."""
        with _local_errors(self.folder / path), _replacing(self.folder / path) as unfinished:
            shutil.copyfile(source, unfinished)

    def download(self, path: str, target: Path) -> None:
        """Copies one file to the local `target`; raises FileNotFoundError."""
        with _local_errors(self.folder / path):
            _make_folder(target.parent)
            shutil.copyfile(self.folder / path, target)

    def list(self, prefix: str = "") -> list[str]:
        """Returns the sorted paths of all whole files below the folder `prefix`."""
        with _local_errors(self.folder / prefix):
            files = (self.folder / prefix).rglob("*")
            return sorted(
                file.relative_to(self.folder).as_posix()
                for file in files
                if file.is_file() and not file.name.endswith(".unfinished")
            )

    def exists(self, path: str) -> bool:
        """Says whether the file is there."""
        with _local_errors(self.folder / path):
            return (self.folder / path).is_file()

    def size(self, path: str) -> int:
        """Returns the file's bytes; raises FileNotFoundError."""
        with _local_errors(self.folder / path):
            return (self.folder / path).stat().st_size

    def version(self, path: str) -> str:
        """Returns the SHA-256 of the file's content."""
        with _local_errors(self.folder / path), (self.folder / path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def delete(self, prefix: str) -> None:
        """Deletes a file, or a folder with all it holds; nothing there is no error."""
        target = self.folder / prefix
        with _local_errors(self.folder / prefix):
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)


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


_LOCAL_MENDS = {
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


def _refusal(path: Path, error: OSError) -> StorageError:
    mend = _LOCAL_MENDS.get(
        error.errno or 0, "check that its owner and permissions let you read and write it"
    )
    return StorageError(f"cannot use {path}: {error.strerror}; {mend}")


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
                    found = self.client.get_object(Bucket=self.bucket, Key=self._key(path))
                    return found["Body"].read()
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
        target.parent.mkdir(parents=True, exist_ok=True)
        with _s3_errors(self._uri(path)):
            self.client.download_file(self.bucket, self._key(path), str(target))

    def list(self, prefix: str = "") -> list[str]:
        """Returns the sorted paths of all files below the folder `prefix`."""
        return sorted(path for path, _ in self._objects(prefix))

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
        return f"{self.prefix}/{path}".strip("/")

    def _objects(self, prefix: str) -> Iterator[tuple[str, int]]:
        folder = self._key(prefix)
        folder = f"{folder}/" if folder else ""
        start = len(self.prefix) + 1 if self.prefix else 0
        with _s3_errors(self._uri(prefix)):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=folder
            )
            for page in pages:
                for entry in page.get("Contents", []):
                    if not entry["Key"].endswith("/"):  # "folders" that other programs made
                        yield entry["Key"][start:], entry["Size"]


_S3_RIGHTS = "give this identity s3:GetObject, PutObject, ListBucket and DeleteObject on it"
_S3_MENDS = {
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
        mend = _S3_MENDS.get(code, "check the bucket, the region and the credentials")
        raise StorageError(f"cannot use {uri}: {code}; {mend}") from error
    except (BotoCoreError, Boto3Error) as error:
        raise StorageError(
            f"cannot use {uri}: {error}; set AWS credentials (environment, profile or instance"
            " role) and the region"
        ) from error


def read_table(storage: Storage, path: str, columns: list[str] | None = None) -> pa.Table:
    """Reads one Parquet file.

    Raises:
        FileNotFoundError: It is not there.
        StorageError: It is not Parquet, or lacks a column.
    """
    import pyarrow as pa  # here, since encoders and training steps go without it
    import pyarrow.parquet as pq

    try:
        return pq.read_table(pa.BufferReader(storage.read_bytes(path)), columns=columns)
    except (pa.ArrowInvalid, KeyError) as error:
        raise StorageError(
            f"{join(storage.uri, path)} is not a readable Parquet file with the columns"
            f" {columns or 'expected'}: {str(error).splitlines()[0]}"
        ) from error


def write_table(storage: Storage, path: str, table: pa.Table) -> int:
    """Writes one Parquet file atomically and returns its bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    storage.write_bytes(path, content)
    return len(content)
