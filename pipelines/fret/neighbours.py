"""The step `candidates`: each query's nearest passages, through encoder and FAISS actors."""

import asyncio
import os
import resource
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from actors.passage_index import IndexKind
from cluster.artifacts import Artifact, FileEntry, Json
from cluster.presence import actor_begins, clear_actors, report_waiting
from cluster.ray_errors import reported_error
from cluster.stages import Stage, StageFunction, StageOutput, StageResources, run_stage
from cluster.steps import StepContext
from cluster.storage import Storage
from pipelines.encoders import EncoderConfig, column_vectors, load_encoder
from pipelines.records import CANDIDATES, QUERY

INDEX_ACTORS = "index"
# Recall is audited on the first queries of the first searches.
MAX_AUDITS, AUDITED_OF_EACH = 16, 32


class CandidatesConfig(BaseModel):
    """How many neighbours a query gets, and on how many FAISS actors they are searched."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_candidates: int = Field(default=20, ge=2, description="Gecko's N, by its name p20")
    index: IndexKind = Field(
        default="auto",
        description="flat is exact; ivf, hnsw and pq are not, and their recall is audited; auto: by"
        " an actor's bytes of float32 vectors: flat where they fit its GPU, and on the CPU to"
        " 256 MiB, ivf to 32 GiB, then pq",
    )
    max_seed_rank: int | None = Field(
        default=None,
        ge=1,
        description="round trip: drop queries whose seed the retriever ranks lower, before they"
        " are scored; for small LLMs, whose queries wander. Gecko has no such rule",
    )


_NO_CANDIDATES: dict[str, Any] = {"candidate_ids": [], "similarities": [], "seed_rank": None}


class IndexActor:
    """One FAISS index over some of the embedding shards; runs as a Ray actor."""

    def __init__(
        self,
        embeddings: Artifact,
        shards: list[FileEntry],
        first_row: int,
        kind: IndexKind,
        resources: StageResources,
        notes: Storage | None = None,
    ) -> None:
        """Reads the shards, one at a time, and builds the index.

        Args:
            embeddings: The artifact.
            shards: Which of its shards.
            first_row: Their first row in the whole.
            kind: Of the index; `auto` goes by the vectors' bytes.
            resources: What this actor has. Up to one CPU, it may use all cores of its node: the
                actors that ask it wait meanwhile.
            notes: The step's folder, where Ray's actors note that they begin.
        """
        import faiss

        from actors.passage_index import ApproximateIndex, PassageIndex, choose_kind, fits_gpu

        if notes is not None:
            actor_begins(notes, INDEX_ACTORS)
        # Ray sets OMP_NUM_THREADS to 1 where it gives an actor one CPU or less.
        cores = len(os.sched_getaffinity(0))
        faiss.omp_set_num_threads(int(resources.num_cpus) if resources.num_cpus > 1 else cores)
        self._embeddings, self._shards, self._first_row = embeddings, shards, first_row
        num_vectors = sum(shard.num_rows or 0 for shard in shards)
        dimensions = next(self._parts()).shape[1]
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
        for part in self._parts():
            self._index.add(part)
        self._ids = _read_ids(embeddings, shards)
        self._by_id = np.argsort(self._ids)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns similarities float32 and rows of the whole (-1: none), both ``[queries, k]``."""
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

        Returns the kind of index, whether it is on a GPU, the mean recall, how many queries that is
        of (0: an exact index, or nothing was asked), and this process's highest memory in bytes.
        """
        from actors.passage_index import exact_top_k

        recalls: list[float] = []
        if self._audited:
            queries = np.concatenate([query for query, _ in self._audited])
            k = self._audited[0][1].shape[1]
            _, exact = exact_top_k(queries, self._parts(), k)
            found = np.concatenate([rows for _, rows in self._audited])
            recalls = [len(np.intersect1d(*pair)) / k for pair in zip(found, exact, strict=True)]
        return {
            "kind": self.kind,
            "on_gpu": getattr(self._index, "on_gpu", False),
            "recall": float(np.mean(recalls)) if recalls else 1.0,
            "num_audited": len(recalls),
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }

    def _sample(self, num_wanted: int, num_vectors: int) -> np.ndarray:
        """Draws about so many vectors from all shards."""
        draw, parts = np.random.default_rng(0), self._parts()
        share = min(1.0, num_wanted / num_vectors)
        return np.concatenate([part[draw.random(len(part)) < share] for part in parts])

    def _parts(self) -> Iterator[np.ndarray]:
        for shard in self._shards:
            yield column_vectors(self._embeddings.shard(shard, ["embedding"])["embedding"])


def _read_ids(embeddings: Artifact, shards: Sequence[FileEntry]) -> np.ndarray:
    """Returns passage ids in the order of rows, as bytes: 16 a passage instead of 100."""
    parts = [embeddings.shard(shard, ["id"])["id"].to_pylist() for shard in shards]
    return np.concatenate([np.array(part, dtype=np.bytes_) for part in parts])


@dataclass(frozen=True, kw_only=True)
class FindCandidates(Stage):
    """Queries in, queries with their nearest passages out, the seed always among them."""

    retriever: EncoderConfig
    config: CandidatesConfig
    embeddings: Artifact
    indexes: list[Any]  # handles of IndexActor
    columns: tuple[str, ...] = tuple(QUERY.names)

    def load(self) -> StageFunction:
        """Loads the retriever and the passage ids."""
        from actors.passage_index import merge_top_k

        encoder = load_encoder(self.retriever)
        embedding = ThreadPoolExecutor(1)  # while one shard is searched for, the next is embedded
        ids = _read_ids(self.embeddings, self.embeddings.shards)

        async def find(queries: pa.Table) -> StageOutput:
            rows = [row | _NO_CANDIDATES for row in queries.to_pylist()]
            asked = [row for row in rows if row["dropped_by"] is None]
            if asked:
                await search(asked)
            ranks = [row["seed_rank"] for row in asked]
            return StageOutput(
                rows=pa.Table.from_pylist(rows, schema=CANDIDATES),
                metrics={
                    "num_asked": len(asked),
                    "num_seeds_first": ranks.count(1),
                    "num_seeds_missed": ranks.count(0),
                },
            )

        async def search(rows: list[dict[str, Any]]) -> None:
            ask = encoder.templates.format_query
            texts = [ask(row["query"], task=row["task"]) for row in rows]
            run = asyncio.get_running_loop().run_in_executor
            vectors = await run(embedding, encoder.encode, texts)
            k = min(self.config.num_candidates, len(ids))
            seeds = sorted({row["seed_id"] for row in rows})
            found = await asyncio.gather(
                *(index.search.remote(vectors, k) for index in self.indexes)
            )
            parts = await asyncio.gather(*(index.vectors.remote(seeds) for index in self.indexes))
            seed_vectors = {id_: vector for part in parts for id_, vector in part.items()}
            similarities, places = merge_top_k(found, k)
            for number, row in enumerate(rows):
                held = places[number] >= 0
                near = ids[places[number][held]].astype(str).tolist()
                row["seed_rank"] = near.index(row["seed_id"]) + 1 if row["seed_id"] in near else 0
                row["candidate_ids"] = near
                row["similarities"] = similarities[number][held].tolist()
                if row["seed_rank"] == 0:
                    near[-1] = row["seed_id"]
                    row["similarities"][-1] = float(vectors[number] @ seed_vectors[near[-1]])
                limit = self.config.max_seed_rank
                if limit is not None and not 0 < row["seed_rank"] <= limit:
                    row["dropped_by"] = "round trip failed"

        return find


def check_index(config: CandidatesConfig, resources: StageResources) -> None:
    """Raises ValueError for an index that the GPUs it is given cannot hold."""
    if resources.num_gpus <= 0:
        return
    if config.index not in ("auto", "flat"):
        raise ValueError(
            f"candidates.index: {config.index!r} with resources.index.num_gpus"
            f" {resources.num_gpus:g}; on a GPU accepted are auto and flat: set num_gpus to 0 to"
            f" search {config.index} on the CPU"
        )
    if resources.num_actors > 1 and resources.num_gpus <= 0.5:
        raise ValueError(
            f"resources.index.num_gpus: {resources.num_gpus:g} for each of {resources.num_actors}"
            " actors, of which Ray would put two on one GPU; accepted is more than 0.5, such as 0.6"
            " beside an encoder's 0.4, or 0 for the CPU"
        )


def find_candidates(
    config: CandidatesConfig,
    retriever: EncoderConfig,
    resources: StageResources,
    index_resources: StageResources,
    context: StepContext,
) -> dict[str, Json]:
    """Starts the FAISS actors, then streams the queries past them."""
    import ray

    embeddings = context.input("embeddings")
    shards = list(embeddings.shards)
    num_indexes = min(index_resources.num_actors, len(shards))
    size = -(-len(shards) // num_indexes)
    indexes, first_row = [], 0
    actor = ray.remote(IndexActor).options(
        num_cpus=index_resources.num_cpus,
        num_gpus=index_resources.num_gpus,
        max_restarts=-1,
        max_task_retries=-1,
        resources=index_resources.custom,
    )
    clear_actors(context.storage, INDEX_ACTORS)
    for start in range(0, len(shards), size):
        part = shards[start : start + size]
        indexes.append(
            actor.remote(
                embeddings, part, first_row, config.index, index_resources, context.storage
            )
        )
        first_row += sum(shard.num_rows or 0 for shard in part)
    stage = FindCandidates(
        retriever=retriever,
        config=config,
        embeddings=embeddings,
        indexes=indexes,
        resources=resources,
    )
    try:
        # They have their places before the encoders come: each of those would wait for all of them.
        with report_waiting(context, INDEX_ACTORS, len(indexes), index_resources.needs):
            ray.get([index.__ray_ready__.remote() for index in indexes])
        metrics = run_stage(stage, context.input("queries"), context)
        audits = ray.get([index.audit.remote() for index in indexes])
    except ray.exceptions.RayError as error:
        raise reported_error(str(error), "an actor failed") from error
    finally:
        for index in indexes:
            ray.kill(index)
    return metrics | {
        "index": sorted({audit["kind"] for audit in audits}),
        "index_num_on_gpu": sum(audit["on_gpu"] for audit in audits),
        "index_recall": round(float(np.mean([audit["recall"] for audit in audits])), 4),
        "index_num_audited": sum(audit["num_audited"] for audit in audits),
        "index_peak_bytes": max(audit["peak_bytes"] for audit in audits),
    }
