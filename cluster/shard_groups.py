"""Shards that lie side by side, as the source of one task: a shard alone may be a few rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from cluster.artifacts import Artifact
from cluster.files import FileEntry

_GROUP_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class ShardGroup:
    """Some of an artifact's shards.

    Attributes:
        artifact: Of which they are.
        shards: One or more, in order.
        number: That of the first among the artifact's shards.
        first_row: The number of their first row among the artifact's rows.
    """

    artifact: Artifact
    shards: tuple[FileEntry, ...]
    number: int
    first_row: int

    @property
    def num_rows(self) -> int:
        """Rows of all of them."""
        return sum(shard.num_rows or 0 for shard in self.shards)

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Yields the shards; raises ArtifactError if one is missing or short."""
        for shard in self.shards:
            yield self.artifact.shard(shard, columns)

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """Returns the rows of all of them; raises as `tables`."""
        return pa.concat_tables(self.tables(columns))


def shard_groups(artifact: Artifact, num_bytes: int = _GROUP_BYTES) -> Iterator[ShardGroup]:
    """Yields the shards of an artifact in groups of so many bytes at most, but for a larger shard.

    The groups depend on the shards alone.
    """
    waiting: list[FileEntry] = []
    number, first_row, size = 0, 0, 0

    def group() -> ShardGroup:
        return ShardGroup(
            artifact=artifact, shards=tuple(waiting), number=number, first_row=first_row
        )

    for shard in artifact.shards:
        if waiting and size + shard.num_bytes > num_bytes:
            yield group()
            number += len(waiting)
            first_row += sum(each.num_rows or 0 for each in waiting)
            waiting, size = [], 0
        waiting.append(shard)
        size += shard.num_bytes
    if waiting:
        yield group()
