"""The Ray actor that holds a FAISS index of a part of the vectors, and audits its recall."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from actors.passage_index import (
    ApproximateIndex,
    IndexKind,
    PassageIndex,
    choose_kind,
    exact_top_k,
    fits_gpu,
)
from cluster.actor_health import actor_begins
from cluster.artifacts import Json
from cluster.stages import StageResources
from cluster.storage import Storage

INDEX_ACTORS = "index"
# Recall is audited on the first queries of the first searches.
MAX_AUDITS, AUDITED_OF_EACH = 16, 32


class IndexedVectors(Protocol):
    """Vectors and their ids, read one part at a time; picklable."""

    def __len__(self) -> int: ...

    def ids(self) -> np.ndarray:
        """Reads the ids, bytes ``[rows]``."""

    def parts(self) -> Iterator[np.ndarray]:
        """Reads the vectors in the order of the ids, float32 ``[rows of a part, dimensions]``."""


class IndexActor:
    """One FAISS index over some of the run's vectors; runs as a Ray actor."""

    def __init__(
        self,
        vectors: IndexedVectors,
        first_row: int,
        kind: IndexKind,
        resources: StageResources,
        notes: Storage | None = None,
    ) -> None:
        """Reads the vectors, one part at a time, and builds the index.

        Args:
            vectors: The vectors and their ids.
            first_row: Number of their first row among all vectors.
            kind: Of the index; `auto` depends on the vectors' bytes.
            resources: What this actor has. Up to one CPU, it may use all cores of its node: the
                actors that ask it wait meanwhile.
            notes: The step's folder, where Ray's actors note that they have begun.
        """
        import faiss

        if notes is not None:
            actor_begins(notes, INDEX_ACTORS)
        # Ray sets OMP_NUM_THREADS to 1 where it gives an actor one CPU or less.
        cores = len(os.sched_getaffinity(0))
        faiss.omp_set_num_threads(int(resources.num_cpus) if resources.num_cpus > 1 else cores)
        self._vectors, self._first_row = vectors, first_row
        num_vectors = len(vectors)
        dimensions = next(vectors.parts()).shape[1]
        share = min(1.0, resources.num_gpus)
        gpu = share > 0 and fits_gpu(num_vectors, dimensions, share)
        self.kind = "flat" if gpu else choose_kind(kind, num_vectors, dimensions)
        self._audited: list[tuple[np.ndarray, np.ndarray]] = []
        self._index: PassageIndex | ApproximateIndex
        if self.kind == "flat":
            self._index = PassageIndex(dimensions, gpu=gpu)
        else:
            self._index = ApproximateIndex(dimensions, self.kind, num_vectors)
            self._index.train(self._sample(self._index.num_training_vectors, num_vectors))
        for part in vectors.parts():
            self._index.add(part)
        self._ids = vectors.ids()
        self._by_id = np.argsort(self._ids)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns similarities float32 and rows among all (-1: none), both ``[queries, k]``."""
        similarities, rows = self._index.search(queries, k)
        if self.kind != "flat" and len(self._audited) < MAX_AUDITS:
            self._audited.append((queries[:AUDITED_OF_EACH], rows[:AUDITED_OF_EACH]))
        return similarities, np.where(rows < 0, -1, rows + self._first_row)

    def vectors(self, ids: list[str]) -> dict[str, np.ndarray]:
        """Returns the embeddings of those passages that this index holds."""
        wanted = np.array(ids, dtype=self._ids.dtype)
        places = np.searchsorted(self._ids, wanted, sorter=self._by_id)
        rows = self._by_id[np.minimum(places, len(self._ids) - 1)]
        held = np.flatnonzero(self._ids[rows] == wanted)
        vectors = self._index.vectors(rows[held])
        return {ids[place]: vector for place, vector in zip(held, vectors, strict=True)}

    def audit(self) -> dict[str, Json]:
        """Compares some of the searches with exact ones over the same shards.

        Returns the kind of index, whether it is on a GPU, the mean recall, over how many queries
        (0: an exact index, or nothing was asked), and this process's highest memory in bytes.
        """
        recalls: list[float] = []
        if self._audited:
            queries = np.concatenate([query for query, _ in self._audited])
            k = self._audited[0][1].shape[1]
            _, exact = exact_top_k(queries, self._vectors.parts(), k)
            searched = np.concatenate([rows for _, rows in self._audited])
            recalls = [len(np.intersect1d(*pair)) / k for pair in zip(searched, exact, strict=True)]
        return {
            "kind": self.kind,
            "on_gpu": getattr(self._index, "on_gpu", False),
            "recall": float(np.mean(recalls)) if recalls else 1.0,
            "num_audited": len(recalls),
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }

    def _sample(self, num_wanted: int, num_vectors: int) -> np.ndarray:
        """Draws about `num_wanted` vectors from all shards."""
        draw, parts = np.random.default_rng(0), self._vectors.parts()
        share = min(1.0, num_wanted / num_vectors)
        return np.concatenate([part[draw.random(len(part)) < share] for part in parts])
