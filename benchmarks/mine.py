"""Mining beside sentence-transformers' `mine_hard_negatives` with FAISS, over the same vectors.

    python benchmarks/mine.py DATA [--queries 50000] [--passages 200000] [--repeats 3]

The texts are runs of 24 words from every JSONL file below DATA (fields `text` and `positive`), each
of which begins in the middle of the one before; at even distances one is taken as a query, and
the one before it is its positive. all-MiniLM-L6-v2 embeds them beforehand (minutes, kept in
--vectors), which is in neither figure. Both then find each query's 20 nearest passages and take,
of those below 95 % of the positive's similarity, the three nearest as negatives. Ours reads the
embeddings' Parquet shards, builds its index, searches, audits its recall and writes Parquet. Each
repeat is a process of its own, whose peak memory counts. Prints one JSON line.

`--random` takes random vectors around random centres instead, of any number, and leaves the rival
out: `--random --queries 100000 --passages 1000000 --repeats 1`.
"""

import argparse
import itertools
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pyarrow as pa

from cluster.artifacts import (
    MANIFEST,
    Manifest,
    list_files,
    open_artifact,
    write_artifact,
    write_shards,
)
from cluster.file_list import shard_path
from cluster.plain_json import dump_json
from cluster.storage import open_storage, write_table

WINDOW_WORDS = 24
NUM_CANDIDATES = 20
NUM_NEGATIVES = 3
MARGIN = 0.95
MODEL = "embedded:all-MiniLM-L6-v2"


def windows(folder: str) -> Iterator[str]:
    """Yields the distinct runs of words of a folder's texts, always in the same order."""
    seen: set[str] = set()
    for file in sorted(Path(folder).rglob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            for field in ("text", "positive"):
                words = row[field].split() if isinstance(row.get(field), str) else []
                for start in range(0, len(words) - WINDOW_WORDS // 2, WINDOW_WORDS // 2):
                    window = " ".join(words[start : start + WINDOW_WORDS])
                    if window not in seen:
                        seen.add(window)
                        yield window


def prepare(data: str, folder: Path, num_queries: int, num_passages: int) -> None:
    """Writes texts, vectors and the embeddings' artifact, unless they are there."""
    if (folder / "embeddings" / MANIFEST).exists():
        return
    from actors.encoder import Encoder
    from pipelines.mining.embeddings import vector_column

    texts = list(itertools.islice(windows(data), num_queries + num_passages))
    if len(texts) < num_queries + num_passages:
        raise SystemExit(f"{data} gives {len(texts)} windows: ask for fewer")
    step = (num_queries + num_passages) // num_queries
    is_query = np.zeros(len(texts), dtype=bool)
    is_query[step - 1 : step * num_queries : step] = True
    places = np.cumsum(~is_query) - 1
    encoder = Encoder.load(MODEL, max_tokens=64, dtype="auto")
    vectors = encoder.encode_passages(texts)
    queries = [text for text, chosen in zip(texts, is_query, strict=True) if chosen]
    passages = [text for text, chosen in zip(texts, is_query, strict=True) if not chosen]
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "queries.npy", vectors[is_query])
    np.save(folder / "passages.npy", vectors[~is_query])
    np.save(folder / "positives.npy", places[is_query])  # the passage before the query
    (folder / "texts.json").write_text(
        dump_json({"queries": queries, "passages": passages}), encoding="utf-8"
    )
    table = pa.table(
        {
            "id": [f"{row:016x}" for row in range(len(passages))],
            "text": passages,
            "embedding": vector_column(vectors[~is_query]),
        }
    )
    write_shards(open_storage(str(folder / "embeddings")), table, 1024)
    finish(folder)


def finish(folder: Path) -> None:
    """Writes the embeddings' manifest, as the step does."""
    storage = open_storage(str(folder / "embeddings"))
    manifest = Manifest(step="embeddings", fingerprint="", config={}, inputs={})
    write_artifact(storage, manifest, list_files(storage))


def tokay(connection: Connection, folder: Path) -> None:
    """Mines with Tokay's index actor, from Parquet to Parquet."""
    from actors.index_actor import IndexActor
    from cluster.stages import StageResources
    from pipelines.mining.candidates import EmbeddingShards

    embeddings = open_artifact(str(folder / "embeddings"))
    queries = np.load(folder / "queries.npy", mmap_mode="r")
    positives = np.load(folder / "positives.npy")
    begin = time.perf_counter()
    index = IndexActor(
        EmbeddingShards(embeddings=embeddings, shards=embeddings.shards),
        "auto",
        StageResources(),
        len(queries),
    )
    built = time.perf_counter() - begin
    chosen = np.empty((len(queries), NUM_NEGATIVES), np.int64)
    with tempfile.TemporaryDirectory() as target:
        output = open_storage(target)
        for number, start in enumerate(range(0, len(queries), 4096)):
            asked = np.ascontiguousarray(queries[start : start + 4096])
            own = positives[start : start + 4096]
            similarities, ids = index.search(asked, NUM_CANDIDATES)
            rows = np.array([int(id_ or b"-1", 16) for id_ in ids.ravel()]).reshape(ids.shape)
            names = np.array([[f"{row:016x}"] for row in own], dtype=np.bytes_)
            limit = index.similarities(asked, names)[:, 0] * MARGIN
            fit = (similarities < limit[:, None]) & (rows != own[:, None]) & (rows >= 0)
            first = np.argsort(~fit, axis=1, kind="stable")[:, :NUM_NEGATIVES]
            negatives = np.take_along_axis(np.where(fit, rows, -1), first, axis=1)
            chosen[start : start + 4096] = negatives
            table = pa.table(
                {
                    "positive": own,
                    "candidates": list(rows),
                    "similarities": list(similarities),
                    "negatives": list(negatives),
                }
            )
            write_table(output, shard_path(number), table)
        audit = index.audit()
        seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    connection.send((seconds, peak, chosen, audit | {"build_s": round(built, 2)}))


def sentence_transformers(connection: Connection, folder: Path) -> None:
    """Mines with `mine_hard_negatives`; its encoder returns the vectors prepared before."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    from actors.embedded import embedded_model

    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    passages, queries = texts["passages"], texts["queries"]
    positives = [passages[row] for row in np.load(folder / "positives.npy")]
    pairs = Dataset.from_dict({"anchor": queries, "positive": positives})
    model = SentenceTransformer(str(embedded_model(MODEL)), device="cpu")
    model.encode_document = lambda *_, **__: np.load(folder / "passages.npy")
    model.encode_query = lambda *_, **__: np.load(folder / "queries.npy")
    begin = time.perf_counter()
    mined = mine_hard_negatives(
        pairs,
        model,
        corpus=passages,
        range_max=NUM_CANDIDATES,
        relative_margin=1 - MARGIN,
        num_negatives=NUM_NEGATIVES,
        output_format="triplet",
        use_faiss=True,
        verbose=False,
    )
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rows = {text: row for row, text in enumerate(passages)}
    numbers = {text: row for row, text in enumerate(queries)}
    chosen = np.full((len(queries), NUM_NEGATIVES), -1)
    filled = np.zeros(len(queries), dtype=int)
    for query, negative in zip(mined["anchor"], mined["negative"], strict=True):
        number = numbers[query]
        chosen[number, filled[number]] = rows[negative]
        filled[number] += 1
    connection.send((seconds, peak, chosen, {}))


def prepare_random(folder: Path, num_queries: int, num_passages: int) -> None:
    """Writes clustered random vectors, shard by shard."""
    from pipelines.mining.embeddings import vector_column

    draw = np.random.default_rng(0)
    centres = draw.standard_normal((num_passages // 100, 384), dtype=np.float32)

    def some(count: int) -> np.ndarray:
        near = centres[draw.integers(0, len(centres), count)]
        vectors = near + 0.7 * draw.standard_normal((count, 384), dtype=np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    storage = open_storage(str(folder / "embeddings"))
    for number, start in enumerate(range(0, num_passages, 4096)):
        vectors = some(min(4096, num_passages - start))
        ids = [f"{row:016x}" for row in range(start, start + len(vectors))]
        table = pa.table({"id": ids, "embedding": vector_column(vectors)})
        write_table(storage, shard_path(number), table)
    finish(folder)
    np.save(folder / "queries.npy", some(num_queries))
    np.save(folder / "positives.npy", draw.integers(0, num_passages, num_queries))


def main() -> None:
    """Runs both in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?")
    parser.add_argument("--queries", type=int, default=50_000)
    parser.add_argument("--passages", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vectors", type=Path)
    parser.add_argument("--random", action="store_true")
    arguments = parser.parse_args()
    if not (arguments.data or arguments.random):
        parser.error("give DATA, or --random")
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.vectors or Path(temporary)
        sizes = arguments.queries, arguments.passages
        if arguments.random:
            prepare_random(folder, *sizes)
        else:
            prepare(arguments.data, folder, *sizes)
        workers = (tokay,) if arguments.random else (tokay, sentence_transformers)
        results: dict[str, list[tuple[float, float, np.ndarray, dict[str, object]]]] = {}
        for _, worker in itertools.product(range(arguments.repeats), workers):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=worker, args=(theirs, folder))
            process.start()
            results.setdefault(worker.__name__, []).append(ours.recv())
            process.join()
    report: dict[str, object] = {"benchmark": "mine", "queries": sizes[0], "passages": sizes[1]}
    for name, rows in results.items():
        report[name] = {
            "seconds": [round(row[0], 2) for row in rows],
            "peak_mib": round(statistics.median(row[1] for row in rows) / 2**20),
            **rows[-1][3],
        }
    if not arguments.random:
        (ours, peak), (theirs, rival_peak) = (
            [
                statistics.median(row[column] for row in results[worker.__name__])
                for column in (0, 1)
            ]
            for worker in workers
        )
        chosen = [results[worker.__name__][-1][2] for worker in workers]
        same = [len(np.intersect1d(*pair)) for pair in zip(*chosen, strict=True)]
        report["ratio"] = round(theirs / ours, 2)
        report["peak_share"] = round(peak / rival_peak, 3)
        report["same_negatives"] = round(float(np.mean(same)) / NUM_NEGATIVES, 4)
    print(dump_json(report))


if __name__ == "__main__":
    main()
