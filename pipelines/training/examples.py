"""Training examples as a stream of batches, from any batch on: a worker reads its own rows.

Of a shard, what all workers must know of every row is small: which batch it is of, and which texts
are the same. Tokens and vectors are read row group by row group, as far as they hold rows of the
worker's. In memory is a shard at most.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cluster.errors import UserError
from cluster.parquet import open_parquet, row_groups_table
from cluster.storage import Storage, join, open_storage, read_table
from pipelines.training.place import ALONE, Place

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a worker has read of a batch.

    Attributes:
        num_queries: Of the whole batch.
        num_texts: Of the whole batch.
        queries: Its own queries, among those that it has read.
        texts: Its own texts, among those that it has read.
    """

    num_queries: int
    num_texts: int
    queries: slice
    texts: slice


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The examples of one global batch, all of one data set; lists of equal length.

    Attributes:
        number: Its place in the training, from 0.
        dataset: The set's name.
        queries: Token ids of the formatted texts, an integer array each.
        positives: As `queries`.
        negatives: As `queries`, of each example's hard negatives.
        teacher_scores: The LLM's scores of the positive and the negatives; empty: there are none.
        query_ids: Equal for equal queries.
        positive_ids: Equal for equal positives.
        symmetric: Whether the set's targets are formatted like queries.
        lists: With fixed passages, of each query float32 ``[list, dimensions]``, unit length: the
            vectors of the passages that `teacher_scores` speaks of, the positive first. None: the
            passages are embedded.
        texts: As `queries`, of texts of any role that are to get the vectors of `embeddings`: all
            texts in embedding distillation, the anchored passages beside lists.
        embeddings: float32 ``[texts, dimensions]``, unit length; None: there is no such text.
        part: Which examples the columns above hold, but for the ids, where they do not hold all.
    """

    number: int
    dataset: str
    queries: list[np.ndarray]
    positives: list[np.ndarray]
    negatives: list[list[np.ndarray]]
    teacher_scores: list[list[float]]
    query_ids: list[str]
    positive_ids: list[str]
    symmetric: bool
    lists: list[np.ndarray] | None = None
    texts: list[np.ndarray] = field(default_factory=list)
    embeddings: np.ndarray | None = None
    part: Part | None = None

    @classmethod
    def of_texts(
        cls, number: int, dataset: str, texts: list[np.ndarray], embeddings: np.ndarray
    ) -> Batch:
        """Returns a batch of embedding distillation: token ids, and the vector of each text."""
        return cls(
            number=number,
            dataset=dataset,
            queries=[],
            positives=[],
            negatives=[],
            teacher_scores=[],
            query_ids=[],
            positive_ids=[],
            symmetric=False,
            texts=texts,
            embeddings=embeddings,
        )

    @property
    def num_examples(self) -> int:
        """Its queries or else, in embedding distillation, its texts."""
        whole = self.part
        return (
            whole.num_queries or whole.num_texts if whole else len(self.queries) or len(self.texts)
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of all its texts, without padding; of those not read, as many as of the others."""
        negatives = chain.from_iterable(self.negatives)
        of_queries = sum(map(len, chain(self.queries, self.positives, negatives)))
        of_texts = sum(map(len, self.texts))
        if self.part:
            of_queries = of_queries * self.part.num_queries // max(1, len(self.queries))
            of_texts = of_texts * self.part.num_texts // max(1, len(self.texts))
        return of_queries + of_texts


VALIDATION = "validation"


def count_batches(uri: str) -> int:
    """Returns how many batches the examples hold.

    Raises:
        UserError: There are none.
    """
    storage = open_storage(uri)
    last = _last_batch(storage, _shards(storage))
    if last < 0:
        raise UserError(f"training examples {uri} hold no row: the mixture step must come first")
    return last + 1


def own_rows(size: int, place: Place) -> slice:
    """Returns which of so many rows of a batch are a worker's: as many as another's, side by side.

    So they lie in few row groups.
    """
    each, more = divmod(size, place.world)
    start = place.rank * each + min(place.rank, more)
    return slice(start, start + each + (place.rank < more))


def iterate_batches(uri: str, start: int = 0, place: Place = ALONE) -> Iterator[Batch]:
    """Yields the batches from number `start` on, reading shard by shard, and none before it.

    Of each batch only the rows of the worker at this place are read.

    Raises:
        UserError: The rows are not in the order of batches.
    """
    storage = open_storage(uri)
    paths = _shards(storage)
    if start:
        places = range(len(paths))
        paths = paths[
            bisect_left(places, start, key=lambda place: _last_batch(storage, paths[: place + 1])) :
        ]
    number, pieces = start, list[_Piece]()
    for path in paths:
        shard = _Shard(storage, path)
        numbers = shard.known["batch"].to_numpy()
        ends = [0, *(np.flatnonzero(np.diff(numbers)) + 1), len(numbers)]
        for piece in (_Piece(shard, *span) for span in pairwise(ends) if len(numbers)):
            found = int(numbers[piece.start])
            if found < start:
                continue
            if pieces and found == number + 1:
                yield _read(number, pieces, place)
                number, pieces = found, []
            if found != number:
                raise UserError(f"training examples {uri}: rows of batch {number} are not together")
            pieces.append(piece)
    if pieces:
        yield _read(number, pieces, place)


def iterate_validation(uri: str) -> Iterator[Batch]:
    """Yields the batches that were held out; none where the mixture holds nothing out."""
    yield from iterate_batches(join(uri, VALIDATION))


def _last_batch(storage: Storage, paths: list[str]) -> int:
    """Returns the last batch of some shards, -1 if they have no row; few are opened."""
    for path in reversed(paths):
        numbers = read_table(storage, path, ["batch"])["batch"]
        if len(numbers):
            return int(numbers[-1].as_py())
    return -1


class _Kind(NamedTuple):
    """What the shards of a mixture hold.

    Attributes:
        known: Columns that are read of every row.
        own: Columns that are read of a worker's rows.
        make: Makes a batch of its number, the known columns of all its rows, and the other columns
            of the worker's queries and of its texts.
    """

    known: list[str]
    own: list[str]
    make: Callable[[int, pa.Table, pa.Table, pa.Table], Batch]


class _Shard:
    """An open shard: the known columns of all rows, and the others of any range of them."""

    def __init__(self, storage: Storage, path: str) -> None:
        self._place = join(storage.uri, path)
        self._file = open_parquet(storage.open(path), self._place)
        metadata = self._file.metadata
        sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self.kind = _kind(self._file.schema_arrow.names)
        self.known = self._groups(range(len(sizes)), self.kind.known)
        self._held: tuple[range, pa.Table] | None = None  # the last that was read

    def rows(self, start: int, stop: int) -> pa.Table:
        """Returns a range of rows."""
        if start == stop:
            return self._file.schema_arrow.empty_table().select(self.kind.own)
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right")
        groups = range(int(first), int(last) + 1)
        if self._held is None or self._held[0] != groups:
            self._held = groups, self._groups(groups, self.kind.own)
        before = int(self._ends[first - 1]) if first else 0
        return self._held[1].slice(start - before, stop - start)

    def _groups(self, groups: range, columns: list[str]) -> pa.Table:
        return row_groups_table(self._file, groups, columns, self._place)


class _Piece(NamedTuple):
    """Rows of one batch that lie in one shard: from one on, up to another."""

    shard: _Shard
    start: int
    stop: int


def _read(number: int, pieces: list[_Piece], place: Place) -> Batch:
    """Reads a worker's rows of a batch."""
    import pyarrow as pa  # imported here, since a training step does without it

    known = pa.concat_tables(
        piece.shard.known.slice(piece.start, piece.stop - piece.start) for piece in pieces
    )
    kind = pieces[0].shard.kind
    num_queries = 0 if kind is _TEXTS else known.num_rows
    if kind is _LISTS:
        num_queries -= known["query_id"].null_count  # the queries come first
    num_texts = known.num_rows - num_queries
    queries, texts = own_rows(num_queries, place), own_rows(num_texts, place)
    batch = kind.make(
        number,
        known,
        _rows_of(pieces, _at_least_one(queries, num_queries)),
        _rows_of(pieces, _at_least_one(texts, num_texts), first=num_queries),
    )
    if place.world == 1:
        return batch
    part = Part(
        num_queries=num_queries,
        num_texts=num_texts,
        queries=slice(0, queries.stop - queries.start),
        texts=slice(0, texts.stop - texts.start),
    )
    return replace(batch, part=part)


def _at_least_one(own: slice, size: int) -> slice:
    """Returns rows of a worker's to read; one where it has none, to know how long vectors are."""
    return own if own.stop > own.start else slice(0, min(1, size))


def _rows_of(pieces: list[_Piece], rows: slice, first: int = 0) -> pa.Table:
    """Returns a range of a batch's rows, which are counted from the first on."""
    import pyarrow as pa

    start, stop, tables = first + rows.start, first + rows.stop, []
    for piece in pieces:
        size = piece.stop - piece.start
        some = [piece.start + min(max(row, 0), size) for row in (start, stop)]
        tables.append(piece.shard.rows(*some))
        start, stop = start - size, stop - size
    return pa.concat_tables(tables)


def _batch(number: int, known: pa.Table, table: pa.Table, _: pa.Table) -> Batch:
    negatives = table["negative_tokens"].combine_chunks()
    return Batch(
        number=number,
        dataset=known["dataset"][0].as_py(),
        queries=_rows(table["query_tokens"].combine_chunks()),
        positives=_rows(table["positive_tokens"].combine_chunks()),
        negatives=_split(_rows(negatives.flatten()), negatives),
        teacher_scores=table["teacher_scores"].to_pylist(),
        query_ids=known["query_id"].to_pylist(),
        positive_ids=known["positive_id"].to_pylist(),
        symmetric=known["symmetric"][0].as_py(),
    )


def _batch_of_texts(number: int, known: pa.Table, _: pa.Table, table: pa.Table) -> Batch:
    texts = _rows(table["tokens"].combine_chunks())
    vectors = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(texts), -1)
    return Batch.of_texts(number, known["dataset"][0].as_py(), texts, vectors)


def _batch_of_lists(number: int, known: pa.Table, queries: pa.Table, texts: pa.Table) -> Batch:
    embeddings = _vectors(texts)
    return Batch(
        number=number,
        dataset=known["dataset"][0].as_py(),
        queries=_rows(queries["tokens"].combine_chunks()),
        positives=[],
        negatives=[],
        teacher_scores=queries["teacher_scores"].to_pylist(),
        query_ids=known["query_id"].drop_null().to_pylist(),
        positive_ids=[],
        symmetric=False,
        lists=_vectors(queries),
        texts=_rows(texts["tokens"].combine_chunks()),
        embeddings=np.concatenate(embeddings) if embeddings else None,
    )


def _vectors(rows: pa.Table) -> list[np.ndarray]:
    """Returns float32 ``[list, dimensions]`` of each row."""
    return [
        np.frombuffer(row, np.float16).reshape(max(1, len(own)), -1).astype(np.float32)
        for row, own in zip(
            rows["vectors"].to_pylist(), rows["teacher_scores"].to_pylist(), strict=True
        )
    ]


def _rows(lists: pa.ListArray) -> list[np.ndarray]:
    return _split(lists.flatten().to_numpy(), lists)


def _split(values: Any, lists: pa.ListArray) -> list[Any]:
    """Returns the part of the flattened `values` that each of the lists holds."""
    ends = [0, *np.cumsum(lists.value_lengths().to_numpy()).tolist()]
    return [values[start:end] for start, end in pairwise(ends)]


def _shards(storage: Storage) -> list[str]:
    return [path for path in storage.list("shards") if path.endswith(".parquet")]


_EXAMPLES = _Kind(
    ["batch", "dataset", "query_id", "positive_id", "symmetric"],
    ["query_tokens", "positive_tokens", "negative_tokens", "teacher_scores"],
    _batch,
)
_TEXTS = _Kind(["batch", "dataset"], ["tokens", "embedding"], _batch_of_texts)
_LISTS = _Kind(
    ["batch", "dataset", "query_id"], ["tokens", "teacher_scores", "vectors"], _batch_of_lists
)


def _kind(columns: Sequence[str]) -> _Kind:
    """Returns what shards with these columns hold."""
    if "vectors" in columns:
        return _LISTS
    return _TEXTS if "embedding" in columns else _EXAMPLES
