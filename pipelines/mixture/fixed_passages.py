"""The mixture of a training of queries alone: their lists hold passages' vectors, and no texts.

The passages keep the vectors that the retriever gave them, which lie in `embeddings`; a query is
trained towards those of its candidates. In every batch some passages stand too, to be held to their
own vectors, so that the index that there is stays nearly valid.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.artifacts import Artifact, Json
from cluster.errors import UserError
from cluster.file_list import shard_path
from cluster.steps import StepContext
from cluster.storage import write_table
from pipelines.mining.embeddings import column_vectors, embedded_passages
from pipelines.mixture.config import MixtureConfig
from pipelines.mixture.embedding_distillation_mixture import Draw, Texts
from pipelines.mixture.formats import Formatter
from pipelines.mixture.sampling import Rows, draw_batches
from pipelines.mixture.sources import (
    VALIDATION,
    Source,
    batches_in_order,
    draw_rows,
    hold_out,
    without,
)
from pipelines.records import EMBEDDING, FIXED_EXAMPLE

if TYPE_CHECKING:
    from actors.encoder import Encoder

LISTS_PER_SHARD = 1024  # of 30 vectors of 768 dimensions: 50 MB

_OF_FRET = [
    *("id", "task", "query", "dropped_by"),
    *("candidate_ids", "fused", "positive_id", "negative_ids"),
]
_LISTS = pa.schema(
    [
        ("task", pa.string()),
        ("text", pa.string()),
        ("query_id", pa.string()),
        ("positive_id", pa.string()),
        ("places", pa.list_(pa.int32())),  # of the positive and the others among the vectors
        ("teacher_scores", pa.list_(pa.float32())),
    ]
)


def make_fixed_mixture(
    config: MixtureConfig,
    *,
    formatter: Formatter,
    batch_size: int,
    epochs: float,
    context: StepContext,
) -> dict[str, Json]:
    """Draws the batches of queries and of passages beside them, tokenises and writes them.

    The vectors of all passages in lists are in memory, two bytes a dimension.

    Raises:
        UserError: No example is left, or the student's vectors have another length.
    """
    fixed = config.fixed_passages
    assert fixed is not None
    places: dict[str, int] = {}  # of the passages in lists, by id
    lists = read_lists(context.input("fret"), config, formatter.encoder, places)
    lists = draw_rows(lists, config.fret_max_rows, "fret", config.seed)
    uniform = config.fret_tasks == "uniform"
    source = Source(name="fret", weight=lists.num_rows, texts=lists, uniform_tasks=uniform)
    held_out = hold_out([source], config) if lists.num_rows else [source]
    source = without(source, held_out[0])
    num_lists = source.texts.num_rows
    if not num_lists:
        raise UserError(
            "no training example is left: every generated query was dropped (see the fret step's"
            " manifest); write more seeds or loosen fret"
        )
    num_batches = max(1, round(epochs * num_lists / batch_size))
    num_beside = round(fixed.anchor_share * batch_size)
    embeddings = context.input("embeddings")
    draw = Draw.of(embeddings, fixed.max_passages, config.seed) if num_beside else None
    tables = embedded_passages(context) if draw else embeddings.tables(EMBEDDING.names)
    vectors, passages = read_vectors(
        tables, places, draw, formatter.encoder, formatter.max_passage_tokens
    )
    batches = draw_batches([source.rows()], batch_size, num_batches, config.seed)
    beside = [np.empty(0, np.int64)] * num_batches
    if num_beside:
        keys = np.arange(len(passages.texts))[:, None]
        drawn = Rows(name=passages.name, weight=1, keys=keys)
        beside = [rows for _, rows in draw_batches([drawn], num_beside, num_batches, config.seed)]
    in_order = [rows for _, rows in batches_in_order(held_out, batch_size)]
    writer = _Writer(formatter, vectors, passages, context)
    writer.write(held_out[0], in_order, [beside[0][:0]] * len(in_order), VALIDATION)
    writer.write(source, [rows for _, rows in batches], beside, "shards")
    return {
        "num_batches": num_batches,
        "num_examples": num_lists,
        "num_validation_examples": held_out[0].texts.num_rows,
        "num_anchored": len(np.unique(np.concatenate(beside))),
        "sets": {"fret": num_lists},
        "batches": {"fret": num_batches},
    }


def read_lists(
    fret: Artifact, config: MixtureConfig, encoder: Encoder, places: dict[str, int]
) -> pa.Table:
    """Returns the kept queries with their lists, and adds the passages' ids to `places`."""
    only, tables = config.fret_only_tasks, [_LISTS.empty_table()]
    for table in fret.tables(_OF_FRET):
        rows = []
        for row in table.filter(pc.is_null(table["dropped_by"])).to_pylist():
            if only and row["task"] not in only:
                continue
            fused = dict(zip(row["candidate_ids"], row["fused"], strict=False))
            ids = [row["positive_id"], *row["negative_ids"]]
            rows.append(
                {
                    "task": row["task"],
                    "text": encoder.templates.format_query(row["query"], task=row["task"]),
                    "query_id": row["id"],
                    "positive_id": row["positive_id"],
                    "places": [places.setdefault(id_, len(places)) for id_ in ids],
                    "teacher_scores": [fused[id_] for id_ in ids],
                }
            )
        tables.append(pa.Table.from_pylist(rows, schema=_LISTS))
    return pa.concat_tables(tables)


def read_vectors(
    tables: Iterable[pa.Table],
    places: dict[str, int],
    draw: Draw | None,
    encoder: Encoder,
    max_tokens: int = 0,
) -> tuple[np.ndarray, Texts]:
    """Returns float16 ``[passages in lists, dimensions]``, and the passages that are drawn.

    Of these, `tables` hold the texts too.

    Raises:
        UserError: The encoder's vectors have another length.
    """
    vectors = np.empty((len(places), encoder.dimensions), np.float16)
    texts: list[str] = []
    of_texts = [np.empty((0, encoder.dimensions), np.float32)]
    for table in tables:
        stored = column_vectors(table["embedding"])
        if stored.shape[1] != encoder.dimensions:
            raise UserError(
                f"mixture.fixed_passages: the retriever's vectors have {stored.shape[1]} dimensions"
                f" and the student's {encoder.dimensions}: name a student of as many"
            )
        listed = np.array([places.get(id_, -1) for id_ in table["id"].to_pylist()])
        vectors[listed[listed >= 0]] = stored[listed >= 0]
        if draw:
            drawn = draw.includes(table["id"])
            some = table.filter(pa.array(drawn))
            texts += encoder.format_passages(some["text"].to_pylist(), some["title"].to_pylist())
            of_texts.append(stored[drawn])
    passages = Texts(
        name="passages",
        texts=texts,
        vectors=np.concatenate(of_texts),
        max_tokens=max_tokens,
    )
    return vectors, passages


class _Writer:
    """Writes batches of lists, and of passages beside them."""

    def __init__(
        self, formatter: Formatter, vectors: np.ndarray, passages: Texts, context: StepContext
    ) -> None:
        """Tokenises the passages."""
        self._formatter, self._context = formatter, context
        self._vectors, self._passages = vectors, passages
        self._passage_tokens = passages.tokens(formatter.encoder)

    def write(
        self, source: Source, batches: list[np.ndarray], beside: list[np.ndarray], folder: str
    ) -> None:
        """Tokenises the source's queries and writes the batches in order."""
        progress, size = self._context.progress, max(map(len, batches), default=1)
        progress.update(0, len(batches), "tokenising")
        queries = Texts(
            name=source.name,
            texts=source.texts["text"].to_pylist(),
            vectors=self._vectors,
            max_tokens=self._formatter.max_query_tokens,
        )
        lists = source.texts.append_column("tokens", queries.tokens(self._formatter.encoder))
        per_shard = max(1, LISTS_PER_SHARD // size)
        for start in range(0, len(batches), per_shard):
            parts = []
            for number in range(start, min(start + per_shard, len(batches))):
                parts.append(self._lists(number, lists.take(pa.array(batches[number]))))
                parts.append(self._beside(number, beside[number]))
            path = shard_path(start // per_shard, folder)
            shard = write_table(self._context.storage, path, pa.concat_tables(parts))
            self._context.log.append([shard])
            progress.update(min(start + per_shard, len(batches)), len(batches))

    def _lists(self, number: int, lists: pa.Table) -> pa.Table:
        columns = {
            "batch": np.full(lists.num_rows, number, np.int32),
            "dataset": ["fret"] * lists.num_rows,
            "vectors": [self._vectors[row].tobytes() for row in lists["places"].to_pylist()],
        }
        kept = ("text", "tokens", "query_id", "teacher_scores")
        return pa.table(columns | {name: lists[name] for name in kept}, schema=FIXED_EXAMPLE)

    def _beside(self, number: int, rows: np.ndarray) -> pa.Table:
        some = self._passages.take(rows)
        columns = {
            "batch": np.full(len(rows), number, np.int32),
            "dataset": [some.name] * len(rows),
            "text": some.texts,
            "tokens": self._passage_tokens.take(pa.array(rows)),
            "query_id": [None] * len(rows),
            "teacher_scores": [[]] * len(rows),
            "vectors": [vector.astype(np.float16).tobytes() for vector in some.vectors],
        }
        return pa.table(columns, schema=FIXED_EXAMPLE)
