"""The step `embedding_distillation_mixture`: texts, and the vectors of them that a teacher gives.

They are the run's passages and the LLM's queries, in the batches and the order of the training. The
retriever's vectors of passages lie in `embeddings`; what else is needed is embedded here.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from cluster.artifacts import Artifact, Json
from cluster.errors import UserError
from cluster.file_list import shard_path
from cluster.stages import StageResources, run_stage
from cluster.steps import Step, StepContext
from cluster.storage import join, open_storage, read_table, write_table
from pipelines.corpus.held_out import HELD_OUT
from pipelines.datasets.decontamination import Decontamination
from pipelines.encoders import EncoderConfig, load_encoder, saved_encoder
from pipelines.fingerprints import fingerprinted
from pipelines.mining.embeddings import (
    EmbedPassages,
    EmbedTexts,
    column_vectors,
    embedded_passages,
    vector_column,
)
from pipelines.mixture.config import TextsConfig
from pipelines.mixture.sampling import Rows, draw_batches
from pipelines.mixture.sources import EXAMPLES_PER_SHARD, VALIDATION
from pipelines.records import TEXT

if TYPE_CHECKING:
    from actors.encoder import Encoder
    from pipelines.recipe.recipe import Recipe

TITLE = "mix the batches of embedding distillation"

_TEXTS_AT_ONCE = 4096
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
        encoder = load_encoder(saved_encoder(student, recipe.student), device="cpu")
        passages = read_passages(config, encoder, teacher, context)
        sets = [replace(passages, max_tokens=training.max_passage_tokens)]
        counts: dict[str, Json] = {}
        if config.queries:
            queries, counts = read_queries(encoder, teacher, decontamination, context)
            sets.append(replace(queries, max_tokens=training.max_query_tokens))
        return counts | write_mixture(
            sets,
            config,
            encoder=encoder,
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
class Draw:
    """Which passages are drawn: those whose hash is among the lowest.

    Attributes:
        seed: Of the hash.
        highest: Of the hashes of those drawn.
    """

    seed: int
    highest: int

    @classmethod
    def of(cls, passages: Artifact, num_drawn: int, seed: int) -> Draw:
        """Draws passages of an artifact; of more, they are among those drawn too."""
        parts = [_hashes(table["id"], seed) for table in passages.tables(["id"])]
        hashes = np.concatenate([np.empty(0, np.uint64), *parts])
        if num_drawn >= len(hashes):
            return cls(seed=seed, highest=2**64 - 1)
        return cls(seed=seed, highest=int(np.partition(hashes, num_drawn - 1)[num_drawn - 1]))

    def includes(self, ids: pa.ChunkedArray) -> np.ndarray:
        """Returns bool ``[ids]``."""
        drawn: np.ndarray = _hashes(ids, self.seed) <= np.uint64(self.highest)
        return drawn


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
class Texts:
    """Texts of one kind, and what the student is to make of them.

    Attributes:
        name: Of the set.
        texts: In the student's templates.
        vectors: The teacher's, float32 ``[texts, dimensions]``.
        max_tokens: The student reads so many of each.
    """

    name: str
    texts: list[str]
    vectors: np.ndarray
    max_tokens: int = 0

    def take(self, rows: np.ndarray) -> Texts:
        """Returns some of them."""
        return replace(self, texts=[self.texts[row] for row in rows], vectors=self.vectors[rows])

    def tokens(self, encoder: Encoder) -> pa.ListArray:
        """Returns what the student reads of each."""
        parts = [pa.array([], pa.list_(pa.int32()))]
        for start in range(0, len(self.texts), _TEXTS_AT_ONCE):
            some = self.texts[start : start + _TEXTS_AT_ONCE]
            rows = encoder.tokenize(some, max_tokens=self.max_tokens)
            parts.append(pa.array(rows, pa.list_(pa.int32())))
        return pa.concat_arrays(parts)


def read_passages(
    config: TextsConfig, encoder: Encoder, teacher: Teacher, context: StepContext
) -> Texts:
    """Returns the passages that are drawn, with the vectors of `embeddings` or the teacher's."""
    source = context.input("passages")
    draw = Draw.of(source, config.max_passages, config.seed)
    columns = ["id", "title", "text"]
    tables: Iterable[pa.Table]
    if "embeddings" in context.inputs:
        tables = embedded_passages(context)
    else:
        stage = EmbedDrawn(
            encoder=teacher.encoder,
            resources=teacher.resources,
            columns=tuple(columns),
            teacher=teacher,
            draw=draw,
        )
        tables = _embedded(stage, source, "passages", context)
    texts: list[str] = []
    vectors = [np.empty((0, teacher.dimensions), np.float32)]
    for table in tables:
        drawn = table.filter(pa.array(draw.includes(table["id"])))
        if drawn.num_rows:
            titles = drawn["title"].to_pylist()
            texts += encoder.format_passages(drawn["text"].to_pylist(), titles)
            vectors.append(column_vectors(drawn["embedding"]))
            teacher.check(vectors[-1].shape[1])
    return Texts(name="passages", texts=texts, vectors=np.concatenate(vectors))


def read_queries(
    encoder: Encoder, teacher: Teacher, decontamination: Decontamination, context: StepContext
) -> tuple[Texts, dict[str, Json]]:
    """Returns the different queries with the teacher's vectors, and counts what is left out.

    Left out are those with nothing in them, those that are held out for the gate, and those that
    repeat a query the run is judged by.
    """
    stage = EmbedQueries(encoder=teacher.encoder, resources=teacher.resources, teacher=teacher)
    texts: dict[str, None] = {}
    vectors, repeated = [np.empty((0, teacher.dimensions), np.float32)], 0
    for table in _embedded(stage, context.input("queries"), "queries", context):
        formatted = _format_queries(encoder, table)
        queries, reasons, kept = table["query"].to_pylist(), table["dropped_by"].to_pylist(), []
        for row, (query, text) in enumerate(zip(queries, formatted, strict=True)):
            if not query or text in texts or reasons[row] == HELD_OUT:
                continue
            if decontamination.repeated(query):
                repeated += 1
                continue
            texts[text] = None
            kept.append(row)
        if kept:
            vectors.append(column_vectors(table["embedding"].take(pa.array(kept))))
    queries = Texts(name="queries", texts=list(texts), vectors=np.concatenate(vectors))
    return queries, {"num_decontaminated": repeated}


def write_mixture(
    sets: Sequence[Texts],
    config: TextsConfig,
    *,
    encoder: Encoder,
    batch_size: int,
    epochs: float,
    context: StepContext,
) -> dict[str, Json]:
    """Draws the batches of the sets, each by its number of texts, and writes them; returns counts.

    Raises:
        UserError: There is no text.
    """
    held_out, sets = _hold_out(sets, config)
    sets = [each for each in sets if each.texts]
    if not sets:
        raise UserError("embedding distillation has no text: the corpus gave no passage")
    num_texts = sum(len(each.texts) for each in sets)
    num_batches = max(1, round(epochs * num_texts / batch_size))
    rows = [
        Rows(name=each.name, weight=len(each.texts), keys=np.arange(len(each.texts))[:, None])
        for each in sets
    ]
    batches = list(draw_batches(rows, batch_size, num_batches, config.seed))
    per_shard = max(1, EXAMPLES_PER_SHARD // batch_size)
    _write(sets, batches, "shards", per_shard, encoder, context)
    in_order = [
        (place, np.arange(start, min(start + batch_size, len(each.texts))))
        for place, each in enumerate(held_out)
        for start in range(0, len(each.texts), batch_size)
    ]
    _write(held_out, in_order, VALIDATION, per_shard, encoder, context)
    drawn = Counter(place for place, _ in batches)
    return {
        "num_batches": num_batches,
        "num_examples": num_texts,
        "num_validation_examples": sum(len(each.texts) for each in held_out),
        "sets": {each.name: len(each.texts) for each in sets},
        "batches": {each.name: drawn[place] for place, each in enumerate(sets)},
    }


def _hashes(ids: pa.ChunkedArray, seed: int) -> np.ndarray:
    digests = b"".join(
        hashlib.sha256(f"{seed} {id_}".encode()).digest()[:8] for id_ in ids.to_pylist()
    )
    return np.frombuffer(digests, np.uint64)


def _format_queries(encoder: Encoder, rows: pa.Table) -> list[str]:
    pairs = zip(rows["query"].to_pylist(), rows["task"].to_pylist(), strict=True)
    return [encoder.templates.format_query(query or "", task=task) for query, task in pairs]


def _embedded(
    stage: EmbedTexts, source: Artifact, folder: str, context: StepContext
) -> Iterator[pa.Table]:
    """Embeds what an earlier attempt has not, then yields shard after shard."""
    storage = open_storage(join(context.storage.uri, "work", folder))
    run_stage(stage, source, replace(context, storage=storage))
    for path in storage.list("shards"):
        yield read_table(storage, path)


def _hold_out(sets: Sequence[Texts], config: TextsConfig) -> tuple[list[Texts], list[Texts]]:
    """Returns the texts for validation, by the sets' sizes and at most a fifth; and the others."""
    total = sum(len(each.texts) for each in sets)
    held_out, others = [], []
    for each in sets:
        num_all = len(each.texts)
        size = min(round(config.validation_examples * num_all / max(1, total)), num_all // 5)
        draw = np.random.default_rng([config.seed, *f"held out {each.name}".encode()])
        order = draw.permutation(num_all)
        held_out.append(each.take(np.sort(order[:size])))
        others.append(each.take(np.sort(order[size:])) if size else each)
    return held_out, others


def _write(
    sets: Sequence[Texts],
    batches: Sequence[tuple[int, np.ndarray]],
    folder: str,
    per_shard: int,
    encoder: Encoder,
    context: StepContext,
) -> None:
    """Tokenises the sets and writes the batches in order."""
    context.progress.update(0, len(batches), "tokenising")
    tokens = [each.tokens(encoder) for each in sets]
    for start in range(0, len(batches), per_shard):
        parts = []
        for number, (place, rows) in enumerate(batches[start : start + per_shard], start):
            some = sets[place].take(rows)
            columns = {
                "batch": np.full(len(rows), number, np.int32),
                "dataset": [some.name] * len(rows),
                "text": some.texts,
                "tokens": tokens[place].take(pa.array(rows)),
                "embedding": vector_column(some.vectors),
            }
            parts.append(pa.table(columns, schema=TEXT))
        shard = pa.concat_tables(parts)
        path = shard_path(start // per_shard, folder)
        context.log.append([write_table(context.storage, path, shard)])
        context.progress.update(start + len(parts), len(batches))
