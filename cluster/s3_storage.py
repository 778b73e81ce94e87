"""Files of a run in a bucket of S3, or of what speaks its protocol."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from cluster.errors import StorageError, excerpt
from cluster.files import DescribedWriter, StoredFile, checked_path
from cluster.local_storage import local_errors, make_folder

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import (
        GetObjectOutputTypeDef,
        HeadObjectOutputTypeDef,
        ListObjectsV2OutputTypeDef,
    )

_S3_ATTEMPTS = 8
_TAIL_BYTES = 1 << 16  # holds the footer of most Parquet files, and the whole of a small file
_CHUNK_BYTES = 1 << 20  # of an answer; so much at most is asked for twice
_PART_BYTES = 16 << 20  # of an upload; S3 takes ten thousand parts
_DELETED_AT_ONCE = 1000  # keys in a request; S3 takes no more
_CONFLICTS = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")


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
        return self._get(path)[1]

    def write_bytes(self, path: str, content: bytes) -> None:
        """Writes the whole file; S3 shows an object only when it is complete."""
        with _s3_errors(self._uri(path)):
            self.client.put_object(Bucket=self.bucket, Key=self._key(path), Body=content)

    def read_with_age(self, path: str) -> tuple[bytes, str, float]:
        """Returns the whole file, its version and, by the clock of S3, its age in seconds.

        Raises:
            FileNotFoundError: It is not there.
        """
        answer, content = self._get(path)
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return content, answer["ETag"], (now - answer["LastModified"]).total_seconds()

    def write_if(self, path: str, content: bytes, version: str | None) -> str | None:
        """Writes the whole file if it is still of this version, or not there where that is None.

        Returns:
            The new version, or None where somebody else's file lies there, or none any more.
        """
        from botocore.exceptions import ClientError

        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        with _s3_errors(self._uri(path)):
            try:
                answer = self.client.put_object(
                    Bucket=self.bucket, Key=self._key(path), Body=content, **cast(Any, condition)
                )
                return answer["ETag"]
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") not in (*_CONFLICTS, *_MISSING):
                    raise
        with suppress(FileNotFoundError):  # botocore repeats a request whose answer was lost
            there, found = self._get(path)
            return there["ETag"] if found == content else None
        return None

    def open(self, path: str, version: str | None = None) -> BinaryIO:
        """Opens a file to be read by ranges of one version; raises FileNotFoundError.

        Raises:
            StorageError: It is not the version that is asked for.
        """
        return cast(BinaryIO, _RangeReader(self, path, version))

    @contextmanager
    def writing(self, path: str) -> Iterator[DescribedWriter]:
        """Gives a file to write to, which is at `path` once the block has ended well."""
        upload = _Upload(self, path)
        try:
            yield DescribedWriter(path, upload)
            upload.finish()
        except BaseException:
            upload.abort()
            raise

    def upload(self, source: Path, path: str) -> None:
        """Copies one local file to `path` atomically."""
        with _s3_errors(self._uri(path)):
            self.client.upload_file(str(source), self.bucket, self._key(path))

    def download(self, path: str, target: Path) -> None:
        """Copies one file to the local `target`; raises FileNotFoundError."""
        with local_errors(target), _s3_errors(self._uri(path)):
            make_folder(target.parent)
            self.client.download_file(self.bucket, self._key(path), str(target))

    def list(self, prefix: str = "") -> list[str]:
        """Returns the sorted paths of all files below the folder `prefix`."""
        return sorted(file.path for file in self.scan(prefix))

    def scan(self, prefix: str = "") -> Iterator[StoredFile]:
        """Yields all files below the folder `prefix`; a request tells of a thousand of them."""
        start = len(self.prefix) + 1 if self.prefix else 0
        for page in self._pages(self._key(prefix)):
            for entry in page.get("Contents", []):
                key = entry["Key"]
                if key[-1] != "/":  # which would be a "folder" that another program made
                    path = checked_path(key[start:], self.uri)
                    yield StoredFile(path=path, num_bytes=entry["Size"], version=entry["ETag"])

    def entries(self) -> Iterator[str]:
        """Yields the names of the files and folders that lie right in it, in no order."""
        folder = f"{self.prefix}/" if self.prefix else ""
        for page in self._pages(self.prefix, Delimiter="/"):
            keys = [entry["Key"] for entry in page.get("Contents", [])]
            keys += [entry["Prefix"] for entry in page.get("CommonPrefixes", [])]
            yield from (key[len(folder) :].rstrip("/") for key in keys if key != folder)

    def exists(self, path: str) -> bool:
        """Says whether the file is there."""
        return self.find(path) is not None

    def find(self, path: str) -> StoredFile | None:
        """Returns the file as a listing shows it, or None."""
        try:
            answer = self._head(path)
        except FileNotFoundError:
            return None
        return StoredFile(path=path, num_bytes=answer["ContentLength"], version=answer["ETag"])

    def size(self, path: str) -> int:
        """Returns the file's bytes; raises FileNotFoundError."""
        return self._head(path)["ContentLength"]

    def version(self, path: str) -> str:
        """Returns the object's ETag."""
        return self._head(path)["ETag"]

    def delete(self, prefix: str) -> None:
        """Deletes a file, or a folder with all it holds; nothing there is no error."""
        paths = iter([prefix, *(file.path for file in self.scan(prefix))])
        while some := list(islice(paths, _DELETED_AT_ONCE)):
            keys: Any = {"Objects": [{"Key": self._key(path)} for path in some], "Quiet": True}
            with _s3_errors(self._uri(prefix)):
                answer = self.client.delete_objects(Bucket=self.bucket, Delete=keys)
            for failed in answer.get("Errors", []):
                raise _refused(f"s3://{self.bucket}/{failed.get('Key')}", str(failed.get("Code")))

    def _head(self, path: str) -> HeadObjectOutputTypeDef:
        with _s3_errors(self._uri(path)):
            return self.client.head_object(Bucket=self.bucket, Key=self._key(path))

    def _get(
        self, path: str, part: str | None = None, version: str | None = None
    ) -> tuple[GetObjectOutputTypeDef, bytes]:
        """Reads an object or a range of it; returns what S3 says of it, and the content.

        botocore repeats a request that was refused, not one whose answer breaks off: what is
        missing then is asked for, of the same version.
        """
        from botocore.exceptions import (
            IncompleteReadError,
            ReadTimeoutError,
            ResponseStreamingError,
        )

        content, failures = io.BytesIO(), 0
        first: GetObjectOutputTypeDef | None = None
        while True:
            options = {"Range": part, "IfMatch": version}
            given = cast(Any, {name: value for name, value in options.items() if value})
            with _s3_errors(self._uri(path)):
                answer = self.client.get_object(Bucket=self.bucket, Key=self._key(path), **given)
                first, version = first or answer, answer["ETag"]
                start, stop = _extent(answer)
                begin = start - _extent(first)[0]
                content.seek(begin)
                try:
                    for chunk in answer["Body"].iter_chunks(_CHUNK_BYTES):
                        content.write(chunk)
                except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
                    failures = 1 if content.tell() > begin else failures + 1
                    if failures == _S3_ATTEMPTS:
                        raise
                start += content.tell() - begin
                if start >= stop:
                    return first, content.getvalue()
                part = f"bytes={start}-{stop - 1}"

    def _uri(self, path: str) -> str:
        return f"s3://{self.bucket}/{self._key(path)}"

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{path and checked_path(path, self.uri)}".strip("/")

    def _pages(self, folder: str, **options: Any) -> Iterator[ListObjectsV2OutputTypeDef]:
        """Yields S3's answers about what lies below the key `folder`."""
        paginate = self.client.get_paginator("list_objects_v2").paginate
        with _s3_errors(f"s3://{self.bucket}/{folder}"):
            yield from paginate(Bucket=self.bucket, Prefix=folder and f"{folder}/", **options)


class _RangeReader(io.RawIOBase):
    """An object as a file: its end is read at once, all else by range when it is asked for."""

    def __init__(self, storage: S3Storage, path: str, version: str | None) -> None:
        self._storage, self._path, self._position = storage, path, 0
        try:
            answer, self._tail = storage._get(path, f"bytes=-{_TAIL_BYTES}", version)
            self._etag = answer["ETag"]
            size = answer.get("ContentRange", "").rpartition("/")[2]
            self._size = int(size or len(self._tail))  # the whole, where ranges are not known
        except _EmptyRange:
            self._tail, self._etag, self._size = b"", "", 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(start + offset, 0)
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def readall(self) -> bytes:
        return self.read(max(self._size - self._position, 0))

    def read(self, size: int | None = -1, /) -> bytes:
        """Reads all that is asked for in one request; none, if it lies at the end."""
        if size is None or size < 0:
            return self.readall()
        start, stop = self._position, min(self._position + size, self._size)
        if start >= stop:
            return b""
        tail = self._size - len(self._tail)
        if start >= tail:
            content = self._tail[start - tail : stop - tail]
        else:
            _, content = self._storage._get(self._path, f"bytes={start}-{stop - 1}", self._etag)
        self._position += len(content)
        return content


class _Upload:
    """An object on its way: one request if it is small, else one for each part."""

    def __init__(self, storage: S3Storage, path: str) -> None:
        self._storage, self._uri = storage, storage._uri(path)
        self._bucket, self._key = storage.bucket, storage._key(path)
        self._waiting = bytearray()
        self._id: str | None = None  # of an upload in parts
        self._parts: list[Any] = []

    def write(self, content: memoryview) -> None:
        """Takes some of the bytes; sends those that fill a part."""
        self._waiting += content
        while len(self._waiting) > _PART_BYTES:
            self._send(bytes(self._waiting[:_PART_BYTES]))
            del self._waiting[:_PART_BYTES]

    def finish(self) -> None:
        """Sends the rest, and lets the object be seen."""
        rest, client = bytes(self._waiting), self._storage.client
        with _s3_errors(self._uri):
            if self._id is None:
                client.put_object(Bucket=self._bucket, Key=self._key, Body=rest)
                return
        self._send(rest)
        with _s3_errors(self._uri):
            client.complete_multipart_upload(
                Bucket=self._bucket,
                Key=self._key,
                UploadId=self._id,
                MultipartUpload={"Parts": self._parts},
            )

    def abort(self) -> None:
        """Takes back what was sent."""
        if self._id is not None:
            with suppress(Exception):  # the error that led here is the one to be told
                self._storage.client.abort_multipart_upload(
                    Bucket=self._bucket, Key=self._key, UploadId=self._id
                )

    def _send(self, part: bytes) -> None:
        client, number = self._storage.client, len(self._parts) + 1
        with _s3_errors(self._uri):
            if self._id is None:
                begun = client.create_multipart_upload(Bucket=self._bucket, Key=self._key)
                self._id = begun["UploadId"]
            sent = client.upload_part(
                Bucket=self._bucket,
                Key=self._key,
                UploadId=self._id,
                PartNumber=number,
                Body=part,
            )
        checksums = {
            key: value
            for key, value in sent.items()
            if key.startswith("Checksum") and key != "ChecksumType"
        }
        self._parts.append({"ETag": sent["ETag"], "PartNumber": number, **checksums})


def _extent(answer: GetObjectOutputTypeDef) -> tuple[int, int]:
    """Returns where the bytes of an answer begin and end in the object."""
    extent = answer.get("ContentRange", "").removeprefix("bytes ").partition("/")[0]
    start = int(extent.partition("-")[0] or 0)  # the whole, where ranges are not known
    return start, start + answer["ContentLength"]


class _EmptyRange(StorageError):
    """There is nothing in an empty object to be read by range."""


_MISSING = ("NoSuchKey", "404", "NotFound")
_S3_RIGHTS = "give this identity s3:GetObject, PutObject, ListBucket and DeleteObject on it"
_S3_REMEDIES = {
    "NoSuchBucket": "create the bucket or correct its name",
    "AccessDenied": _S3_RIGHTS,
    "403": _S3_RIGHTS,
    "PreconditionFailed": "it was written anew while it was read: try again",
}


def _refused(uri: str, code: str) -> StorageError:
    remedy = _S3_REMEDIES.get(code, "check the bucket, the region and the credentials")
    return StorageError(f"cannot use {excerpt(uri, 300)}: {excerpt(code)}; {remedy}")


@contextmanager
def _s3_errors(uri: str) -> Iterator[None]:
    """Turns botocore's refusals into FileNotFoundError or one line for the user."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in _MISSING:
            raise FileNotFoundError(uri) from error
        if code == "InvalidRange":
            raise _EmptyRange(uri) from error
        raise _refused(uri, code) from error
    except UnicodeEncodeError as error:  # a lone surrogate
        raise StorageError(f"cannot use {excerpt(uri, 300)}: it is no name of an object") from error
    except (BotoCoreError, Boto3Error) as error:
        raise StorageError(
            f"cannot use {excerpt(uri, 300)}: {excerpt(error)}; set AWS credentials (environment,"
            " profile or instance role) and the region"
        ) from error
