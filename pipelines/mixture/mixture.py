"""The step `mixture`: FRet and labelled sets in one format, tokenised, in the order of training.

The artifact is the training run's whole diet: batches of one data set each, all epochs, in order.
So training streams it once, and a resumed run skips to its batch, whatever the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.artifacts import Artifact, Json, shard_path
from cluster.errors import UserError
from cluster.steps import StepContext
from cluster.storage import write_table
from pipelines.mixture.config import MixtureConfig
from pipelines.mixture.formats import Example, Formatter, Target
from pipelines.mixture.labelled import read_labelled
from pipelines.mixture.sampling import Rows, draw_batches
from pipelines.records import EXAMPLE

EXAMPLES_PER_SHARD = 8192


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set of the mixture, as formatted texts."""

    name: str
    weight: float
    texts: pa.Table
    symmetric: bool = False

    def rows(self) -> Rows:
        """Returns what sampling needs to know."""
        ids = [self.texts["query_id"], self.texts["positive_id"]]
        codes = [column.combine_chunks().dictionary_encode().indices.to_numpy() for column in ids]
        codes[1] = codes[1] + len(codes[0])  # a query is no repeat of a positive
        return Rows(name=self.name, weight=self.weight, keys=np.stack(codes, axis=1))


def make_mixture(
    config: MixtureConfig,
    *,
    formatter: Formatter,
    batch_size: int,
    epochs: float,
    context: StepContext,
) -> dict[str, Json]:
    """Formats every set, draws the batches, tokenises what they hold and writes them."""
    sources = [_fret(config, formatter, context.input("fret"))]
    for labelled in config.labelled:
        texts = formatter.texts(
            read_labelled(labelled), dataset=labelled.name, symmetric=labelled.symmetric
        )
        sources.append(
            Source(
                name=labelled.name,
                weight=labelled.weight or texts.num_rows,
                texts=texts,
                symmetric=labelled.symmetric,
            )
        )
    sources = [source for source in sources if source.texts.num_rows]
    if not sources:
        raise UserError(
            "no training example is left: every generated query was dropped (see the fret step's"
            " manifest) and the recipe names no labelled set; write more seeds or loosen fret"
        )
    num_rows = sum(source.texts.num_rows for source in sources)
    num_batches = max(1, round(epochs * num_rows / batch_size))
    batches = list(
        draw_batches([source.rows() for source in sources], batch_size, num_batches, config.seed)
    )
    _write(sources, batches, max(1, EXAMPLES_PER_SHARD // batch_size), formatter, context)
    return {
        "num_batches": num_batches,
        "num_examples": num_rows,
        "sets": {source.name: source.texts.num_rows for source in sources},
    }


def _write(
    sources: list[Source],
    batches: list[tuple[int, np.ndarray]],
    batches_per_shard: int,
    formatter: Formatter,
    context: StepContext,
) -> None:
    """Tokenises the rows that the batches hold, each once, and writes the batches in order."""
    tables, places = [], []
    for number, source in enumerate(sources):
        drawn = [rows for place, rows in batches if place == number]
        used = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *drawn]))
        texts = source.texts.take(pa.array(used))
        tables.append(formatter.with_tokens(texts, symmetric=source.symmetric).combine_chunks())
        places.append(used)
        context.progress.update(0, len(batches), f"tokenised {source.name}")
    for start in range(0, len(batches), batches_per_shard):
        parts = []
        for number, (place, rows) in enumerate(batches[start : start + batches_per_shard], start):
            table = tables[place].take(pa.array(np.searchsorted(places[place], rows)))
            numbers = pa.array(np.full(len(rows), number, dtype=np.int32))
            parts.append(table.add_column(0, "batch", numbers).cast(EXAMPLE))
        write_table(
            context.storage, shard_path(start // batches_per_shard), pa.concat_tables(parts)
        )
        context.progress.update(start + len(parts), len(batches))


def _fret(config: MixtureConfig, formatter: Formatter, fret: Artifact) -> Source:
    texts = formatter.texts(_fret_examples(fret), dataset="fret", symmetric=False)
    return Source(name="fret", weight=config.fret_weight or texts.num_rows, texts=texts)


def _fret_examples(fret: Artifact) -> Iterator[Example]:
    for table in fret.tables():
        for row in table.filter(pc.is_null(table["dropped_by"])).to_pylist():
            # The candidates that were scored come first.
            fused = dict(zip(row["candidate_ids"], row["fused"], strict=False))
            negatives = zip(row["negatives"], row["negative_titles"], strict=True)
            yield Example(
                task=row["task"],
                query=row["query"],
                positive=Target(row["positive"], row["positive_title"]),
                negatives=tuple(Target(*negative) for negative in negatives),
                query_id=row["id"],
                positive_id=row["positive_id"],
                teacher_scores=tuple(
                    fused[id_] for id_ in (row["positive_id"], *row["negative_ids"])
                ),
            )
