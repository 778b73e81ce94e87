"""Training examples as a stream of batches: one shard in memory, from any batch on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.errors import UserError
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


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The examples of one global batch, all of one data set; lists of equal length.

    Attributes:
        number: Its place in the training, from 0.
        dataset: The set's name.
        queries: Token ids of the formatted texts, an integer array each; for embedding
            distillation, of texts of any role, which have no positives.
        positives: As `queries`.
        negatives: As `queries`, of each example's hard negatives.
        teacher_scores: The LLM's scores of the positive and the negatives; empty: there are none.
        query_ids: Equal for equal queries.
        positive_ids: Equal for equal positives.
        symmetric: Whether the set's targets are formatted like queries.
        embeddings: float32 ``[queries, dimensions]``, unit length: the vectors to be learned in
            embedding distillation; None in contrastive training.
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
    embeddings: np.ndarray | None = None

    @classmethod
    def of_texts(
        cls, number: int, dataset: str, texts: list[np.ndarray], embeddings: np.ndarray
    ) -> Batch:
        """Returns a batch of embedding distillation: token ids, and the vector of each text."""
        return cls(
            number=number,
            dataset=dataset,
            queries=texts,
            positives=[],
            negatives=[],
            teacher_scores=[],
            query_ids=[],
            positive_ids=[],
            symmetric=False,
            embeddings=embeddings,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of all its texts, without padding."""
        texts = chain(self.queries, self.positives, chain.from_iterable(self.negatives))
        return sum(map(len, texts))


VALIDATION = "validation"


def count_batches(uri: str) -> int:
    """Returns how many batches the examples hold.

    Raises:
        UserError: There are none.
    """
    storage = open_storage(uri)
    for path in reversed(_shards(storage)):
        numbers = read_table(storage, path, ["batch"])["batch"]
        if len(numbers):
            return int(numbers[-1].as_py()) + 1
    raise UserError(f"training examples {uri} hold no row: the mixture step must come first")


def iterate_batches(uri: str, start: int = 0, *, contrastive: bool = True) -> Iterator[Batch]:
    """Yields the batches from number `start` on, reading shard by shard.

    They are those of contrastive training, or else of embedding distillation.

    Raises:
        UserError: The rows are not in the order of batches.
    """
    import pyarrow as pa  # imported here, since a training step does without it
    import pyarrow.compute as pc

    storage = open_storage(uri)
    columns, make = (_COLUMNS, _batch) if contrastive else (_TEXT_COLUMNS, _batch_of_texts)
    rest: pa.Table | None = None
    number = start
    for path in _shards(storage):
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


def iterate_validation(uri: str, *, contrastive: bool = True) -> Iterator[Batch]:
    """Yields the batches that were held out; none where the mixture holds nothing out."""
    yield from iterate_batches(join(uri, VALIDATION), contrastive=contrastive)


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


def _rows(lists: pa.ListArray) -> list[np.ndarray]:
    return _split(lists.flatten().to_numpy(), lists)


def _split(values: Any, lists: pa.ListArray) -> list[Any]:
    """Returns the part of the flattened `values` that each of the lists holds."""
    ends = [0, *np.cumsum(lists.value_lengths().to_numpy()).tolist()]
    return [values[start:end] for start, end in pairwise(ends)]


def _shards(storage: Storage) -> list[str]:
    return [path for path in storage.list("shards") if path.endswith(".parquet")]
