"""The step `candidates`: each query's nearest passages, through encoder and FAISS actors."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from actors.index_actor import INDEX_ACTORS, IndexActor
from actors.passage_index import IndexKind, merge_top_k
from cluster.actor_health import clear_actors, report_waiting
from cluster.artifacts import Artifact, FileEntry, Json
from cluster.config import Config
from cluster.ray_errors import reported_error
from cluster.stages import Stage, StageFunction, StageOutput, StageResources, run_stage
from cluster.steps import Step, StepContext
from pipelines.encoders import EncoderConfig, load_encoder
from pipelines.fingerprints import fingerprinted
from pipelines.mining.embeddings import column_vectors
from pipelines.mining.round_trip import failed_round_trip, seed_rank
from pipelines.records import CANDIDATES, QUERY

if TYPE_CHECKING:
    from pipelines.recipe.recipe import Recipe

TITLE = "find each query's neighbours"


class CandidatesConfig(Config):
    """How many neighbours a query gets, and on how many FAISS actors they are searched."""

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


def step(recipe: Recipe) -> Step:
    """Returns the step."""
    resources = recipe.resources
    return Step(
        name="candidates",
        config={
            "retriever": fingerprinted(recipe.retriever),
            **fingerprinted(recipe.candidates),
        },
        inputs=("queries", "embeddings"),
        work=lambda context: find_candidates(
            recipe.candidates,
            recipe.retriever,
            resources.encoder,
            resources.index,
            context,
        ),
    )


_NO_CANDIDATES: dict[str, Any] = {"candidate_ids": [], "similarities": [], "seed_rank": None}


@dataclass(frozen=True, kw_only=True)
class EmbeddingShards:
    """Some shards of the embeddings; an `actors.index_actor.IndexedVectors`."""

    embeddings: Artifact
    shards: Sequence[FileEntry]

    def __len__(self) -> int:
        return sum(shard.num_rows or 0 for shard in self.shards)

    def ids(self) -> np.ndarray:
        """Reads the passage ids as bytes: 16 a passage instead of 100."""
        parts = [self.embeddings.shard(shard, ["id"])["id"].to_pylist() for shard in self.shards]
        return np.concatenate([np.array(part, dtype=np.bytes_) for part in parts])

    def parts(self) -> Iterator[np.ndarray]:
        """Reads the vectors, a shard at a time."""
        for shard in self.shards:
            yield column_vectors(self.embeddings.shard(shard, ["embedding"])["embedding"])


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
        encoder = load_encoder(self.retriever)
        embedding = ThreadPoolExecutor(1)  # while one shard is searched for, the next is embedded
        ids = EmbeddingShards(embeddings=self.embeddings, shards=self.embeddings.shards).ids()

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
                row["seed_rank"] = seed_rank(row["seed_id"], near)
                row["candidate_ids"] = near
                row["similarities"] = similarities[number][held].tolist()
                if row["seed_rank"] == 0:
                    near[-1] = row["seed_id"]
                    row["similarities"][-1] = float(vectors[number] @ seed_vectors[near[-1]])
                row["dropped_by"] = failed_round_trip(row["seed_rank"], self.config.max_seed_rank)

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
        part = EmbeddingShards(embeddings=embeddings, shards=shards[start : start + size])
        indexes.append(
            actor.remote(part, first_row, config.index, index_resources, context.storage)
        )
        first_row += len(part)
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
