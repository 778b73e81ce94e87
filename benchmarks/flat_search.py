"""Flat search on a GPU beside the same on the CPU: whether rows are equal, and the times.

    python benchmarks/flat_search.py [--rows 1000000] [--dimensions 768] [--queries 1024]

Vectors and queries are random and of unit length. Both sides are `PassageIndex`, the CPU's with all
its threads; a first search of a few queries counts in neither. Needs only numpy and FAISS; where no
GPU has room, the CPU is alone. Prints one JSON line; `identical` is the share of queries whose rows
are all the same, in order.
"""

import argparse
import sys
import time
from pathlib import Path

import faiss
import numpy as np

from cluster.plain_json import dump_json

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the project is not installed

from actors.passage_index import PassageIndex, fits_gpu

ROWS_AT_ONCE = 100_000


def unit_vectors(rows: int, dimensions: int, seed: int) -> np.ndarray:
    """Returns random float32 ``[rows, dimensions]`` of unit length."""
    vectors = np.random.default_rng(seed).standard_normal((rows, dimensions), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def main() -> None:
    """Fills both indexes with the same vectors, searches each, and prints the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dimensions", type=int, default=768)
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--k", type=int, default=20)
    arguments = parser.parse_args()
    indexes = {"cpu": PassageIndex(arguments.dimensions)}
    if fits_gpu(arguments.rows, arguments.dimensions):
        indexes = {"gpu": PassageIndex(arguments.dimensions, gpu=True), **indexes}
    filling = dict.fromkeys(indexes, 0.0)
    for number, start in enumerate(range(0, arguments.rows, ROWS_AT_ONCE)):
        size = min(ROWS_AT_ONCE, arguments.rows - start)
        part = unit_vectors(size, arguments.dimensions, seed=number + 1)
        for name, index in indexes.items():
            begin = time.perf_counter()
            index.add(part)
            filling[name] += time.perf_counter() - begin
    queries = unit_vectors(arguments.queries, arguments.dimensions, seed=0)
    rows, seconds = {}, {}
    for name, index in indexes.items():
        index.search(queries[:8], arguments.k)
        begin = time.perf_counter()
        _, rows[name] = index.search(queries, arguments.k)
        seconds[name] = time.perf_counter() - begin
        print(f"{name}: {seconds[name]:.2f} s", file=sys.stderr, flush=True)
    operations = 2 * arguments.queries * arguments.rows * arguments.dimensions
    report = {
        "benchmark": "flat_search",
        "faiss": faiss.__version__,
        "cpu_threads": faiss.omp_get_max_threads(),
        "rows": arguments.rows,
        "dimensions": arguments.dimensions,
        "queries": arguments.queries,
        "k": arguments.k,
        "cpu_s": round(seconds["cpu"], 3),
        "cpu_add_s": round(filling["cpu"], 2),
        "cpu_gflops": round(operations / seconds["cpu"] / 1e9, 1),
    }
    if "gpu" in indexes:
        report |= {
            "gpu_s": round(seconds["gpu"], 3),
            "gpu_add_s": round(filling["gpu"], 2),
            "ratio": round(seconds["cpu"] / seconds["gpu"], 1),
            "identical": round(float((rows["gpu"] == rows["cpu"]).all(axis=1).mean()), 5),
        }
    print(dump_json(report))
    if report.get("identical", 1) < 1:
        sys.exit("the GPU found different rows from the CPU")


if __name__ == "__main__":
    main()
