"""The step `candidates`: each query's nearest passages, through encoder and FAISS actors."""

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from cluster.artifacts import Artifact, FileEntry, Json
from cluster.stages import StageFunction, StageOutput, StageResources, run_stage
from cluster.steps import StepContext
from pipelines.encoders import EncoderConfig, column_vectors, load_encoder
from pipelines.records import CANDIDATES, QUERY


class CandidatesConfig(BaseModel):
    """How many neighbours a query gets, and on how many FAISS actors they are searched."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_candidates: int = Field(default=20, ge=2, description="Gecko's N, by its name p20")
    max_seed_rank: int | None = Field(
        default=None,
        ge=1,
        description="round trip: drop queries whose seed the retriever ranks lower, before they"
        " are scored; for small LLMs, whose queries wander. Gecko has no such rule",
    )


_NO_CANDIDATES: dict[str, Any] = {"candidate_ids": [], "similarities": [], "seed_rank": None}


class IndexActor:
    """One FAISS index over some of the embedding shards; runs as a Ray actor."""

    def __init__(self, embeddings: Artifact, shards: list[FileEntry], first_row: int, gpu: bool):
        """Reads the shards and builds the index; `first_row` is their first row in the whole."""
        from actors.passage_index import PassageIndex

        self._first_row = first_row
        tables = [embeddings.shard(shard, ["id", "embedding"]) for shard in shards]
        ids = [id_ for table in tables for id_ in table["id"].to_pylist()]
        self._rows = {id_: row for row, id_ in enumerate(ids)}
        vectors = [column_vectors(table["embedding"]) for table in tables]
        self._index = PassageIndex(vectors[0].shape[1], gpu=gpu)
        for part in vectors:
            self._index.add(part)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns similarities float32 and rows of the whole, both ``[queries, k]``."""
        similarities, rows = self._index.search(queries, k)
        return similarities, rows + self._first_row

    def vectors(self, ids: list[str]) -> dict[str, np.ndarray]:
        """Returns the embeddings of those passages that this index holds."""
        found = [id_ for id_ in ids if id_ in self._rows]
        rows = np.array([self._rows[id_] for id_ in found], dtype=np.int64)
        return dict(zip(found, self._index.vectors(rows), strict=True)) if found else {}


@dataclass(frozen=True, kw_only=True)
class FindCandidates:
    """Queries in, queries with their nearest passages out, the seed always among them."""

    retriever: EncoderConfig
    config: CandidatesConfig
    embeddings: Artifact
    indexes: list[Any]  # handles of IndexActor
    resources: StageResources
    columns: tuple[str, ...] = tuple(QUERY.names)

    def load(self) -> StageFunction:
        """Loads the retriever and the passage ids."""
        from actors.passage_index import merge_top_k

        encoder = load_encoder(self.retriever)
        ids = self.embeddings.read(["id"])["id"].to_numpy()

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
            vectors = np.concatenate(
                [encoder.encode_queries([row["query"]], task=row["task"]) for row in rows]
                if "{task}" in encoder.templates.query
                else [encoder.encode_queries([row["query"] for row in rows], task="")]
            )
            k = min(self.config.num_candidates, len(ids))
            seeds = sorted({row["seed_id"] for row in rows})
            found = await asyncio.gather(
                *(index.search.remote(vectors, k) for index in self.indexes)
            )
            parts = await asyncio.gather(*(index.vectors.remote(seeds) for index in self.indexes))
            seed_vectors = {id_: vector for part in parts for id_, vector in part.items()}
            similarities, places = merge_top_k(found, k)
            for number, row in enumerate(rows):
                near = ids[places[number]].tolist()
                row["seed_rank"] = near.index(row["seed_id"]) + 1 if row["seed_id"] in near else 0
                row["candidate_ids"] = near
                row["similarities"] = similarities[number].tolist()
                if row["seed_rank"] == 0:
                    near[-1] = row["seed_id"]
                    row["similarities"][-1] = float(vectors[number] @ seed_vectors[near[-1]])
                limit = self.config.max_seed_rank
                if limit is not None and not 0 < row["seed_rank"] <= limit:
                    row["dropped_by"] = "round trip failed"

        return find


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
        resources=(
            {index_resources.node_resource: 0.001} if index_resources.node_resource else None
        ),
    )
    for start in range(0, len(shards), size):
        part = shards[start : start + size]
        indexes.append(actor.remote(embeddings, part, first_row, index_resources.num_gpus > 0))
        first_row += sum(shard.num_rows or 0 for shard in part)
    stage = FindCandidates(
        retriever=retriever,
        config=config,
        embeddings=embeddings,
        indexes=indexes,
        resources=resources,
    )
    try:
        return run_stage(stage, context.input("queries"), context)
    finally:
        for index in indexes:
            ray.kill(index)
