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

from actors.index_actor import (
    INDEX_ACTORS,
    IndexActor,
    read_saved_indexes,
    write_saved_indexes,
)
from actors.lexical_index import LexicalIndexActor
from actors.passage_index import IndexKind, merge_top_k
from cluster.actor_health import clear_actors, report_waiting
from cluster.artifacts import Artifact, Joined, Json
from cluster.config import Config
from cluster.file_list import FileList, shard_number
from cluster.files import FileEntry
from cluster.ray_errors import reported_error
from cluster.stages import Stage, StageFunction, StageOutput, StageResources, run_stage
from cluster.steps import Step, StepContext
from cluster.storage import Storage
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
        " 256 MiB or, to 16 GiB, where few queries cost less than an index; ivf to 32 GiB, then pq",
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
            *(["passages"] if recipe.candidates.lexical else []),
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
    """Some shards of the embeddings, as an index actor reads them."""

    embeddings: Artifact
    shards: FileList

    @property
    def name(self) -> str:
        """Which shards they are."""
        numbers = [shard_number(self.shards[place].path) for place in (0, -1)]
        return "{:09d}-{:09d}".format(*numbers)

    def __len__(self) -> int:
        return self.shards.num_rows

    def ids(self) -> np.ndarray:
        """Reads the passage ids."""
        parts = (self.embeddings.shard(shard, ["id"]) for shard in self.shards)
        return np.concatenate([_ids(part) for part in parts])

    def parts(self) -> Iterator[np.ndarray]:
        """Reads the vectors, a shard at a time."""
        for shard in self.shards:
            yield column_vectors(self.embeddings.shard(shard, ["embedding"])["embedding"])


@dataclass(frozen=True, kw_only=True)
class PassageTexts:
    """The passages, as the actor of BM25 reads them."""

    passages: Artifact

    def parts(self) -> Iterator[tuple[np.ndarray, list[str]]]:
        """Reads ids and texts, with their titles, a shard at a time."""
        for table in self.passages.tables(["id", "title", "text"]):
            rows = table.select(["title", "text"]).to_pylist()
            yield _ids(table), [f"{row['title']} {row['text']}" for row in rows]


def _ids(table: pa.Table) -> np.ndarray:
    """Returns the ids of passages as bytes, a third of what they take as Python's texts."""
    return np.array(table["id"].to_pylist(), dtype=np.bytes_)


@dataclass(frozen=True, kw_only=True)
class FindCandidates(Stage):
    """Queries in, queries with their nearest passages out, the seed always among them."""

    retriever: EncoderConfig
    config: CandidatesConfig
    num_passages: int
    indexes: list[Any]  # handles of IndexActor
    lexical: Any = None  # the handle of LexicalIndexActor
    columns: tuple[str, ...] = tuple(QUERY.names)

    def load(self) -> StageFunction:
        """Loads the retriever."""
        encoder = load_encoder(self.retriever)
        embedding = ThreadPoolExecutor(1)  # while one shard is searched for, the next is embedded
        search = CandidateSearch(self.config, self.num_passages, self.indexes, self.lexical)

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
        self, config: CandidatesConfig, num_passages: int, indexes: Sequence[Any], lexical: Any
    ) -> None:
        """Takes the number of all passages, and the handles of the actors."""
        self._config, self._num_passages = config, num_passages
        self._indexes, self._lexical = indexes, lexical
        self._sample: np.ndarray | None = None

    async def find(self, rows: Sequence[dict[str, Any]], vectors: np.ndarray) -> None:
        """Adds their columns of `CANDIDATES` to queries that have these vectors.

        Best are those of the highest similarity, or sum with BM25; equal ones are ordered by id.
        """
        lexical = self._config.lexical
        k = min(self._config.num_candidates, self._num_passages)
        depth = min(DEPTH * k, self._num_passages) if lexical else k
        similarities, nearest = merge_top_k(await self._ask("search", vectors, depth), depth)
        seeds = np.array([[row["seed_id"]] for row in rows], dtype=np.bytes_)
        # Of each query the seed, then what the retriever found and, below, what BM25 did.
        ids = np.hstack([seeds, nearest])
        if lexical:
            queries = [row["query"] for row in rows]
            ids, hits = await self._lexical.search.remote(queries, depth, ids)
        similarities = await self._similarities(vectors, ids, similarities)
        columns, order_by = {"similarities": similarities}, similarities
        if lexical:
            sample = await self._sampled()
            order_by = hybrid_scores(similarities, vectors, sample, hits, lexical.weight)
            columns |= {"lexical": hits.scores, "hybrid": order_by}
        for number, row in enumerate(rows):
            places = 1 + best_places(ids[number, 1:], order_by[number, 1:], k)
            best = ids[number, places].astype(str).tolist()
            row["seed_rank"] = seed_rank(row["seed_id"], best)
            if row["seed_rank"] == 0:
                best[-1], places[-1] = row["seed_id"], 0
            row["candidate_ids"] = best
            row |= {name: scores[number, places].tolist() for name, scores in columns.items()}
            row["dropped_by"] = failed_round_trip(row["seed_rank"], self._config.max_seed_rank)

    async def _similarities(
        self, vectors: np.ndarray, ids: np.ndarray, of_nearest: np.ndarray
    ) -> np.ndarray:
        """Returns float32 ``[queries, n]``: as searched, or of stored vectors; 0 where is none."""
        similarities = np.zeros(ids.shape, np.float32)
        searched = np.zeros(ids.shape[1], bool)
        searched[1 : 1 + of_nearest.shape[1]] = True
        similarities[:, searched] = np.where(ids[:, searched] == b"", 0, of_nearest)
        # Each passage is held by one actor; to the others its similarity is 0.
        similarities[:, ~searched] = sum(
            await self._ask("similarities", vectors, ids[:, ~searched])
        )
        return similarities

    async def _sampled(self) -> np.ndarray:
        """Returns the vectors of passages that stand for all, always the same ones of a corpus."""
        if self._sample is None:  # ids are hashes: the first in their order are a random draw
            first = np.concatenate(await self._ask("first_ids", NUM_SAMPLED))
            ids = np.sort(first)[:NUM_SAMPLED]
            parts = await self._ask("vectors", ids)
            places, vectors = (np.concatenate(each) for each in zip(*parts, strict=True))
            self._sample = vectors[np.argsort(places)]
        return self._sample

    async def _ask(self, method: str, *arguments: Any) -> list[Any]:
        """Returns what each index actor answers."""
        asked = (getattr(index, method).remote(*arguments) for index in self._indexes)
        return list(await asyncio.gather(*asked))


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
    names = [name for name in ("queries", "corpus_queries") if name in context.inputs]
    queries = Joined.of(*map(context.input, names))
    index_actor = ray.remote(IndexActor).options(
        num_cpus=index_resources.num_cpus,
        num_gpus=index_resources.num_gpus,
        max_restarts=-1,
        max_task_retries=-1,
        resources=index_resources.custom,
    )
    clear_actors(context.storage, INDEX_ACTORS)
    indexes = []
    for start in range(0, len(shards), size):
        # A list of its own: a slice would travel with the whole.
        own = FileList.of(shards[start : start + size])
        part = EmbeddingShards(embeddings=embeddings, shards=own)
        indexes.append(
            index_actor.remote(
                part, config.index, index_resources, queries.num_rows, context.storage
            )
        )
    lexical: list[Any] = []
    if config.lexical:
        lexical_actor = ray.remote(LexicalIndexActor).options(
            num_cpus=index_resources.num_cpus,
            max_restarts=-1,
            max_task_retries=-1,
            resources=index_resources.custom,
        )
        lexical = [
            lexical_actor.remote(
                PassageTexts(passages=context.input("passages")),
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
        num_passages=embeddings.num_rows,
        indexes=indexes,
        lexical=lexical[0] if lexical else None,
        resources=resources,
    )
    try:
        # They have their places before the encoders come: each of those would wait for all of them.
        with report_waiting(context, INDEX_ACTORS, len(actors), index_resources.needs):
            for index in indexes:
                _note_saved(context.storage, ray.get(index.saved.remote()))
            ray.get([actor.__ray_ready__.remote() for actor in actors])
        metrics = run_stage(stage, queries, context)
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


def _note_saved(step: Storage, saved: FileEntry | None) -> None:
    """Notes an index that was saved, for actors that start anew, in this run or the next."""
    if saved is not None:
        files = read_saved_indexes(step)
        if files.find(saved.path) != saved:
            write_saved_indexes(step, files.plus([saved]))
