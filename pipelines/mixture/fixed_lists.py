"""FRet's queries as lists of passages that keep the vectors they have, and batches of such lists.

Tasks write the lists; an exchange by the passages' ids brings each list's vectors; another takes
lists and vectors to the batches. No process holds more than a source or a partition.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.artifacts import Artifact, unfinished_artifact
from cluster.errors import ArtifactError, UserError
from cluster.exchange import PARTITION, Exchange, Shared, run_exchange, run_tasks
from cluster.file_list import shard_path
from cluster.files import FileEntry
from cluster.key_filter import KeyFilter, codes
from cluster.shard_groups import ShardGroup, shard_groups
from cluster.steps import StepContext
from cluster.storage import Storage, write_table
from pipelines.fret.labelling import num_partitions
from pipelines.mixture.formats import Format
from pipelines.mixture.stored_rows import WriteBatches, groups_with, with_keys, write_rows
from pipelines.records import EMBEDDING, FIXED_EXAMPLE

if TYPE_CHECKING:
    from actors.encoder_templates import PromptTemplates

LISTS_PER_SHARD = 1024  # of 30 vectors of 768 dimensions: 50 MB
LISTS_PER_GROUP = 16  # of a shard's rows: the fewest that a training worker decodes
FIRST_BESIDE = 1 << 30  # the place in a batch of the first passage beside its lists
LISTS, VECTORS, BESIDE = "lists", "vectors", "beside"
Source = tuple[str, ShardGroup]  # what it holds, and where

_VECTORS_PER_SHARD = 32768
_OF_FRET = [
    *("id", "task", "query", "dropped_by"),
    *("candidate_ids", "fused", "positive_id", "negative_ids"),
]
_LIST = pa.schema(
    [
        ("task", pa.string()),
        ("text", pa.string()),
        ("query_id", pa.string()),
        ("ids", pa.list_(pa.string())),  # of the passages, the positive first
        ("teacher_scores", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True, kw_only=True)
class StoredLists:
    """Lists on the storage.

    Attributes:
        rows: One for each, without vectors.
        num_vectors: That all of them name.
    """

    rows: Artifact
    num_vectors: int


def lists_of(fret: pa.Table, only_tasks: tuple[str, ...], templates: PromptTemplates) -> pa.Table:
    """Returns the lists of the kept queries of some rows of FRet; of all tasks if none is named."""
    rows = []
    for row in fret.filter(pc.is_null(fret["dropped_by"])).to_pylist():
        if only_tasks and row["task"] not in only_tasks:
            continue
        fused = dict(zip(row["candidate_ids"], row["fused"], strict=False))
        ids = [row["positive_id"], *row["negative_ids"]]
        rows.append(
            {
                "task": row["task"],
                "text": templates.format_query(row["query"], task=row["task"]),
                "query_id": row["id"],
                "ids": ids,
                "teacher_scores": [fused[id_] for id_ in ids],
            }
        )
    return pa.Table.from_pylist(rows, schema=_LIST)


def write_lists(
    fret: Artifact, only_tasks: tuple[str, ...], format_: Format, context: StepContext
) -> StoredLists:
    """Has tasks write the lists of all kept queries; `context` is that of this part of the work."""
    tasks = [(group, only_tasks, format_, context.storage) for group in shard_groups(fret)]
    rows, told = write_rows(_write_lists, tasks, context)
    return StoredLists(rows=rows, num_vectors=sum(told))


def find_vectors(
    lists: StoredLists,
    needed: np.ndarray,
    times: int,
    embeddings: Artifact,
    dimensions: int,
    context: StepContext,
) -> Artifact:
    """Brings the vectors of some lists.

    Args:
        lists: As `write_lists` wrote them.
        needed: The sorted numbers of some of them.
        times: How often each will stand in a batch, so that a shard is the smaller.
        embeddings: Has the vectors.
        dimensions: That they must have.
        context: Of this part of the work.

    Returns:
        Rows of a list's number, a vector's place in it, and the vector, float16.

    Raises:
        UserError: The vectors have other dimensions.
        ArtifactError: A passage has no vector.
    """
    rows, groups = Shared.of(needed), groups_with(needed, shard_groups(lists.rows))
    asking = ((group, rows) for group in groups)
    wanted = KeyFilter.of(lists.num_vectors, run_tasks(_wanted_codes, asking))
    num_rows = lists.num_vectors + round(wanted.share * embeddings.num_rows)
    find = FindVectors(
        num_partitions=num_partitions(num_rows, max(1, _VECTORS_PER_SHARD // times)),
        dimensions=dimensions,
        rows=rows,
        wanted=Shared.of(wanted),
    )
    sources = [(LISTS, group) for group in groups]
    sources += [(VECTORS, group) for group in shard_groups(embeddings)]
    run_exchange(find, sources, context)
    return unfinished_artifact(context.storage, context.log.files())


@dataclass(frozen=True, kw_only=True)
class FindVectors(Exchange):
    """Lists meet the vectors of their passages.

    Attributes:
        dimensions: Of a vector.
        rows: The sorted numbers of the lists that are needed.
        wanted: A `KeyFilter` of their passages, so that most other vectors do not travel.
    """

    order: tuple[str, ...] = ("passage_id",)
    dimensions: int
    rows: Shared
    wanted: Shared

    def split(self, source: Source) -> pa.Table:
        """Returns which vectors lists ask for; or vectors."""
        kind, group = source
        table = self._asked(group) if kind == LISTS else self._known(group)
        places = codes(table["passage_id"].to_pylist()) % self.num_partitions
        return table.append_column(PARTITION, pa.array(places, pa.int64()))

    def merge(self, rows: pa.Table) -> tuple[pa.Table, dict[str, int]]:
        """Returns the vectors that are asked for, with the lists' numbers and the places there.

        Raises:
            ArtifactError: A passage has no vector.
        """
        is_asked = pc.is_valid(rows["row"])
        asked, known = rows.filter(is_asked), rows.filter(pc.invert(is_asked))
        places = pc.index_in(asked["passage_id"], value_set=known["passage_id"].combine_chunks())
        if places.null_count:
            id_ = asked["passage_id"].filter(pc.is_null(places))[0].as_py()
            raise ArtifactError(
                f"passage {id_} of the lists is not among the embeddings: make both anew"
            )
        table = asked.select(["row", "slot"]).append_column("vector", known["vector"].take(places))
        return table, {"num_vectors": table.num_rows}

    def _asked(self, group: ShardGroup) -> pa.Table:
        numbers, lists = _needed(group, self.rows.get())
        ids = lists["ids"].combine_chunks()
        sizes = ids.value_lengths().to_numpy()
        ends = np.cumsum(sizes)
        columns = {
            "passage_id": ids.flatten(),
            "row": np.repeat(numbers, sizes),
            "slot": (np.arange(sizes.sum()) - np.repeat(ends - sizes, sizes)).astype(np.int32),
            "vector": pa.nulls(int(sizes.sum()), pa.binary(2 * self.dimensions)),
        }
        return pa.table(columns)

    def _known(self, group: ShardGroup) -> pa.Table:
        table = group.read(EMBEDDING.names)
        found = len(table["embedding"][0]) if table.num_rows else self.dimensions
        if found != self.dimensions:
            raise UserError(
                f"mixture.fixed_passages: the retriever's vectors have {found} dimensions and the"
                f" student's {self.dimensions}: name a student of as many"
            )
        is_wanted = self.wanted.get().passes(codes(table["id"].to_pylist()))
        table = table.filter(pa.array(is_wanted, pa.bool_()))
        columns = {
            "passage_id": table["id"],
            "row": pa.nulls(table.num_rows, pa.int64()),
            "slot": pa.nulls(table.num_rows, pa.int32()),
            "vector": float16_column(table["embedding"], self.dimensions),
        }
        return pa.table(columns)


@dataclass(frozen=True, kw_only=True)
class WriteLists(WriteBatches):
    """Lists, their vectors and the passages beside them meet in their batches.

    Attributes:
        dimensions: Of a vector.
        format_: Tokenises; None: tokens are not asked for.
        beside: The `Places` of the passages beside the lists; None: there are none.
    """

    order: tuple[str, ...] = ("batch", "place", "slot")
    rows_per_group: int | None = LISTS_PER_GROUP
    schema: pa.Schema = FIXED_EXAMPLE
    dimensions: int
    format_: Format | None
    beside: Shared | None = None

    def split(self, source: Source) -> pa.Table:
        """Returns what a source has for batches, at its places there."""
        kind, group = source
        if kind == VECTORS:
            return self._filled(self._vectors(group))
        if kind == LISTS:
            return self._filled(self.placed(group, self.places.get(), self._lists))
        assert self.beside is not None
        return self._filled(self.placed(group, self.beside.get(), self._passages))

    def merge(self, rows: pa.Table) -> tuple[pa.Table, dict[str, int]]:
        """Returns lists with all their vectors, and passages with theirs."""
        is_head = pc.equal(rows["slot"], _HEAD)
        of_head = np.cumsum(is_head.to_numpy()) - 1
        has_vector = pc.is_valid(rows["vector"])
        heads, vectors = rows.filter(is_head), rows["vector"].filter(has_vector)
        counts = np.bincount(of_head[has_vector.to_numpy()], minlength=heads.num_rows)
        ends = np.cumsum([0, *counts]) * 2 * self.dimensions
        content = b"".join(vectors.to_pylist())
        lists = [content[start:end] for start, end in pairwise(ends)]
        heads = heads.append_column("vectors", pa.array(lists, pa.binary()))
        return super().merge(heads)

    def _filled(self, table: pa.Table) -> pa.Table:
        """Returns a table with all columns of rows at their places, null where it lacks them."""
        if "slot" not in table.schema.names:
            table = table.append_column("slot", pa.array([_HEAD] * table.num_rows, pa.int32()))
        columns = {
            field.name: table[field.name].cast(field.type)
            if field.name in table.schema.names
            else pa.nulls(table.num_rows, field.type)
            for field in (*_PLACED, pa.field("vector", pa.binary(2 * self.dimensions)))
        }
        return pa.table(columns)

    def _lists(self, lists: pa.Table) -> pa.Table:
        tokens: Any = pa.nulls(lists.num_rows, _PLACED.field("tokens").type)
        if self.format_:
            tokens = _tokens(self.format_, lists["text"], self.format_.max_query_tokens)
        columns = {name: lists[name] for name in ("text", "query_id", "teacher_scores")}
        return pa.table(columns | {"dataset": ["fret"] * lists.num_rows, "tokens": tokens})

    def _passages(self, passages: pa.Table) -> pa.Table:
        assert self.format_ is not None
        columns = {
            "dataset": ["passages"] * passages.num_rows,
            "text": passages["text"],
            "tokens": _tokens(self.format_, passages["text"], self.format_.max_passage_tokens),
            "teacher_scores": pa.array([[]] * passages.num_rows, pa.list_(pa.float32())),
            "vector": passages["vector"],
        }
        return pa.table(columns)

    def _vectors(self, group: ShardGroup) -> pa.Table:
        table, places = group.read(), self.places.get()
        rows = table["row"].to_numpy()
        start, stop = (np.searchsorted(places.rows, rows, side) for side in ("left", "right"))
        counts = stop - start
        which = np.repeat(np.arange(len(rows)), counts)
        # The places of a list lie side by side: as many from its first on as it has.
        own = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts - start, counts)
        return self.at(table.select(["slot", "vector"]).take(pa.array(which)), places.take(own))


_HEAD = -1  # the slot of the row that has a list's query, or a passage
_PLACED = pa.schema(
    [
        *((name, pa.int32()) for name in ("batch", "place", "slot")),
        ("row", pa.int64()),
        *(field for field in FIXED_EXAMPLE if field.name not in ("batch", "vectors")),
        (PARTITION, pa.int64()),
    ]
)


def float16_column(vectors: pa.ChunkedArray, dimensions: int) -> pa.Array:
    """Turns a list column of vectors into one of the bytes of each as float16."""
    flat = np.asarray(vectors.combine_chunks().flatten()).astype(np.float16)
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(2 * dimensions), len(vectors), [None, pa.py_buffer(flat.tobytes())]
    )


def _write_lists(
    group: ShardGroup, only_tasks: tuple[str, ...], format_: Format, storage: Storage
) -> tuple[list[FileEntry], int]:
    templates, written, num_vectors = format_.load().encoder.templates, [], 0
    for number, table in enumerate(group.tables(_OF_FRET), group.number):
        lists = lists_of(table, only_tasks, templates)
        lists = with_keys(
            lists,
            tasks=lists["task"].to_pylist(),
            queries=lists["query_id"].to_pylist(),
            positives=[ids[0] for ids in lists["ids"].to_pylist()],
            symmetric=False,
        )
        num_vectors += pc.sum(pc.list_value_length(lists["ids"])).as_py() or 0
        written.append(write_table(storage, shard_path(number), lists))
    return written, num_vectors


def _wanted_codes(group: ShardGroup, rows: Shared) -> np.ndarray:
    _, lists = _needed(group, rows.get())
    return np.unique(codes(lists["ids"].combine_chunks().flatten().to_pylist()))


def _needed(group: ShardGroup, rows: np.ndarray) -> tuple[np.ndarray, pa.Table]:
    """Returns those of a group's lists that are among some rows, and their numbers."""
    start, stop = np.searchsorted(rows, [group.first_row, group.first_row + group.num_rows])
    numbers = rows[start:stop]
    return numbers, group.read(["ids"]).take(pa.array(numbers - group.first_row))


def _tokens(format_: Format, texts: pa.ChunkedArray, max_tokens: int) -> pa.Array:
    tokens = format_.load().encoder.tokenize(texts.to_pylist(), max_tokens=max_tokens)
    return pa.array(tokens, pa.list_(pa.int32()))
