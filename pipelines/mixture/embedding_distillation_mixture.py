"""The step `embedding_distillation_mixture`: texts, and the vectors of them that a teacher gives.

They are the run's passages and the LLM's queries, in the batches and the order of the training. The
retriever's vectors of passages lie in `embeddings`; what else is needed is embedded here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.artifacts import Artifact, Json, unfinished_artifact
from cluster.errors import UserError
from cluster.exchange import Shared, run_exchange
from cluster.file_list import shard_path
from cluster.files import FileEntry
from cluster.shard_groups import ShardGroup, shard_groups
from cluster.stages import StageResources, run_stage
from cluster.steps import Step, StepContext
from cluster.storage import Storage, write_table
from pipelines.corpus.held_out import HELD_OUT
from pipelines.datasets.decontamination import Decontamination
from pipelines.encoders import EncoderConfig, saved_encoder
from pipelines.fingerprints import fingerprinted
from pipelines.mining.embeddings import EmbedPassages, EmbedTexts, vector_column
from pipelines.mixture.config import TextsConfig
from pipelines.mixture.formats import Format
from pipelines.mixture.passage_draw import Draw, DrawnPassages, drawn_passages
from pipelines.mixture.sampling import Rows, draw_batches
from pipelines.mixture.sources import EXAMPLES_PER_SHARD, batches_in_order
from pipelines.mixture.stored_rows import (
    SHARDS_A_SET,
    TEXTS_PER_GROUP,
    Batches,
    Places,
    WriteBatches,
    part,
    read_keys,
    with_keys,
    write_rows,
    write_validation,
)
from pipelines.records import TEXT

if TYPE_CHECKING:
    from actors.encoder import Encoder
    from pipelines.recipe.recipe import Recipe

TITLE = "mix the batches of embedding distillation"

_SETS = ("passages", "queries")
_OF_TRAINING = ("batch_size", "epochs", "max_query_tokens", "max_passage_tokens")


def step(recipe: Recipe, decontamination: Decontamination) -> Step:
    """Returns the step of a recipe with that stage; `decontamination` knows the run's test sets."""
    stage = recipe.embedding_distillation
    assert stage is not None
    config, training = stage.mixture, stage.training
    # The retriever's vectors of the passages are there.
    of_passages = ("passages",) if stage.teacher else ("passages", "embeddings")

    def mix(context: StepContext) -> dict[str, Json]:
        student = context.input("student")
        teacher = Teacher(
            encoder=stage.teacher or recipe.retriever,
            dimensions=student.manifest.metrics["dimensions"],
            resources=recipe.resources.encoder,
        )
        format_ = Format(
            student=saved_encoder(student, recipe.student),
            max_query_tokens=training.max_query_tokens,
            max_passage_tokens=training.max_passage_tokens,
        )
        return make_mixture(
            config,
            format_=format_,
            teacher=teacher,
            decontamination=decontamination,
            batch_size=training.batch_size,
            epochs=training.epochs,
            context=context,
        )

    return Step(
        name="embedding_distillation_mixture",
        config={
            "mixture": fingerprinted(config),
            "teacher": fingerprinted(stage.teacher or recipe.retriever),
            **training.model_dump(include=set(_OF_TRAINING)),
            "decontamination": decontamination.fingerprint() if config.queries else None,
        },
        inputs=("student", *of_passages, *(("queries",) if config.queries else ())),
        work=mix,
    )


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Who gives the vectors.

    Attributes:
        encoder: The model.
        dimensions: The student's, which the teacher's must equal.
        resources: Of the actors that embed with it.
    """

    encoder: EncoderConfig
    dimensions: int
    resources: StageResources

    def check(self, dimensions: int) -> None:
        """Raises UserError unless the teacher's vectors are as long as the student's."""
        if dimensions != self.dimensions:
            raise UserError(
                f"embedding_distillation: the vectors of its teacher {self.encoder.model} have"
                f" {dimensions} dimensions, and the student's {self.dimensions}: name an"
                " embedding_distillation.teacher of as many, or change student.projection"
            )


@dataclass(frozen=True, kw_only=True)
class EmbedDrawn(EmbedPassages):
    """Passages in, passages with the teacher's vectors out; null where they are not drawn."""

    teacher: Teacher
    draw: Draw

    def texts(self, encoder: Encoder, rows: pa.Table) -> list[str]:
        """Returns the texts of the passages that are drawn."""
        self.teacher.check(encoder.dimensions)
        return super().texts(encoder, rows.filter(pa.array(self.draw.includes(rows["id"]))))

    def output(self, rows: pa.Table, vectors: np.ndarray) -> pa.Table:
        """Returns all the passages, with the vectors of those that are drawn."""
        drawn = self.draw.includes(rows["id"])
        places = pa.array(np.cumsum(drawn) - 1, mask=~drawn)
        return rows.append_column("embedding", vector_column(vectors).take(places))


@dataclass(frozen=True, kw_only=True)
class EmbedQueries(EmbedTexts):
    """Queries in, queries with the teacher's vectors out."""

    teacher: Teacher
    columns: tuple[str, ...] = ("task", "query", "dropped_by")

    def texts(self, encoder: Encoder, rows: pa.Table) -> list[str]:
        """Returns the queries in the teacher's template."""
        self.teacher.check(encoder.dimensions)
        return _format_queries(encoder, rows)

    def output(self, rows: pa.Table, vectors: np.ndarray) -> pa.Table:
        """Returns the queries with their vectors."""
        return rows.append_column("embedding", vector_column(vectors))


@dataclass(frozen=True, kw_only=True)
class WriteTexts(WriteBatches):
    """Texts are tokenised, and meet in their batches."""

    rows_per_group: int | None = TEXTS_PER_GROUP
    schema: pa.Schema = TEXT
    format_: Format

    def split(self, source: ShardGroup) -> pa.Table:
        """Returns the texts of a source at their places, each tokenised once."""
        return self.placed(source, self.places.get(), self._tokenised)

    def _tokenised(self, rows: pa.Table) -> pa.Table:
        of_queries = rows["dataset"][0].as_py() == _SETS[1]
        limit = self.format_.max_query_tokens if of_queries else self.format_.max_passage_tokens
        tokens = self.format_.load().encoder.tokenize(rows["text"].to_pylist(), max_tokens=limit)
        return rows.append_column("tokens", pa.array(tokens, pa.list_(pa.int32())))


def make_mixture(
    config: TextsConfig,
    *,
    format_: Format,
    teacher: Teacher,
    decontamination: Decontamination,
    batch_size: int,
    epochs: float,
    context: StepContext,
) -> dict[str, Json]:
    """Embeds what has no vector, draws the batches of passages and queries, and writes them.

    Each set is drawn by its number of texts; queries are drawn once, whoever repeats them. Left out
    are those with nothing in them, those that are held out for the gate, and those that repeat a
    query the run is judged by. The driver holds 32 bytes a text, and 16 for each of its places.

    Raises:
        UserError: There is no text, or the teacher's vectors have another length.
    """
    context.log.resume()  # so that what is held out does not begin it anew
    tasks = _passage_tasks(config, format_, teacher, context)
    if config.queries:
        tasks += _query_tasks(format_, teacher, decontamination, context)
    own = part(context, "texts")
    texts, told = write_rows(_run, [(task, own.storage) for task in tasks], own)
    held_out, sets = _hold_out(_different(read_keys(texts, len(_SETS))), config)
    names = [name for name, rows in zip(_SETS, sets, strict=True) if len(rows)]
    sets = [rows for rows in sets if len(rows)]
    if not sets:
        raise UserError("embedding distillation has no text: the corpus gave no passage")
    num_texts = sum(map(len, sets))
    num_batches = max(1, round(epochs * num_texts / batch_size))
    drawn_from = [
        Rows(name=name, weight=len(rows), keys=np.arange(len(rows))[:, None])
        for name, rows in zip(names, sets, strict=True)
    ]
    batches = list(draw_batches(drawn_from, batch_size, num_batches, config.seed))
    per_shard = max(1, EXAMPLES_PER_SHARD // batch_size)

    def exchange(
        sets: Sequence[np.ndarray], batches: Batches
    ) -> tuple[WriteTexts, list[ShardGroup]]:
        places = Places.of(batches, sets)
        write = WriteTexts.of(batches, per_shard, places, format_=format_)
        return write, places.sources(texts)

    in_order = batches_in_order(list(map(len, held_out)), batch_size)
    if in_order:
        write_validation(*exchange(held_out, in_order), context)
    run_exchange(*exchange(sets, batches), context)
    drawn = Counter(place for place, _ in batches)
    counts = {"num_decontaminated": sum(told)} if config.queries else {}
    return counts | {
        "num_batches": num_batches,
        "num_examples": num_texts,
        "num_validation_examples": sum(map(len, held_out)),
        "sets": {name: len(rows) for name, rows in zip(names, sets, strict=True)},
        "batches": {name: drawn[place] for place, name in enumerate(names)},
    }


def _passage_tasks(
    config: TextsConfig, format_: Format, teacher: Teacher, context: StepContext
) -> list[_WritePassages | _WriteQueries]:
    """Returns tasks that write the passages which are drawn.

    Their vectors are those of `embeddings`, or the teacher's.
    """
    texts = context.input("passages")
    draw = Draw.of(texts, config.max_passages, config.seed)
    if "embeddings" in context.inputs:
        vectors = context.input("embeddings")
    else:
        stage = EmbedDrawn(
            encoder=teacher.encoder,
            resources=teacher.resources,
            columns=("id", "title", "text"),
            teacher=teacher,
            draw=draw,
        )
        vectors = _embedded(stage, texts, _SETS[0], context)
    return [
        _WritePassages(format_=format_, teacher=teacher, passages=some)
        for some in drawn_passages(draw, vectors, texts)
    ]


def _query_tasks(
    format_: Format, teacher: Teacher, decontamination: Decontamination, context: StepContext
) -> list[_WritePassages | _WriteQueries]:
    """Returns tasks that write the queries which may be trained on, as often as they are there."""
    stage = EmbedQueries(encoder=teacher.encoder, resources=teacher.resources, teacher=teacher)
    embedded = _embedded(stage, context.input("queries"), _SETS[1], context)
    known = Shared.of(decontamination)
    return [
        _WriteQueries(format_=format_, queries=group, known=known)
        for group in shard_groups(embedded)
    ]


def _embedded(stage: EmbedTexts, source: Artifact, folder: str, context: StepContext) -> Artifact:
    """Embeds what an earlier attempt has not; returns all."""
    own = part(context, folder)
    run_stage(stage, source, own)
    return unfinished_artifact(own.storage, own.log.files())


def _run(task: _WritePassages | _WriteQueries, storage: Storage) -> tuple[list[FileEntry], int]:
    return task.write(storage)


@dataclass(frozen=True, kw_only=True)
class _WritePassages:
    format_: Format
    teacher: Teacher
    passages: DrawnPassages

    def write(self, storage: Storage) -> tuple[list[FileEntry], int]:
        """Writes a shard for each of the passages'."""
        encoder, written = self.format_.load().encoder, []
        for number, rows in enumerate(self.passages.tables(), self.passages.vectors.number):
            if rows.num_rows:
                self.teacher.check(len(rows["embedding"][0]))
            texts = encoder.format_passages(rows["text"].to_pylist(), rows["title"].to_pylist())
            written.append(_write(storage, 0, number, texts, rows["embedding"]))
        return written, 0


@dataclass(frozen=True, kw_only=True)
class _WriteQueries:
    format_: Format
    queries: ShardGroup
    known: Shared

    def write(self, storage: Storage) -> tuple[list[FileEntry], int]:
        """Writes a shard for each of the queries'; counts those that repeat evaluation queries."""
        encoder, known = self.format_.load().encoder, self.known.get()
        written, num_repeated = [], 0
        for number, rows in enumerate(self.queries.tables(), self.queries.number):
            fit = [
                bool(query) and reason != HELD_OUT
                for query, reason in zip(
                    rows["query"].to_pylist(), rows["dropped_by"].to_pylist(), strict=True
                )
            ]
            rows = rows.filter(pa.array(fit, pa.bool_()))
            repeated = [bool(known.repeated(query)) for query in rows["query"].to_pylist()]
            num_repeated += sum(repeated)
            rows = rows.filter(pc.invert(pa.array(repeated, pa.bool_())))
            texts = _format_queries(encoder, rows)
            written.append(_write(storage, 1, number, texts, rows["embedding"]))
        return written, num_repeated


def _write(
    storage: Storage, of_set: int, number: int, texts: list[str], vectors: pa.ChunkedArray
) -> FileEntry:
    names = [_SETS[of_set]] * len(texts)
    columns = {
        "dataset": pa.array(names, pa.string()),
        "text": pa.array(texts, pa.string()),
        "embedding": vectors,
    }
    rows = with_keys(pa.table(columns), tasks=names, queries=texts, positives=texts, symmetric=True)
    return write_table(storage, shard_path(of_set * SHARDS_A_SET + number), rows)


def _format_queries(encoder: Encoder, rows: pa.Table) -> list[str]:
    pairs = zip(rows["query"].to_pylist(), rows["task"].to_pylist(), strict=True)
    return [encoder.templates.format_query(query or "", task=task) for query, task in pairs]


def _different(keys: list[np.ndarray]) -> list[np.ndarray]:
    """Returns the numbers of the rows of each set; of equal queries that of the first."""
    passages, queries = keys
    _, first = np.unique(queries["query"], return_index=True)
    return [passages["row"], queries["row"][np.sort(first)]]


def _hold_out(
    sets: Sequence[np.ndarray], config: TextsConfig
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns the rows for validation, by the sets' sizes and at most a fifth; and the others."""
    total = sum(map(len, sets))
    held_out, others = [], []
    for name, rows in zip(_SETS, sets, strict=True):
        share = round(config.validation_examples * len(rows) / max(1, total))
        size = min(share, len(rows) // 5)
        draw = np.random.default_rng([config.seed, *f"held out {name}".encode()])
        order = draw.permutation(len(rows))
        held_out.append(rows[np.sort(order[:size])])
        others.append(rows[np.sort(order[size:])] if size else rows)
    return held_out, others
