"""Which encoder a recipe means, and the stages that embed passages with it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.templates import PromptTemplates
from cluster.artifacts import Artifact, Json
from cluster.stages import StageFunction, StageOutput, StageResources, run_stage
from cluster.steps import StepContext
from pipelines.records import EMBEDDED_PASSAGE, PASSAGE

if TYPE_CHECKING:
    from actors.encoder import Encoder, Prepared


class EncoderConfig(BaseModel):
    """An encoder and the prompts around its texts; templates of None are the model's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="folder, hub id or embedded:NAME")
    max_tokens: int = Field(default=256, ge=8)
    query_template: str | None = Field(
        default=None, description="'task: {task} | query: {text}' is Gecko's"
    )
    passage_template: str | None = Field(
        default=None, description="'title: {title} | text: {text}' is Gecko's"
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    trust_remote_code: bool = Field(
        default=False,
        description="run code that comes with it; --trust-remote-code must say it too",
    )

    @model_validator(mode="after")
    def _templates_have_a_place_for_the_text(self) -> Self:
        for key in ("query_template", "passage_template"):
            template = getattr(self, key)
            try:
                PromptTemplates(**{key.removesuffix("_template"): template or "{text}"})
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
        return self


def load_encoder(
    config: EncoderConfig, device: str | None = None, pooling: str | None = None
) -> Encoder:
    """Loads the encoder that a recipe means; `device` and `pooling` as in `Encoder.load`."""
    from actors.encoder import Encoder

    return Encoder.load(
        config.model,
        max_tokens=config.max_tokens,
        dtype=config.dtype,
        device=device,
        trust_remote_code=config.trust_remote_code,
        pooling=pooling,
        query_template=config.query_template,
        passage_template=config.passage_template,
    )


@dataclass(frozen=True, kw_only=True)
class EmbedPassages:
    """Passages in, passages with their embeddings out."""

    encoder: EncoderConfig
    resources: StageResources
    columns: tuple[str, ...] = tuple(PASSAGE.names)

    def load(self) -> StageFunction:
        """Loads the encoder; a shard is tokenised while the one before is embedded."""
        encoder = load_encoder(self.encoder)
        # One thread each, so that shards take turns, and torch's own threads are started once.
        tokenising, embedding = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

        def tokenise(passages: pa.Table) -> Prepared:
            texts, titles = (passages[name].to_pylist() for name in ("text", "title"))
            return encoder.prepare(encoder.format_passages(texts, titles))

        async def embed(passages: pa.Table) -> StageOutput:
            run = asyncio.get_running_loop().run_in_executor
            prepared = await run(tokenising, tokenise, passages)
            vectors = await run(embedding, encoder.encode_prepared, prepared)
            rows = passages.append_column("embedding", vector_column(vectors))
            return StageOutput(rows=rows.cast(EMBEDDED_PASSAGE))

        return embed


def embed_passages(
    encoder: EncoderConfig, resources: StageResources, context: StepContext
) -> dict[str, Json]:
    """The work of a step that embeds every passage of the run."""
    stage = EmbedPassages(encoder=encoder, resources=resources)
    return run_stage(stage, context.input("passages"), context)


def vector_column(vectors: np.ndarray) -> pa.Array:
    """Turns float32 ``[rows, dimensions]`` into a list column."""
    offsets = np.arange(0, vectors.size + 1, vectors.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(vectors.ravel()))


def column_vectors(column: pa.ChunkedArray) -> np.ndarray:
    """Turns a list column back into float32 ``[rows, dimensions]``."""
    flat = np.asarray(column.combine_chunks().flatten(), dtype=np.float32)
    return flat.reshape(len(column), -1)


class PassageTexts:
    """Titles and texts by passage id, held as Arrow columns."""

    def __init__(self, passages: Artifact, ids: pa.ChunkedArray | None = None) -> None:
        """Reads the artifact's passages into memory, those with these ids if any are given."""
        tables = passages.tables(["id", "title", "text"])
        if ids is not None:
            tables = (table.filter(pc.is_in(table["id"], value_set=ids)) for table in tables)
        schema = pa.schema([PASSAGE.field(name) for name in ("id", "title", "text")])
        self._table = pa.concat_tables([schema.empty_table(), *tables])
        self._rows = {id_: row for row, id_ in enumerate(self._table["id"].to_pylist())}

    def __getitem__(self, passage_id: str) -> tuple[str, str]:
        """Returns (title, text); raises KeyError for an id that is not in the corpus."""
        row = self._rows[passage_id]
        return self._table["title"][row].as_py(), self._table["text"][row].as_py()
