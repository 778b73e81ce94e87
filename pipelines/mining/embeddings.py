"""The step `embeddings`: every passage embedded by the retriever."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from cluster.artifacts import Json
from cluster.stages import Stage, StageFunction, StageOutput, StageResources, run_stage
from cluster.steps import Step, StepContext
from pipelines.encoders import EncoderConfig, load_encoder
from pipelines.fingerprints import fingerprinted
from pipelines.records import EMBEDDING, PASSAGE

if TYPE_CHECKING:
    from actors.encoder import Encoder, Prepared
    from pipelines.recipe.recipe import Recipe

TITLE = "embed the passages"


def step(recipe: Recipe) -> Step:
    """Returns the step."""
    resources = recipe.resources.encoder
    return Step(
        name="embeddings",
        config=fingerprinted(recipe.retriever),
        inputs=("passages",),
        work=lambda context: embed_passages(recipe.retriever, resources, context),
    )


@dataclass(frozen=True, kw_only=True)
class EmbedTexts(Stage):
    """Rows in, rows with their texts' embeddings out."""

    encoder: EncoderConfig

    @abstractmethod
    def texts(self, encoder: Encoder, rows: pa.Table) -> list[str]:
        """Returns the rows' texts in the encoder's templates."""

    @abstractmethod
    def output(self, rows: pa.Table, vectors: np.ndarray) -> pa.Table:
        """Returns the rows with their vectors, float32 ``[texts, dimensions]``."""

    def load(self) -> StageFunction:
        """Loads the encoder; a shard is tokenised while the one before is embedded."""
        encoder = load_encoder(self.encoder)
        # One thread each, so that shards take turns, and torch's own threads are started once.
        tokenising, embedding = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

        def tokenise(rows: pa.Table) -> Prepared:
            return encoder.prepare(self.texts(encoder, rows))

        async def embed(rows: pa.Table) -> StageOutput:
            run = asyncio.get_running_loop().run_in_executor
            prepared = await run(tokenising, tokenise, rows)
            vectors = await run(embedding, encoder.encode_prepared, prepared)
            return StageOutput(rows=self.output(rows, vectors))

        return embed


@dataclass(frozen=True, kw_only=True)
class EmbedPassages(EmbedTexts):
    """Passages in, their embeddings out, with those of their columns that `schema` has."""

    columns: tuple[str, ...] = ("id", "title", "text")
    schema: pa.Schema = EMBEDDING

    def texts(self, encoder: Encoder, rows: pa.Table) -> list[str]:
        """Returns the passages with their titles, in the encoder's template."""
        return encoder.format_passages(rows["text"].to_pylist(), rows["title"].to_pylist())

    def output(self, rows: pa.Table, vectors: np.ndarray) -> pa.Table:
        """Returns the passages' columns with their vectors."""
        embedded = rows.append_column("embedding", vector_column(vectors))
        return embedded.select(self.schema.names).cast(self.schema)


def embed_passages(
    encoder: EncoderConfig,
    resources: StageResources,
    context: StepContext,
    schema: pa.Schema = EMBEDDING,
) -> dict[str, Json]:
    """The work of a step that embeds every passage of the run, and writes rows of `schema`."""
    read = {*schema.names, "title", "text"}
    stage = EmbedPassages(
        encoder=encoder,
        resources=resources,
        columns=tuple(name for name in PASSAGE.names if name in read),
        schema=schema,
    )
    return run_stage(stage, context.input("passages"), context)


def embedded_passages(context: StepContext) -> Iterator[pa.Table]:
    """Yields the passages with the vectors of `embeddings`: id, embedding, title, text.

    Their texts are read from `passages`, whose shards have the same rows.
    """
    embeddings, passages = context.input("embeddings"), context.input("passages")
    for shard, of_passages in zip(embeddings.shards, passages.shards, strict=True):
        rows = embeddings.shard(shard, EMBEDDING.names)
        texts = passages.shard(of_passages, ["title", "text"])
        yield rows.append_column("title", texts["title"]).append_column("text", texts["text"])


def vector_column(vectors: np.ndarray) -> pa.Array:
    """Turns float32 ``[rows, dimensions]`` into a list column."""
    offsets = np.arange(0, vectors.size + 1, vectors.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(vectors.ravel()))


def column_vectors(column: pa.ChunkedArray) -> np.ndarray:
    """Turns a list column back into float32 ``[rows, dimensions]``."""
    flat = np.asarray(column.combine_chunks().flatten(), dtype=np.float32)
    return flat.reshape(len(column), -1)
