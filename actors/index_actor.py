"""The Ray actor that holds a FAISS index of a part of the vectors, and audits its recall.

It speaks of passages by their ids, as bytes, so that no process has to know those of all.
"""

from __future__ import annotations

import hashlib
import io
import os
import resource
from collections.abc import Iterator
from typing import Protocol, cast

import numpy as np

from actors.passage_index import (
    ApproximateIndex,
    IndexKind,
    Neighbours,
    PassageIndex,
    choose_kind,
    exact_top_k,
    fits_gpu,
)
from cluster.actor_health import actor_begins
from cluster.artifacts import Json
from cluster.file_list import FileList
from cluster.files import FileEntry
from cluster.stages import StageResources
from cluster.storage import Storage, join

INDEX_ACTORS = "index"
# Recall is audited on the first queries of the first searches.
MAX_AUDITS, AUDITED_OF_EACH = 16, 32
_READ_BYTES = 16 << 20
_SAVED = "work/index"
_SAVED_LIST = f"{_SAVED}/files.parquet"


class IndexedVectors(Protocol):
    """Vectors and their ids, read one part at a time; picklable."""

    @property
    def name(self) -> str:
        """Tells these vectors from the others of the step; fit to be the name of a file."""

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
        kind: IndexKind,
        resources: StageResources,
        num_queries: int,
        step: Storage | None = None,
    ) -> None:
        """Reads the vectors, one part at a time, and builds the index, or loads a saved one.

        Args:
            vectors: The vectors and their ids.
            kind: Of the index; `auto` depends on the vectors' bytes and on `num_queries`.
            resources: What this actor has. Up to one CPU, it may use all cores of its node: the
                actors that ask it wait meanwhile.
            num_queries: About how many it will be asked.
            step: The step's folder, where Ray's actors note that they have begun, and an index
                that took long to build is saved.
        """
        import faiss

        if step is not None:
            actor_begins(step, INDEX_ACTORS)
        # Ray sets OMP_NUM_THREADS to 1 where it gives an actor one CPU or less.
        cores = len(os.sched_getaffinity(0))
        faiss.omp_set_num_threads(int(resources.num_cpus) if resources.num_cpus > 1 else cores)
        self._vectors, self._step = vectors, step
        self._ids = vectors.ids()
        self._by_id = np.argsort(self._ids)
        self._dimensions = next(vectors.parts()).shape[1]
        share = min(1.0, resources.num_gpus)
        gpu = share > 0 and fits_gpu(len(vectors), self._dimensions, share)
        size = len(vectors), self._dimensions, num_queries
        self.kind = "flat" if gpu else choose_kind(kind, *size)
        self._audited: list[tuple[np.ndarray, np.ndarray]] = []
        self._saved: FileEntry | None = None
        self._index: PassageIndex | ApproximateIndex
        if self.kind != "flat":
            self._index = self._load() or self.build()
            return
        places = np.empty(len(self._ids), np.int64)
        places[self._by_id] = np.arange(len(places))
        self._index = PassageIndex(self._dimensions, gpu=gpu, order=places)
        for part in vectors.parts():
            self._index.add(part)

    def saved(self) -> FileEntry | None:
        """Describes the file that the index was saved in; None where it is not worth one."""
        return self._saved

    def search(self, queries: np.ndarray, k: int) -> Neighbours:
        """Finds the nearest of this actor's passages, best first, equal ones in the order of ids.

        Returns:
            Similarities float32 and ids as bytes (empty: none), both ``[queries, k]``, or with
            fewer columns where there are fewer passages.
        """
        similarities, rows = self._index.search(queries, k)
        if self.kind != "flat" and len(self._audited) < MAX_AUDITS:
            self._audited.append((queries[:AUDITED_OF_EACH], rows[:AUDITED_OF_EACH]))
        return similarities, np.where(rows < 0, b"", self._ids[rows])

    def similarities(self, queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Returns the similarities of queries and passages, float32 ``[queries, n]``.

        Args:
            queries: Their vectors, float32 ``[queries, dimensions]``.
            ids: Of passages, bytes ``[queries, n]``; the similarity of one that is not here is 0.
        """
        rows = self._rows(ids)
        similarities = np.zeros(ids.shape, np.float32)
        asked, columns = np.nonzero(rows >= 0)
        held, which = np.unique(rows[asked, columns], return_inverse=True)
        pairs = self._index.vectors(held)[which], queries[asked]
        similarities[asked, columns] = np.einsum("nd,nd->n", *pairs, dtype=np.float64)
        return similarities

    def first_ids(self, count: int) -> np.ndarray:
        """Returns the smallest ids, in order."""
        return self._ids[self._by_id[:count]]

    def vectors(self, ids: np.ndarray) -> Neighbours:
        """Returns which of the ids, bytes ``[n]``, are of passages held here, and their vectors."""
        rows = self._rows(ids)
        held = np.flatnonzero(rows >= 0)
        return held, self._index.vectors(rows[held])

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

    def build(self) -> ApproximateIndex:
        """Builds an index of all vectors, and saves it in the step's folder if there is one."""
        index = ApproximateIndex(self._dimensions, self.kind, len(self._vectors))
        index.train(self._sample(index.num_training_vectors))
        for part in self._vectors.parts():
            index.add(part)
        if self._step is not None:
            with self._step.writing(self._path) as file:
                index.write(file)
            self._saved = file.entry()
        return index

    def _load(self) -> ApproximateIndex | None:
        """Returns the saved index, if it is the file that the step's list of them vouches for."""
        saved = read_saved_indexes(self._step).find(self._path) if self._step else None
        if self._step is None or saved is None:
            return None
        try:
            with self._step.open(self._path) as opened:
                # Of S3, each reading is a request; FAISS reads some bytes at a time.
                file = io.BufferedReader(cast(io.RawIOBase, opened), _READ_BYTES)
                if hashlib.file_digest(file, "sha256").hexdigest() != saved.sha256:
                    return None
                file.seek(0)  # of the same version
                index = ApproximateIndex.read(file, self.kind)
        except FileNotFoundError:
            return None
        self._saved = saved
        return index

    @property
    def _path(self) -> str:
        return f"{_SAVED}/{self._vectors.name}.{self.kind}"

    def _rows(self, ids: np.ndarray) -> np.ndarray:
        """Returns the rows of passages by their ids, of the same shape; -1: not here."""
        places = np.searchsorted(self._ids, ids, sorter=self._by_id)
        rows = self._by_id[np.minimum(places, len(self._ids) - 1)]
        return np.where(self._ids[rows] == ids, rows, -1)

    def _sample(self, num_wanted: int) -> np.ndarray:
        """Draws about `num_wanted` vectors from all shards."""
        draw, parts = np.random.default_rng(0), self._vectors.parts()
        share = min(1.0, num_wanted / len(self._vectors))
        return np.concatenate([part[draw.random(len(part)) < share] for part in parts])


def read_saved_indexes(step: Storage) -> FileList:
    """Returns the list of a step's saved indexes, as the actors that wrote them described them.

    FAISS trusts what it reads, so that a file which is not in it, or is another one, is not read.
    """
    try:
        content = step.read_bytes(_SAVED_LIST)
    except FileNotFoundError:
        return FileList.of([])
    return FileList.from_parquet(content, join(step.uri, _SAVED_LIST))


def write_saved_indexes(step: Storage, files: FileList) -> None:
    """Writes the list of a step's saved indexes."""
    step.write_bytes(_SAVED_LIST, files.to_parquet())
