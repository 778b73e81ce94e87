"""Files of a corpus become parts: what is cut from them, in order, before it is deduplicated.

A Ray task reads a unit of the corpus, and writes parts of a bounded size, so that nothing is too
large for its memory. A row group of a part becomes a shard of the step `passages`.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from cluster.errors import excerpt
from cluster.files import FileEntry
from cluster.row_files import utf8_name
from pipelines.corpus.cutting import Passage, fit_passages
from pipelines.records import PASSAGE

if TYPE_CHECKING:
    from cluster.artifacts import Json
    from cluster.errors import Reject
    from cluster.storage import Storage
    from pipelines.datasets.corpus import Corpus
    from pipelines.datasets.documents import Document

# A row is a passage or, where it has a reason, a reject: `source` and `text` say which.
PART = PASSAGE.append(pa.field("reason", pa.string()))

_MAX_NAMES = 100  # that it tells of fields, and of kinds of records
_MAX_PART_ROWS = 1 << 17
_MAX_PART_BYTES = 64 << 20
_SHARD_PASSAGES = 1024
_MAX_SHARD_PASSAGES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part, the `number`-th of a corpus.

    Attributes:
        number: In the order of the corpus.
        path: Where it lies among the parts.
        num_groups: Its row groups.
        first_shard: The number of the shard that its first row group becomes.
    """

    number: int
    path: str
    num_groups: int
    first_shard: int


def passages_per_shard(num_bytes: int) -> int:
    """Returns the most passages of a shard, by the bytes of the corpus: more of a large one.

    So that small corpora have shards for every actor, and large ones no millions of them.
    """
    return min(max(_SHARD_PASSAGES, 1 << (num_bytes >> 20).bit_length()), _MAX_SHARD_PASSAGES)


def read_files(
    corpus: Corpus,
    number: int,
    target: Storage,
    passages_per_shard: int,
    num_cores: int,
    sample: int | None = None,
) -> tuple[list[FileEntry], Json]:
    """Reads the files of a corpus and writes what is cut from them as parts; a Ray task.

    Args:
        corpus: Some files of one, or a span of a file.
        number: Of the task.
        target: Gets the parts.
        passages_per_shard: The most of a row group.
        num_cores: For the main text of pages.
        sample: Cuts documents that are drawn by a hash, until they have so many passages.

    Returns:
        The parts, at least one, and what was counted.
    """
    counted: dict[str, Any] = {"num_documents": 0, "num_passages": 0, "num_rejects": 0}
    groups = _row_groups(_rows(corpus, num_cores, sample, counted), passages_per_shard)
    files, num_groups = [], []
    for file, num in _write_parts(groups, number, target):
        files.append(file)
        num_groups.append(num)
    return files, counted | {
        "groups": num_groups,
        "field_names": corpus.first_names(_MAX_NAMES),
        "records_passed_over": _most_common(corpus.records_passed_over),
    }


def part_path(task: int, number: int) -> str:
    """Returns where the `number`-th part lies that a task wrote."""
    return f"shards/{task:09d}-{number:06d}.parquet"


def drawn(documents: Iterable[Document | Reject], num: int) -> list[Document | Reject]:
    """Returns some documents, drawn by a hash of their names, so that more contain the fewer."""

    def draw(document: Document | Reject) -> bytes:
        name = document[0] if isinstance(document, tuple) else document.name
        return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()

    return heapq.nsmallest(num, documents, key=draw)


def cut_documents(
    documents: Iterable[Document | Reject], corpus: Corpus, sample: int | None = None
) -> Iterator[list[Passage | Reject]]:
    """Yields what each document gives; with `sample` those that are drawn, until it is full.

    Copies do not fill it.
    """
    config, ids = corpus.config, set[str]()
    for document in drawn(documents, sample) if sample else documents:
        if isinstance(document, tuple):
            yield [document]
            continue
        cut = list(fit_passages(document, max_words=config.max_words, min_words=config.min_words))
        if sample is None:
            yield cut
            continue
        for number, each in enumerate(cut):
            if isinstance(each, Passage):
                ids.add(each.id)
            if len(ids) == sample:
                yield cut[: number + 1]
                return
        yield cut


def _rows(
    corpus: Corpus, num_cores: int, sample: int | None, counted: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    for cut in cut_documents(corpus.read(num_cores), corpus, sample):
        counted["num_documents"] += 1
        for each in cut:
            if isinstance(each, Passage):
                counted["num_passages"] += 1
                names = {"source": utf8_name(each.source), "url": each.url and utf8_name(each.url)}
                yield vars(each) | names | {"reason": None}
            else:
                counted["num_rejects"] += 1
                source, reason, text = map(utf8_name, each)
                counted.setdefault("first_reason", reason)
                yield {"source": source, "reason": reason, "text": text}


def _most_common(kinds: Counter[str]) -> dict[str, int]:
    """Returns counts of some kinds, which anybody may have named, and of all others together."""
    told = Counter({excerpt(kind, 100): num for kind, num in kinds.most_common(_MAX_NAMES)})
    if others := kinds.total() - told.total():
        told["others"] += others
    return dict(told)


def _row_groups(rows: Iterable[dict[str, Any]], passages_per_shard: int) -> Iterator[pa.Table]:
    """Yields the rows in tables that hold at most so many passages, and some MiB."""
    group: list[dict[str, Any]] = []
    num_passages = num_bytes = 0
    for row in rows:
        group.append(row)
        num_passages += row["reason"] is None
        num_bytes += sum(len(row.get(name) or "") for name in ("text", "title", "source", "url"))
        if (
            num_passages == passages_per_shard
            or len(group) >= 2 * passages_per_shard
            or num_bytes >= _MAX_PART_BYTES
        ):
            yield pa.Table.from_pylist(group, schema=PART)
            group, num_passages, num_bytes = [], 0, 0
    if group:
        yield pa.Table.from_pylist(group, schema=PART)


def _write_parts(
    groups: Iterator[pa.Table], task: int, target: Storage
) -> Iterator[tuple[FileEntry, int]]:
    """Yields each part that was written, at least one, and the number of its row groups."""
    import pyarrow.parquet as pq

    number, group = 0, next(groups, None)
    while group is not None or not number:
        num_rows = num_bytes = num_groups = 0
        with (
            target.writing(part_path(task, number)) as file,
            pq.ParquetWriter(file, PART, compression="zstd") as writer,
        ):
            while group is not None and num_rows < _MAX_PART_ROWS and num_bytes < _MAX_PART_BYTES:
                writer.write_table(group, row_group_size=group.num_rows)
                num_rows += group.num_rows
                num_bytes += group.nbytes
                num_groups += 1
                group = next(groups, None)
        yield file.entry(num_rows), num_groups
        number += 1
