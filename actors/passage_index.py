"""Nearest passages by inner product, the same on one machine and over shards.

Mining, evaluation and serving all ask for "the k best rows". FAISS finds them; this module fixes
what FAISS leaves open: the order of ties, how results of several shards become one, and which index
suits how many vectors.
"""

from __future__ import annotations

import ctypes
import io
import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Literal, Self

import numpy as np

Neighbours = tuple[np.ndarray, np.ndarray]
IndexKind = Literal["auto", "flat", "ivf", "pq"]

# FAISS adds up float32 in an order that depends on the batch; scores this near may be a tie.
_TIE = 1e-5
_SLACK = 8
_QUERIES_AT_ONCE = 256
# Up to 128,000 numbers in all queries, FAISS 1.15 goes through the vectors for each query, as suits
# eighty threads (faiss#5109). A product of matrices takes a seventh of the time on one.
_FAISS_SCANS, _SCANS_PER_THREAD = 128_000, 2_000
# FAISS' kernels select no more than this on a GPU.
_MAX_GPU_K = 2048
# Besides the vectors: 1.5 GiB that FAISS takes for its searches, and what cuBLAS and CUDA need.
_GPU_WORKSPACE_BYTES = 2 * 2**30
# `auto` on the CPU is exact up to so many bytes of float32 vectors, whatever it costs, and beyond
# where it costs less; more than the second an actor does not hold, of whatever precision.
_MAX_FLAT_BYTES = 2**28
_MAX_HELD_BYTES = 16 * 2**30
# Measured on one core and two (200,000 clustered vectors of 384 dimensions and 100,000 of 1,024, 64
# and 256 queries at a time, k 20): what a product costs in the training and the filling of inverted
# lists, and in their search, if one of the exact search costs 1.
_BUILD_COST, _SEARCH_COST = 1.2, 4.0


@cache
def _faiss() -> Any:
    """Returns FAISS, set to multiply matrices from as few queries on as pays on these threads."""
    import faiss

    if faiss.cvar.distance_compute_blas_threshold == _FAISS_SCANS:
        faiss.cvar.distance_compute_blas_threshold = _SCANS_PER_THREAD * faiss.omp_get_max_threads()
    return faiss


class PassageIndex:
    """Vectors in the order they were added, searched by exact inner product.

    Scores are the float64 inner products, rounded: they and the order depend neither on which
    queries were searched together, nor on the number of threads, nor on CPU or GPU.

    Attributes:
        dimensions: Length of a vector.
    """

    def __init__(self, dimensions: int, gpu: bool = False, order: np.ndarray | None = None) -> None:
        """Makes an empty index.

        Args:
            dimensions: Length of a vector.
            gpu: Whether to search on the first GPU that this process sees (needs ``faiss-gpu``), if
                the vectors fit there (`fits_gpu`); they stay in the host's memory too.
            order: The place of each row that will be added in the order of equal scores, int64
                ``[rows]``; None: that of the rows.
        """
        self.dimensions = dimensions
        self._host: Any = _faiss().IndexFlatIP(dimensions)
        self._gpu: Any = None
        self._gpu_wanted = gpu
        self._order = order

    def __len__(self) -> int:
        return int(self._host.ntotal)

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is searched: decided by the first search after `add`."""
        return self._gpu is not None

    def add(self, vectors: np.ndarray) -> None:
        """Appends float32 ``[rows, dimensions]``; their row numbers continue from the last."""
        self._host.add(self._checked(vectors))
        self._gpu = None

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Returns the vectors of int64 ``[rows]`` as float32 ``[rows, dimensions]``."""
        vectors: np.ndarray = self._host.reconstruct_batch(np.asarray(rows, dtype=np.int64))
        return vectors

    def search(self, queries: np.ndarray, k: int) -> Neighbours:
        """Finds each query's k best rows, best first, equal scores in the index's order.

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
        if self._gpu_wanted and self._gpu is None:
            self._gpu = _gpu_copy(self._host)
            self._gpu_wanted = self.on_gpu
        index = self._gpu if self.on_gpu and width <= _MAX_GPU_K else self._host
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
        vectors = _faiss().rev_swig_ptr(self._host.get_xb(), len(self) * self.dimensions)
        candidates = vectors.reshape(len(self), self.dimensions)[rows]
        scores = np.einsum("qd,qkd->qk", queries, candidates, dtype=np.float64)
        order = rows if self._order is None else self._order[rows]
        best = np.lexsort((order, -scores.astype(np.float32)), axis=1)
        scores = np.take_along_axis(scores, best, axis=1).astype(np.float32)
        return scores, np.take_along_axis(rows, best, axis=1)

    def _checked(self, vectors: np.ndarray) -> np.ndarray:
        if vectors.ndim != 2 or vectors.shape[1] != self.dimensions:
            raise ValueError(
                f"vectors of shape {vectors.shape}: accepted is [rows, {self.dimensions}]"
            )
        return np.ascontiguousarray(vectors, dtype=np.float32)


class ApproximateIndex:
    """Vectors in the order they were added, searched without looking at all of them.

    Vectors are held once, in half precision (`pq`: a byte per four numbers); scores are accurate
    to about 1e-3 (`pq`: 1e-1), and equal scores come in no fixed order.

    Attributes:
        kind: `ivf` (inverted lists) or `pq` (inverted lists of product-quantised residuals).
    """

    def __init__(self, dimensions: int, kind: str, num_vectors: int) -> None:
        """Makes an empty index, to which about `num_vectors` will be added."""
        faiss = _faiss()
        self.kind = kind
        self.dimensions = dimensions
        self._num_lists = _num_lists(num_vectors)
        per_code = max(size for size in (1, 2, 3, 4) if dimensions % size == 0)
        factories = {
            "ivf": f"IVF{self._num_lists},SQfp16",
            "pq": f"IVF{self._num_lists},PQ{dimensions // per_code}",
        }
        if kind not in factories:
            raise ValueError(f"index kind {kind!r}: accepted are {', '.join(factories)}")
        # Any: only the factory string says which type it is.
        index: Any = faiss.index_factory(dimensions, factories[kind], faiss.METRIC_INNER_PRODUCT)
        self._index = index
        index.nprobe = _num_probes(self._num_lists)
        index.cp.niter = _TRAINING_ROUNDS
        index.cp.max_points_per_centroid = _POINTS_PER_LIST
        index.make_direct_map(True)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def num_training_vectors(self) -> int:
        """How many vectors `train` uses."""
        return max(10_000, _POINTS_PER_LIST * self._num_lists)

    def train(self, sample: np.ndarray) -> None:
        """Learns lists and codes from a sample, float32 ``[rows, dimensions]``; before `add`."""
        self._index.train(np.ascontiguousarray(sample, dtype=np.float32))

    def add(self, vectors: np.ndarray) -> None:
        """Appends float32 ``[rows, dimensions]``; their row numbers continue from the last."""
        self._index.add(np.ascontiguousarray(vectors, dtype=np.float32))

    def write(self, file: io.RawIOBase) -> None:
        """Writes the index to a file."""
        faiss = _faiss()
        faiss.write_index(self._index, faiss.PyCallbackIOWriter(file.write))

    @classmethod
    def read(cls, file: io.BufferedIOBase, kind: str) -> Self:
        """Reads an index of a kind from a file, which must be one of our own: FAISS trusts it."""
        faiss = _faiss()
        index = cls.__new__(cls)
        index._index = faiss.read_index(faiss.PyCallbackIOReader(file.read))
        index.kind, index.dimensions = kind, index._index.d
        index._num_lists = index._index.nlist
        return index

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Returns the vectors of int64 ``[rows]`` as they are held, ``[rows, dimensions]``."""
        vectors: np.ndarray = self._index.reconstruct_batch(np.asarray(rows, dtype=np.int64))
        return vectors

    def search(self, queries: np.ndarray, k: int) -> Neighbours:
        """Finds most of each query's k best rows, best first; see `PassageIndex.search`.

        Where fewer than k are found, the row is -1 and the score the lowest there is.
        """
        neighbours: Neighbours = self._index.search(
            np.ascontiguousarray(queries, dtype=np.float32), min(k, len(self))
        )
        return neighbours


_NUM_CODES = 256  # a byte's, which are learned from as many vectors at least
_POINTS_PER_LIST = 30
_TRAINING_ROUNDS = 6


def _num_lists(num_vectors: int) -> int:
    return max(1, min(1 << 16, num_vectors, round(2 * math.sqrt(num_vectors))))


def _num_probes(num_lists: int) -> int:
    return max(16, num_lists // 20)


def choose_kind(kind: IndexKind, num_vectors: int, dimensions: int, num_queries: int) -> str:
    """Returns the kind that `auto` means for `num_vectors` on one actor that has no GPU.

    Of fewer vectors than `pq` has codes for a part of one, it is `ivf`. It depends on nothing else,
    so that an actor which starts anew, elsewhere, chooses the same.
    """
    if kind == "pq" and num_vectors < _NUM_CODES:
        return "ivf"
    if kind != "auto":
        return kind
    num_bytes = 4 * num_vectors * dimensions
    cheap = num_bytes <= _MAX_HELD_BYTES and _exact_costs_less(num_vectors, num_queries)
    if cheap or num_bytes <= _MAX_FLAT_BYTES:
        return "flat"
    return "ivf" if num_bytes <= 2 * _MAX_HELD_BYTES else "pq"


def _exact_costs_less(num_vectors: int, num_queries: int) -> bool:
    """Says whether all products cost less than to build inverted lists and to search some."""
    num_lists = _num_lists(num_vectors)
    build = num_lists * (_TRAINING_ROUNDS * _POINTS_PER_LIST * num_lists + num_vectors)
    searched = num_lists + num_vectors * _num_probes(num_lists) / num_lists
    of_index = _BUILD_COST * build + _SEARCH_COST * num_queries * searched
    return num_queries * num_vectors <= of_index


def fits_gpu(num_vectors: int, dimensions: int, share: float = 1.0) -> bool:
    """Says whether a `PassageIndex` of so many vectors fits a share of the first GPU's free memory.

    It does not where this process sees no GPU, or ``faiss-cpu`` is installed.
    """
    faiss = _faiss()
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        return False
    num_bytes = 4 * num_vectors * (dimensions + 1)  # each vector's norm too
    return num_bytes + _GPU_WORKSPACE_BYTES <= share * _free_gpu_bytes()


def _free_gpu_bytes() -> int:
    """Asks the driver, as FAISS does not say."""
    _faiss().gpu_sync_all_devices()  # makes the context that the driver needs
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    failed = ctypes.CDLL("libcuda.so.1").cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    if failed:
        raise RuntimeError(f"the CUDA driver does not say how much memory is free: error {failed}")
    return free.value


def _gpu_copy(host: Any) -> Any:
    """Returns a flat index on the first GPU, or None where it does not fit.

    It is copied whole: `add` on a GPU holds the old vectors beside the new ones as it grows.
    """
    if not fits_gpu(host.ntotal, host.d):
        return None
    faiss = _faiss()
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, host)


def exact_top_k(queries: np.ndarray, parts: Iterable[np.ndarray], k: int) -> Neighbours:
    """Finds the k best rows of vectors that come in parts, holding one part at a time.

    Args:
        queries: float32 ``[queries, dimensions]``.
        parts: float32 ``[rows, dimensions]`` each; rows are numbered over all of them.
        k: How many.
    """
    faiss = _faiss()
    best: Neighbours | None = None
    first_row = 0
    for part in parts:
        scores, rows = faiss.knn(
            queries, part, min(k, len(part)), metric=faiss.METRIC_INNER_PRODUCT
        )
        results = [(scores, rows + first_row)]
        best = merge_top_k(results if best is None else [best, *results], k)
        first_row += len(part)
    if best is None:
        raise ValueError("exact_top_k was given no vectors")
    return best


def merge_top_k(results: Sequence[Neighbours], k: int) -> Neighbours:
    """Merges what several shards found for the same queries into one list of the k best.

    Each gives (scores, rows), its rows already numbered over the whole, or ids in their place.
    Returns both as one index over all shards would give them, equal scores in the order of rows or
    ids.
    """
    if not results:
        raise ValueError("merge_top_k was given no results: give one (scores, rows) per shard")
    scores = np.concatenate([scores for scores, _ in results], axis=1)
    rows = np.concatenate([rows for _, rows in results], axis=1)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
