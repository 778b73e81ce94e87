"""The step `mixture`: FRet and labelled sets in one format, in the order of training.

The artifact is the training run's whole diet: batches of one data set each, all epochs, in order.
So training streams it once, and a resumed run skips to its batch, whatever the number of workers.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from actors.encoder import PromptTemplates
from cluster.artifacts import Json, shard_path
from cluster.errors import UserError
from cluster.steps import StepContext
from cluster.storage import open_storage, write_table
from pipelines.corpus.passages import passage_id
from pipelines.records import EXAMPLE

BATCHES_PER_SHARD = 64


class LabelledSet(BaseModel):
    """Human-labelled pairs or triples: JSONL rows of `query`, `positive` and maybe `negative`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    path: str
    task: str = "search result"
    symmetric: bool = Field(
        default=False, description="targets are formatted like queries (STS, NLI, classification)"
    )
    weight: float | None = Field(
        default=None, gt=0, description="share of batches against the other sets; default: rows"
    )


class MixtureConfig(BaseModel):
    """What is mixed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fret_weight: float | None = Field(default=None, gt=0, description="default: its rows")
    labelled: tuple[LabelledSet, ...] = ()
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set of the mixture, its rows without `batch`."""

    name: str
    weight: float
    rows: list[dict[str, Any]]


def make_mixture(
    config: MixtureConfig,
    *,
    templates: PromptTemplates,
    batch_size: int,
    epochs: float,
    context: StepContext,
) -> dict[str, Json]:
    """Formats every set with the student's templates and writes the batches."""
    sources = [_fret(config, templates, context)]
    sources += [_labelled(labelled, templates) for labelled in config.labelled]
    sources = [source for source in sources if source.rows]
    if not sources:
        raise UserError(
            "no training example is left: every generated query was dropped (see the fret step's"
            " manifest) and the recipe names no labelled set; write more seeds or loosen fret"
        )
    num_rows = sum(len(source.rows) for source in sources)
    num_batches = max(1, round(epochs * num_rows / batch_size))
    shard: list[dict[str, Any]] = []
    for number, rows in enumerate(batches(sources, batch_size, num_batches, config.seed)):
        shard += [{**row, "batch": number} for row in rows]
        if (number + 1) % BATCHES_PER_SHARD == 0 or number + 1 == num_batches:
            table = pa.Table.from_pylist(shard, schema=EXAMPLE)
            write_table(context.storage, shard_path(number // BATCHES_PER_SHARD), table)
            shard = []
    return {
        "num_batches": num_batches,
        "num_examples": num_rows,
        "sets": {source.name: len(source.rows) for source in sources},
    }


def batches(
    sources: list[Source], batch_size: int, num_batches: int, seed: int
) -> Iterator[list[dict[str, Any]]]:
    """Yields batches of one set each; sets are drawn by weight, rows without repeats per pass."""
    draw = random.Random(seed)
    streams = [_shuffled_forever(source, seed) for source in sources]
    weights = [source.weight for source in sources]
    for _ in range(num_batches):
        (chosen,) = draw.choices(range(len(sources)), weights)
        size = min(batch_size, len(sources[chosen].rows))
        yield [next(streams[chosen]) for _ in range(size)]


def _shuffled_forever(source: Source, seed: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(f"{seed} {source.name}")
    while True:
        yield from draw.sample(source.rows, len(source.rows))


def _fret(config: MixtureConfig, templates: PromptTemplates, context: StepContext) -> Source:
    rows = []
    for table in context.input("fret").tables():
        for row in table.to_pylist():
            if row["dropped_by"] is not None:
                continue
            negatives = zip(row["negatives"], row["negative_titles"], strict=True)
            rows.append(
                {
                    "dataset": "fret",
                    "query": templates.format_query(row["query"], task=row["task"]),
                    "positive": templates.format_passage(row["positive"], row["positive_title"]),
                    "negatives": [templates.format_passage(*negative) for negative in negatives],
                    "query_id": row["id"],
                    "positive_id": row["positive_id"],
                    "symmetric": False,
                }
            )
    return Source(name="fret", weight=config.fret_weight or len(rows), rows=rows)


def _labelled(labelled: LabelledSet, templates: PromptTemplates) -> Source:
    rows = [
        _labelled_row(row, where, labelled, templates) for where, row in _read_jsonl(labelled.path)
    ]
    return Source(name=labelled.name, weight=labelled.weight or len(rows), rows=rows)


def _labelled_row(
    row: Any, where: str, labelled: LabelledSet, templates: PromptTemplates
) -> dict[str, Any]:
    if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in _REQUIRED):
        raise UserError(
            f"labelled set {labelled.name}, {where}: give JSON objects with the strings query and"
            " positive, and maybe negative"
        )

    def target(text: str) -> str:
        if labelled.symmetric:
            return templates.format_query(text, task=labelled.task)
        return templates.format_passage(text)

    negative = row.get("negative")
    return {
        "dataset": labelled.name,
        "query": templates.format_query(row["query"], task=labelled.task),
        "positive": target(row["positive"]),
        "negatives": [target(negative)] if negative else [],
        "query_id": passage_id("query", row["query"]),
        "positive_id": passage_id("", row["positive"]),
        "symmetric": labelled.symmetric,
    }


_REQUIRED = ("query", "positive")


def _read_jsonl(path: str) -> Iterator[tuple[str, Any]]:
    parent, _, name = path.rpartition("/")
    storage = open_storage(parent or ".")
    try:
        lines = storage.read_bytes(PurePosixPath(name).as_posix()).splitlines()
    except FileNotFoundError as error:
        raise UserError(f"labelled set {path} does not exist: correct labelled.path") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise UserError(f"labelled set {path}, line {number}: {error}") from error
