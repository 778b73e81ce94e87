"""Which passages of a corpus are drawn, whatever process looks at them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.artifacts import Artifact
from cluster.exchange import run_tasks
from cluster.shard_groups import ShardGroup, shard_groups

_ALL = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Which passages are drawn: those whose hash is among the lowest.

    Attributes:
        seed: Of the hash.
        highest: Of the hashes of those drawn.
    """

    seed: int
    highest: int

    @classmethod
    def of(cls, passages: Artifact, num_drawn: int, seed: int) -> Draw:
        """Draws passages of an artifact; of more, they are among those drawn too.

        Tasks read the ids; 8 bytes for each that is drawn are held.
        """
        if num_drawn >= passages.num_rows:
            return cls(seed=seed, highest=_ALL)
        lowest, highest = np.empty(0, np.uint64), _ALL

        def groups() -> Iterator[tuple[Any, ...]]:
            for group in shard_groups(passages):
                yield cls(seed=seed, highest=highest), group

        for hashes in run_tasks(_hashes_of, groups()):
            lowest = np.concatenate([lowest, hashes])
            if len(lowest) >= num_drawn:
                lowest = np.partition(lowest, num_drawn - 1)[:num_drawn]
                highest = int(lowest.max())
        return cls(seed=seed, highest=highest)

    def includes(self, ids: pa.ChunkedArray) -> np.ndarray:
        """Returns bool ``[ids]``."""
        drawn: np.ndarray = self.hashes(ids) <= np.uint64(self.highest)
        return drawn

    def hashes(self, ids: pa.ChunkedArray) -> np.ndarray:
        """Returns uint64 ``[ids]``."""
        digests = b"".join(
            hashlib.sha256(f"{self.seed} {id_}".encode()).digest()[:8] for id_ in ids.to_pylist()
        )
        return np.frombuffer(digests, np.uint64)


def _hashes_of(draw: Draw, group: ShardGroup) -> np.ndarray:
    hashes = np.concatenate([draw.hashes(table["id"]) for table in group.tables(["id"])])
    lowest: np.ndarray = hashes[hashes <= np.uint64(draw.highest)]
    return lowest


@dataclass(frozen=True, kw_only=True)
class DrawnPassages:
    """The passages that are drawn of some shards.

    Attributes:
        draw: Says which.
        vectors: Shards with the columns id and embedding.
        texts: Those with the columns title and text of the same passages.
    """

    draw: Draw
    vectors: ShardGroup
    texts: ShardGroup

    def tables(self) -> Iterator[pa.Table]:
        """Yields title, text and embedding of those of each shard."""
        texts = self.texts.tables(["title", "text"])
        for rows, own in zip(self.vectors.tables(["id", "embedding"]), texts, strict=True):
            drawn = pa.array(self.draw.includes(rows["id"]), pa.bool_())
            yield own.append_column("embedding", rows["embedding"]).filter(drawn)


def drawn_passages(draw: Draw, vectors: Artifact, texts: Artifact) -> Iterator[DrawnPassages]:
    """Yields the passages that are drawn, in groups; both artifacts have the same shards."""
    shards = texts.shards
    for group in shard_groups(vectors):
        own = tuple(shards[group.number : group.number + len(group.shards)])
        same = replace(group, artifact=texts, shards=own)
        yield DrawnPassages(draw=draw, vectors=group, texts=same)
