"""Training examples as a stream of batches: one shard in memory, from any batch on."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.errors import UserError
from cluster.parquet import open_parquet
from cluster.storage import Storage, join, open_storage, read_table

if TYPE_CHECKING:
    import pyarrow as pa

_COLUMNS = [
    "batch",
    "dataset",
    "query_tokens",
    "positive_tokens",
    "negative_tokens",
    "teacher_scores",
    "query_id",
    "positive_id",
    "symmetric",
]
_TEXT_COLUMNS = ["batch", "dataset", "tokens", "embedding"]
_FIXED_COLUMNS = ["batch", "dataset", "tokens", "query_id", "teacher_scores", "vectors"]


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
        return len(self.queries) or len(self.texts)

    @property
    def num_tokens(self) -> int:
        """Tokens of all its texts, without padding."""
        negatives = chain.from_iterable(self.negatives)
        texts = chain(self.queries, self.positives, negatives, self.texts)
        return sum(map(len, texts))


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


def iterate_batches(uri: str, start: int = 0) -> Iterator[Batch]:
    """Yields the batches from number `start` on, reading shard by shard, and none before it.

    Raises:
        UserError: The rows are not in the order of batches.
    """
    import pyarrow as pa  # imported here, since a training step does without it
    import pyarrow.compute as pc

    storage = open_storage(uri)
    paths = _shards(storage)
    if start:
        places = range(len(paths))
        paths = paths[
            bisect_left(places, start, key=lambda place: _last_batch(storage, paths[: place + 1])) :
        ]
    columns, make = _kind(storage, paths[0]) if paths else (_COLUMNS, _batch)
    rest: pa.Table | None = None
    number = start
    for path in paths:
        table = read_table(storage, path, columns)
        if rest is not None:
            table = pa.concat_tables([rest, table])
        table = table.filter(pc.greater_equal(table["batch"], number))
        while table.num_rows:
            size = int(pc.sum(pc.equal(table["batch"], number)).as_py())
            if table["batch"][:size].unique().to_pylist() != [number]:
                raise UserError(f"training examples {uri}: rows of batch {number} are not together")
            if size == table.num_rows:  # the next shard may go on with it
                break
            yield make(number, table.slice(0, size))
            table = table.slice(size)
            number += 1
        rest = table
    if rest is not None and rest.num_rows:
        yield make(number, rest)


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


def _kind(storage: Storage, path: str) -> tuple[list[str], Callable[[int, pa.Table], Batch]]:
    """Returns the columns that shards like this one have, and what makes a batch of its rows."""
    with storage.open(path) as file:
        names = open_parquet(file, join(storage.uri, path)).schema_arrow.names
    if "vectors" in names:
        return _FIXED_COLUMNS, _batch_of_lists
    return (_TEXT_COLUMNS, _batch_of_texts) if "embedding" in names else (_COLUMNS, _batch)


def _batch(number: int, table: pa.Table) -> Batch:
    negatives = table["negative_tokens"].combine_chunks()
    return Batch(
        number=number,
        dataset=table["dataset"][0].as_py(),
        queries=_rows(table["query_tokens"].combine_chunks()),
        positives=_rows(table["positive_tokens"].combine_chunks()),
        negatives=_split(_rows(negatives.flatten()), negatives),
        teacher_scores=table["teacher_scores"].to_pylist(),
        query_ids=table["query_id"].to_pylist(),
        positive_ids=table["positive_id"].to_pylist(),
        symmetric=table["symmetric"][0].as_py(),
    )


def _batch_of_texts(number: int, table: pa.Table) -> Batch:
    texts = _rows(table["tokens"].combine_chunks())
    vectors = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(texts), -1)
    return Batch.of_texts(number, table["dataset"][0].as_py(), texts, vectors)


def _batch_of_lists(number: int, table: pa.Table) -> Batch:
    tokens, query_ids = _rows(table["tokens"].combine_chunks()), table["query_id"].to_pylist()
    scores = table["teacher_scores"].to_pylist()
    vectors = [
        np.frombuffer(row, np.float16).reshape(max(1, len(own)), -1).astype(np.float32)
        for row, own in zip(table["vectors"].to_pylist(), scores, strict=True)
    ]
    size = len(query_ids) - query_ids.count(None)  # the queries come first
    return Batch(
        number=number,
        dataset=table["dataset"][0].as_py(),
        queries=tokens[:size],
        positives=[],
        negatives=[],
        teacher_scores=scores[:size],
        query_ids=query_ids[:size],
        positive_ids=[],
        symmetric=False,
        lists=vectors[:size],
        texts=tokens[size:],
        embeddings=np.concatenate(vectors[size:]) if vectors[size:] else None,
    )


def _rows(lists: pa.ListArray) -> list[np.ndarray]:
    return _split(lists.flatten().to_numpy(), lists)


def _split(values: Any, lists: pa.ListArray) -> list[Any]:
    """Returns the part of the flattened `values` that each of the lists holds."""
    ends = [0, *np.cumsum(lists.value_lengths().to_numpy()).tolist()]
    return [values[start:end] for start, end in pairwise(ends)]


def _shards(storage: Storage) -> list[str]:
    return [path for path in storage.list("shards") if path.endswith(".parquet")]
