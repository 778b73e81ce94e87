"""The step `candidates`: each query's nearest passages, through encoder and FAISS actors.

With `candidates.lexical`, an actor that holds BM25's index of all passages finds some too.
"""

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
from actors.lexical_index import LexicalIndexActor
from actors.passage_index import IndexKind, merge_top_k
from cluster.actor_health import clear_actors, report_waiting
from cluster.artifacts import Artifact, Joined, Json
from cluster.config import Config
from cluster.file_list import FileList
from cluster.ray_errors import reported_error
from cluster.stages import Stage, StageFunction, StageOutput, StageResources, run_stage
from cluster.steps import Step, StepContext
from pipelines.encoders import EncoderConfig, load_encoder
from pipelines.fingerprints import fingerprinted
from pipelines.mining.embeddings import column_vectors
from pipelines.mining.hybrid import (
    DEPTH,
    NUM_SAMPLED,
    LexicalConfig,
    best_places,
    hybrid_scores,
)
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
        description="flat is exact; ivf and pq are not, and their recall is audited; auto: by"
        " an actor's bytes of float32 vectors: flat where they fit its GPU, and on the CPU to"
        " 256 MiB, ivf to 32 GiB, then pq",
    )
    max_seed_rank: int | None = Field(
        default=None,
        ge=1,
        description="round trip: drop queries whose seed the retriever ranks lower, before they"
        " are scored; for small LLMs, whose queries wander. Gecko has no such rule",
    )
    lexical: LexicalConfig | None = Field(
        default=None,
        description="choose and order them by similarity and BM25 together, each standardised over"
        " the corpus; BM25 reads the query alone, and titles with their texts. Gecko has none",
    )

    @property
    def ordered_by(self) -> str:
        """Whose scores order the candidates, as `fret.fusion` names its judges."""
        return "hybrid" if self.lexical else "sim"


def step(recipe: Recipe) -> Step:
    """Returns the step."""
    resources = recipe.resources
    return Step(
        name="candidates",
        config={
            "retriever": fingerprinted(recipe.retriever),
            **fingerprinted(recipe.candidates),
        },
        inputs=(
            "queries",
            *(["corpus_queries"] if recipe.corpus_queries else []),
            "embeddings",
        ),
        work=lambda context: find_candidates(
            recipe.candidates,
            recipe.retriever,
            resources.encoder,
            resources.index,
            context,
        ),
    )


_NO_CANDIDATES: dict[str, Any] = {
    "candidate_ids": [],
    "similarities": [],
    "lexical": [],
    "hybrid": [],
    "seed_rank": None,
}


@dataclass(frozen=True, kw_only=True)
class EmbeddingShards:
    """Some shards of the embeddings, as the index actors read their vectors or texts."""

    embeddings: Artifact
    shards: FileList

    def __len__(self) -> int:
        return self.shards.num_rows

    def ids(self) -> np.ndarray:
        """Reads the passage ids as bytes: 16 a passage instead of 100."""
        parts = [self.embeddings.shard(shard, ["id"])["id"].to_pylist() for shard in self.shards]
        return np.concatenate([np.array(part, dtype=np.bytes_) for part in parts])

    def parts(self) -> Iterator[np.ndarray]:
        """Reads the vectors, a shard at a time."""
        for shard in self.shards:
            yield column_vectors(self.embeddings.shard(shard, ["embedding"])["embedding"])

    def texts(self) -> Iterator[list[str]]:
        """Reads the passages with their titles, a shard at a time."""
        for shard in self.shards:
            rows = self.embeddings.shard(shard, ["title", "text"]).to_pylist()
            yield [f"{row['title']} {row['text']}" for row in rows]


@dataclass(frozen=True, kw_only=True)
class FindCandidates(Stage):
    """Queries in, queries with their nearest passages out, the seed always among them."""

    retriever: EncoderConfig
    config: CandidatesConfig
    embeddings: Artifact
    indexes: list[Any]  # handles of IndexActor
    lexical: Any = None  # the handle of LexicalIndexActor
    columns: tuple[str, ...] = tuple(QUERY.names)

    def load(self) -> StageFunction:
        """Loads the retriever and the passage ids."""
        encoder = load_encoder(self.retriever)
        embedding = ThreadPoolExecutor(1)  # while one shard is searched for, the next is embedded
        ids = EmbeddingShards(embeddings=self.embeddings, shards=self.embeddings.shards).ids()
        search = CandidateSearch(self.config, ids, self.indexes, self.lexical)

        async def find(queries: pa.Table) -> StageOutput:
            rows = [row | _NO_CANDIDATES for row in queries.to_pylist()]
            asked = [row for row in rows if row["dropped_by"] is None]
            if asked:
                ask = encoder.templates.format_query
                texts = [ask(row["query"], task=row["task"]) for row in asked]
                run = asyncio.get_running_loop().run_in_executor
                await search.find(asked, await run(embedding, encoder.encode, texts))
            ranks = [row["seed_rank"] for row in asked]
            return StageOutput(
                rows=pa.Table.from_pylist(rows, schema=CANDIDATES),
                metrics={
                    "num_asked": len(asked),
                    "num_seeds_first": ranks.count(1),
                    "num_seeds_missed": ranks.count(0),
                },
            )

        return find


class CandidateSearch:
    """Asks the index actors for the candidates of queries."""

    def __init__(
        self, config: CandidatesConfig, ids: np.ndarray, indexes: Sequence[Any], lexical: Any
    ) -> None:
        """Takes the ids of all passages as bytes, and the handles of the actors."""
        self._config, self._indexes, self._lexical = config, indexes, lexical
        self._ids, self._by_id = ids, np.argsort(ids)
        self._sample: np.ndarray | None = None

    async def find(self, rows: Sequence[dict[str, Any]], vectors: np.ndarray) -> None:
        """Adds their columns of `CANDIDATES` to queries that have these vectors.

        Best are those of the highest similarity, or sum with BM25; equal ones are ordered by id.
        """
        lexical = self._config.lexical
        k = min(self._config.num_candidates, len(self._ids))
        depth = min(DEPTH * k, len(self._ids)) if lexical else k
        found = await asyncio.gather(
            *(index.search.remote(vectors, depth) for index in self._indexes)
        )
        similarities, nearest = merge_top_k(found, depth)
        seeds = np.array([row["seed_id"] for row in rows], dtype=self._ids.dtype)
        seeds = self._by_id[np.searchsorted(self._ids, seeds, sorter=self._by_id)]
        # Of each query the seed, then what the retriever found and, below, what BM25 did.
        passages = np.column_stack([seeds, nearest])
        if lexical:
            queries = [row["query"] for row in rows]
            hits = await self._lexical.search.remote(queries, depth, passages)
            passages = hits.rows
        similarities = await self._similarities(vectors, passages, similarities)
        columns, order_by = {"similarities": similarities}, similarities
        if lexical:
            sample = await self._sampled()
            order_by = hybrid_scores(similarities, vectors, sample, hits, lexical.weight)
            columns |= {"lexical": hits.scores, "hybrid": order_by}
        for number, row in enumerate(rows):
            places = 1 + best_places(passages[number, 1:], order_by[number, 1:], self._ids, k)
            best = self._ids[passages[number, places]].astype(str).tolist()
            row["seed_rank"] = seed_rank(row["seed_id"], best)
            if row["seed_rank"] == 0:
                best[-1], places[-1] = row["seed_id"], 0
            row["candidate_ids"] = best
            row |= {name: scores[number, places].tolist() for name, scores in columns.items()}
            row["dropped_by"] = failed_round_trip(row["seed_rank"], self._config.max_seed_rank)

    async def _similarities(
        self, vectors: np.ndarray, passages: np.ndarray, of_nearest: np.ndarray
    ) -> np.ndarray:
        """Returns float32 ``[queries, n]``: as searched, or of stored vectors; 0 where is none."""
        similarities = np.zeros(passages.shape, np.float32)
        searched = np.s_[:, 1 : 1 + of_nearest.shape[1]]
        similarities[searched] = np.where(passages[searched] < 0, 0, of_nearest)
        others = passages.copy()
        others[searched] = -1
        queries, columns = np.nonzero(others >= 0)
        rows, which = np.unique(others[queries, columns], return_inverse=True)
        pairs = (await self._vectors(rows))[which], vectors[queries]
        similarities[queries, columns] = np.einsum("nd,nd->n", *pairs, dtype=np.float64)
        return similarities

    async def _sampled(self) -> np.ndarray:
        """Returns the vectors of passages that stand for all, always the same ones of a corpus."""
        if self._sample is None:  # ids are hashes: the first in their order are a random draw
            self._sample = await self._vectors(self._by_id[:NUM_SAMPLED])
        return self._sample

    async def _vectors(self, rows: np.ndarray) -> np.ndarray:
        """Returns the vectors of passages by their numbers among all, ``[rows, dimensions]``."""
        ids = self._ids[rows].astype(str).tolist()
        parts = await asyncio.gather(*(index.vectors.remote(ids) for index in self._indexes))
        held = {id_: vector for part in parts for id_, vector in part.items()}
        return np.stack([held[id_] for id_ in ids])


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
    """Starts the FAISS actors and BM25's, if there is to be one; streams the queries past them."""
    import ray

    embeddings = context.input("embeddings")
    shards = embeddings.shards
    num_indexes = min(index_resources.num_actors, len(shards))
    size = -(-len(shards) // num_indexes)
    indexes, first_row = [], 0
    index_actor = ray.remote(IndexActor).options(
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
            index_actor.remote(part, first_row, config.index, index_resources, context.storage)
        )
        first_row += len(part)
    lexical: list[Any] = []
    if config.lexical:
        texts = EmbeddingShards(embeddings=embeddings, shards=shards)
        lexical_actor = ray.remote(LexicalIndexActor).options(
            num_cpus=index_resources.num_cpus,
            max_restarts=-1,
            max_task_retries=-1,
            resources=index_resources.custom,
        )
        lexical = [
            lexical_actor.remote(
                texts,
                INDEX_ACTORS,
                context.storage,
                k1=config.lexical.k1,
                b=config.lexical.b,
                stemmer=config.lexical.stemmer,
            )
        ]
    actors = [*indexes, *lexical]
    stage = FindCandidates(
        retriever=retriever,
        config=config,
        embeddings=embeddings,
        indexes=indexes,
        lexical=lexical[0] if lexical else None,
        resources=resources,
    )
    try:
        # They have their places before the encoders come: each of those would wait for all of them.
        with report_waiting(context, INDEX_ACTORS, len(actors), index_resources.needs):
            ray.get([actor.__ray_ready__.remote() for actor in actors])
        names = [name for name in ("queries", "corpus_queries") if name in context.inputs]
        metrics = run_stage(stage, Joined.of(*map(context.input, names)), context)
        audits = ray.get([index.audit.remote() for index in indexes])
    except ray.exceptions.RayError as error:
        raise reported_error(str(error), "an actor failed") from error
    finally:
        for actor in actors:
            ray.kill(actor)
    return metrics | {
        "index": sorted({audit["kind"] for audit in audits}),
        "index_num_on_gpu": sum(audit["on_gpu"] for audit in audits),
        "index_recall": round(float(np.mean([audit["recall"] for audit in audits])), 4),
        "index_num_audited": sum(audit["num_audited"] for audit in audits),
        "index_peak_bytes": max(audit["peak_bytes"] for audit in audits),
    }
