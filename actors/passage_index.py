"""Exact nearest passages by inner product, the same on one machine and over shards.

Mining, evaluation and serving all ask for "the k best rows". FAISS finds them; this module fixes
what FAISS leaves open: the order of ties, and how results of several shards become one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Neighbours = tuple[np.ndarray, np.ndarray]

# FAISS adds up float32 in an order that depends on the batch; scores this near may be a tie.
_TIE = 1e-5
_SLACK = 8
_QUERIES_AT_ONCE = 256


class PassageIndex:
    """Vectors in the order they were added, searched by exact inner product.

    Scores are the float64 inner products, rounded: they and the order depend neither on which
    queries were asked together, nor on the number of threads, nor on CPU or GPU.

    Attributes:
        dimensions: Length of a vector.
    """

    def __init__(self, dimensions: int, gpu: bool = False) -> None:
        """Makes an empty index.

        Args:
            dimensions: Length of a vector.
            gpu: Search on the first GPU that this process sees (needs ``faiss-gpu``); the vectors
                stay in the host's memory too.
        """
        import faiss

        self.dimensions = dimensions
        self._host: Any = faiss.IndexFlatIP(dimensions)
        self._gpu: Any = None
        if gpu:
            if not hasattr(faiss, "StandardGpuResources"):
                raise ValueError("gpu=True needs faiss-gpu, and faiss-cpu is installed")
            self._gpu = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), dimensions)

    def __len__(self) -> int:
        return int(self._host.ntotal)

    def add(self, vectors: np.ndarray) -> None:
        """Appends float32 ``[rows, dimensions]``; their row numbers go on from the last."""
        checked = self._checked(vectors)
        self._host.add(checked)
        if self._gpu is not None:
            self._gpu.add(checked)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Returns the vectors of int64 ``[rows]`` as float32 ``[rows, dimensions]``."""
        found: np.ndarray = self._host.reconstruct_batch(np.asarray(rows, dtype=np.int64))
        return found

    def search(self, queries: np.ndarray, k: int) -> Neighbours:
        """Finds each query's k best rows, best first, equal scores in the order of rows.

        Args:
            queries: float32 ``[queries, dimensions]``.
            k: How many; fewer columns come back where the index has fewer rows.

        Returns:
            Scores float32 and rows int64, both ``[queries, min(k, rows)]``.
        """
        if k < 1:
            raise ValueError(f"k {k}: it must be at least 1")
        checked = self._checked(queries)
        k = min(k, len(self))
        scores = np.zeros((len(checked), k), np.float32)
        rows = np.zeros((len(checked), k), np.int64)
        for start in range(0, len(checked) if k else 0, _QUERIES_AT_ONCE):
            part = slice(start, start + _QUERIES_AT_ONCE)
            scores[part], rows[part] = self._search(checked[part], k)
        return scores, rows

    def _search(self, queries: np.ndarray, k: int) -> Neighbours:
        width = min(k + _SLACK, len(self))
        index = self._host if self._gpu is None else self._gpu
        scores, rows = self._rescored(queries, index.search(queries, width)[1])
        # Where the slack does not reach beyond a tie at the border, look wider, alone.
        tied = scores[:, k - 1] - scores[:, -1] <= _TIE * np.maximum(1, np.abs(scores[:, k - 1]))
        for query in np.flatnonzero(tied):
            alone, width = queries[query : query + 1], min(k + _SLACK, len(self))
            while width < len(self):
                width = min(4 * width, len(self))
                wide = self._rescored(alone, self._host.search(alone, width)[1])
                scores[query], rows[query] = (part[0, : scores.shape[1]] for part in wide)
                border = wide[0][0, k - 1]
                if border - wide[0][0, -1] > _TIE * max(1, abs(border)):
                    break
        return scores[:, :k], rows[:, :k]

    def _rescored(self, queries: np.ndarray, rows: np.ndarray) -> Neighbours:
        import faiss

        vectors = faiss.rev_swig_ptr(self._host.get_xb(), len(self) * self.dimensions)
        found = vectors.reshape(len(self), self.dimensions)[rows]
        scores = np.einsum("qd,qkd->qk", queries, found, dtype=np.float64)
        return _best(scores.astype(np.float32), rows, rows.shape[1])

    def _checked(self, vectors: np.ndarray) -> np.ndarray:
        if vectors.ndim != 2 or vectors.shape[1] != self.dimensions:
            raise ValueError(
                f"vectors of shape {vectors.shape}: accepted is [rows, {self.dimensions}]"
            )
        return np.ascontiguousarray(vectors, dtype=np.float32)


def merge_top_k(results: Sequence[Neighbours], k: int) -> Neighbours:
    """Merges what several shards found for the same queries into one list of the k best.

    Args:
        results: (scores, rows) of each shard, its rows already numbered over the whole.
        k: How many to keep.

    Returns:
        Scores and rows, as one index over all shards would give them.
    """
    if not results:
        raise ValueError("merge_top_k was given no results: give one (scores, rows) per shard")
    scores = np.concatenate([scores for scores, _ in results], axis=1)
    rows = np.concatenate([rows for _, rows in results], axis=1)
    return _best(scores, rows, min(k, scores.shape[1]))


def _best(scores: np.ndarray, rows: np.ndarray, k: int) -> Neighbours:
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
