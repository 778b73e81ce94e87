"""Training examples as a stream of batches: one shard in memory, a resumed run in its middle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import UserError
from cluster.storage import Storage, open_storage, read_table

_COLUMNS = ["batch", "query", "positive", "negatives", "query_id", "positive_id", "symmetric"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The examples of one global batch; lists of equal length.

    Attributes:
        number: Its place in the training, from 0.
        queries: Formatted texts.
        positives: Formatted texts.
        negatives: Formatted texts of each example's hard negatives, as many as it has.
        query_ids: Equal for equal queries.
        positive_ids: Equal for equal positives.
        symmetric: Whether an example's targets are formatted like queries.
    """

    number: int
    queries: list[str]
    positives: list[str]
    negatives: list[list[str]]
    query_ids: list[str]
    positive_ids: list[str]
    symmetric: list[bool]


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


def iterate_batches(uri: str, start: int = 0) -> Iterator[Batch]:
    """Yields the batches from number `start` on, reading shard by shard.

    Raises:
        UserError: The rows are not in the order of batches.
    """
    storage = open_storage(uri)
    rest: pa.Table | None = None
    number = start
    for path in _shards(storage):
        table = read_table(storage, path, _COLUMNS)
        if rest is not None:
            table = pa.concat_tables([rest, table])
        table = table.filter(pc.greater_equal(table["batch"], number))
        while table.num_rows:
            size = int(pc.sum(pc.equal(table["batch"], number)).as_py())
            if table["batch"][:size].unique().to_pylist() != [number]:
                raise UserError(f"training examples {uri}: rows of batch {number} are not together")
            if size == table.num_rows:  # the next shard may go on with it
                break
            yield _batch(number, table.slice(0, size))
            table = table.slice(size)
            number += 1
        rest = table
    if rest is not None and rest.num_rows:
        yield _batch(number, rest)


def _batch(number: int, table: pa.Table) -> Batch:
    columns = table.to_pydict()
    return Batch(
        number=number,
        queries=columns["query"],
        positives=columns["positive"],
        negatives=columns["negatives"],
        query_ids=columns["query_id"],
        positive_ids=columns["positive_id"],
        symmetric=columns["symmetric"],
    )


def _shards(storage: Storage) -> list[str]:
    return [path for path in storage.list("shards") if path.endswith(".parquet")]
