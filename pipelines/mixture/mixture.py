"""The step `mixture`: FRet and labelled sets in one format, tokenised, in the order of training.

The artifact is the training run's whole diet: batches of one data set each, all epochs, in order.
So training streams it once, and a resumed run skips to its batch, whatever the number of workers.
What was held out for validation lies beside it in `validation/`, in batches too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.artifacts import Artifact, Json, write_rejects
from cluster.errors import Reject, TooManyRejects, UserError
from cluster.exchange import Shared, run_exchange
from cluster.file_list import shard_path
from cluster.shard_groups import shard_groups
from cluster.steps import Step, StepContext
from cluster.storage import write_table
from pipelines.corpus.held_out import TrainingPassages, held_out_documents
from pipelines.datasets.decontamination import Decontamination
from pipelines.datasets.labelled_examples import MAX_LISTED, Example, Reading, Target, read_examples
from pipelines.datasets.labelled_rows import version
from pipelines.datasets.labelled_sets import RUN_PASSAGES, LabelledSet
from pipelines.encoders import load_encoder, saved_encoder
from pipelines.fingerprints import fingerprinted
from pipelines.mixture.config import MixtureConfig, SetsConfig
from pipelines.mixture.fixed_passages import make_fixed_mixture
from pipelines.mixture.formats import Formatter
from pipelines.mixture.sampling import draw_batches
from pipelines.mixture.sources import (
    EXAMPLES_PER_SHARD,
    VALIDATION,
    Source,
    batches_in_order,
    draw_rows,
    hold_out,
    set_weight,
    without,
)
from pipelines.mixture.stored_rows import Places, StoredRows, WriteBatches, part
from pipelines.records import EXAMPLE

if TYPE_CHECKING:
    from pipelines.recipe.recipe import Recipe
    from pipelines.training.config import TrainingConfig

TITLE = "mix the training batches"


def step(recipe: Recipe, decontamination: Decontamination) -> Step:
    """Returns the step; `decontamination` knows the texts of the run's own test sets."""
    return mixture_step("mixture", recipe.mixture, recipe.training, recipe, decontamination)


def mixture_step(
    name: str,
    config: SetsConfig,
    training: TrainingConfig,
    recipe: Recipe,
    decontamination: Decontamination,
) -> Step:
    """Returns a step that mixes the batches of a training.

    `training` says how they are trained on: their size, epochs and lengths. `decontamination` knows
    the texts of the run's own test sets.

    Raises:
        UserError: A labelled set does not exist.
    """
    inputs = ["student"]
    if isinstance(config, MixtureConfig) and config.fret_weight != 0:
        inputs.append("fret")
    fixed = config if isinstance(config, MixtureConfig) and config.fixed_passages else None
    of_run = any(labelled.path == RUN_PASSAGES for labelled in config.labelled)
    if fixed:
        inputs.append("embeddings")
    if fixed or of_run:
        inputs.append("passages")
    if of_run and recipe.gate and recipe.gate.hold_out:
        inputs.append("seeds")

    def mix(context: StepContext) -> dict[str, Json]:
        student = saved_encoder(context.input("student"), recipe.student)
        if fixed:
            return make_fixed_mixture(
                fixed,
                formatter=Formatter(
                    encoder=load_encoder(student, device="cpu"),
                    max_query_tokens=training.max_query_tokens,
                    # The vectors are those of all that the retriever reads.
                    max_passage_tokens=min(recipe.student.max_tokens, recipe.retriever.max_tokens),
                ),
                batch_size=training.batch_size,
                epochs=training.epochs,
                context=context,
            )
        return make_mixture(
            config,
            formatter=Formatter(
                encoder=load_encoder(student, device="cpu"),
                max_query_tokens=training.max_query_tokens,
                max_passage_tokens=training.max_passage_tokens,
            ),
            decontamination=decontamination,
            batch_size=training.batch_size,
            epochs=training.epochs,
            context=context,
        )

    return Step(
        name=name,
        config={
            "mixture": fingerprinted(config),
            "versions": [version(labelled) for labelled in config.labelled],
            **training.model_dump(
                include={"batch_size", "epochs", "max_query_tokens", "max_passage_tokens"}
            ),
            "decontamination": decontamination.fingerprint() if config.labelled else None,
        },
        inputs=tuple(inputs),
        work=mix,
    )


def make_mixture(
    config: SetsConfig,
    *,
    formatter: Formatter,
    decontamination: Decontamination,
    batch_size: int,
    epochs: float,
    context: StepContext,
) -> dict[str, Json]:
    """Formats every set, draws the batches, tokenises what they hold and writes them.

    Raises:
        UserError: No example is left, or a labelled set does not exist.
        TooManyRejects: Too many rows of a labelled set cannot be read.
    """
    context.log.resume()  # so that rejects do not begin it anew
    reader = _Reader(
        config=config, formatter=formatter, decontamination=decontamination, context=context
    )
    if isinstance(config, MixtureConfig) and config.fret_weight != 0:
        reader.read_fret(config)
    for labelled in config.labelled:
        reader.read(labelled)
    context.log.append(write_rejects(context.storage, reader.rejects))
    sources = [source for source in reader.sources if source.texts.num_rows]
    held_out = hold_out(sources, config)
    sources = [without(source, out) for source, out in zip(sources, held_out, strict=True)]
    sources = [source for source in sources if source.texts.num_rows]
    if not sources:
        raise UserError(
            "no training example is left: every generated query was dropped (see the fret step's"
            " manifest) and the recipe's labelled sets give none; write more seeds, loosen fret or"
            " name other sets"
        )
    num_rows = sum(source.texts.num_rows for source in sources)
    num_batches = max(1, round(epochs * num_rows / batch_size))
    batches = list(
        draw_batches([source.rows() for source in sources], batch_size, num_batches, config.seed)
    )
    per_shard = max(1, EXAMPLES_PER_SHARD // batch_size)
    if any(source.texts.num_rows for source in held_out):
        in_order = batches_in_order(held_out, batch_size)
        _write_validation(reader, held_out, in_order, per_shard)
    _write(reader, sources, batches, per_shard)
    drawn = Counter(place for place, _ in batches)
    return {
        "num_batches": num_batches,
        "num_examples": num_rows,
        "num_validation_examples": sum(source.texts.num_rows for source in held_out),
        "sets": {source.name: source.texts.num_rows for source in sources},
        "batches": {source.name: drawn[place] for place, source in enumerate(sources)},
        **reader.metrics(),
    }


@dataclass(kw_only=True)
class _Reader:
    """Reads sets and writes their rows down, and keeps count of what is not trained on."""

    config: SetsConfig
    formatter: Formatter
    decontamination: Decontamination
    context: StepContext
    counts: dict[str, Json] = field(default_factory=dict)
    contaminated: list[dict[str, str]] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    stored: dict[str, StoredRows] = field(default_factory=dict)  # by the set's name

    def read_fret(self, config: MixtureConfig) -> None:
        """Reads the step `fret`."""
        only, fret = config.fret_only_tasks, self.context.input("fret")
        examples = (each for each in _fret_examples(fret) if not only or each.task in only)
        texts = self._texts(examples, "fret", symmetric=False)
        texts = draw_rows(texts, config.fret_max_rows, "fret", config.seed)
        self.sources.append(
            Source(
                name="fret",
                weight=set_weight(config.fret_weight, texts, config),
                texts=texts,
                uniform_tasks=config.fret_tasks == "uniform",
            )
        )

    def read(self, labelled: LabelledSet) -> None:
        """Reads a labelled set; raises TooManyRejects."""
        self.context.progress.update(0, None, f"reading {labelled.name}")
        reading = Reading(decontamination=self.decontamination)
        passages, seeds = (self.context.inputs.get(name) for name in ("passages", "seeds"))
        if passages and seeds:
            held_out = held_out_documents(seeds)
            passages = TrainingPassages(passages.storage, passages.manifest, held_out)
        examples = read_examples(labelled, reading, passages)
        texts = self._texts(examples, labelled.name, symmetric=labelled.is_symmetric)
        self._check(labelled, reading)
        self.counts[labelled.name] = {
            "num_rows": reading.num_rows,
            "num_examples": texts.num_rows,
            "rejected": dict(Counter(reason for _, reason, _ in reading.rejects)),
            "left_out": dict(reading.left_out),
            "decontaminated": dict(reading.decontaminated),
        }
        self.contaminated += [
            {"set": labelled.name, "text": text, "evaluation_query": query}
            for text, query in reading.contaminated
        ]
        texts = draw_rows(texts, labelled.max_rows, labelled.name, self.config.seed)
        self.sources.append(
            Source(
                name=labelled.name,
                weight=set_weight(labelled.weight, texts, self.config),
                texts=texts,
                symmetric=labelled.is_symmetric,
            )
        )

    def metrics(self) -> dict[str, Json]:
        """Returns the counts of each set, and the first examples that were taken out."""
        return {
            "labelled": self.counts,
            "num_evaluation_queries": len(self.decontamination),
            "contaminated": self.contaminated[:MAX_LISTED],
        }

    def _texts(self, examples: Iterable[Example], name: str, *, symmetric: bool) -> pa.Table:
        """Writes a set's formatted texts down; returns what they are drawn by."""
        tables = self.formatter.texts(examples, dataset=name, symmetric=symmetric)
        folder = part(self.context.storage, "texts", str(len(self.stored)))
        self.stored[name], drawn_by = StoredRows.write(folder, tables)
        return drawn_by

    def _check(self, labelled: LabelledSet, reading: Reading) -> None:
        self.rejects += [
            (f"{labelled.name}: {id_}", why, text) for id_, why, text in reading.rejects
        ]
        share = self.config.max_reject_share
        if len(reading.rejects) > share * reading.num_rows:
            write_rejects(self.context.storage, self.rejects)
            raise TooManyRejects.of(
                self.context.storage.uri.rpartition("/")[2],
                Counter(reason for _, reason, _ in reading.rejects),
                reading.rejects,
                f"of set {labelled.name!r} accepted is a share of {share} of {reading.num_rows}:"
                " correct the set, name its fields, or raise max_reject_share",
            )


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


def _tokenise(reader: _Reader, source: Source, rows: np.ndarray, *folder: str) -> Artifact:
    """Writes the tokens of a set's rows, whose sorted numbers are given."""
    reader.context.progress.update(0, None, f"tokenising {source.name}")
    return (
        reader.stored[source.name]
        .tokenised(
            rows,
            symmetric=source.symmetric,
            formatter=reader.formatter,
            storage=part(reader.context.storage, *folder),
        )
        .artifact
    )


def _write(
    reader: _Reader, sources: list[Source], batches: list[tuple[int, np.ndarray]], per_shard: int
) -> None:
    """Tokenises the rows that batches hold, each once, and has tasks write the batches in order."""
    placed, rows = [], []
    for number, source in enumerate(sources):
        own = [(batch, drawn) for batch, (place, drawn) in enumerate(batches) if place == number]
        places = Places.of(source.texts["row"].to_numpy(), own)
        used = np.unique(places.rows)
        placed.append(places.among(used))
        tokens = _tokenise(reader, source, used, "tokens", str(number))
        rows += [(number, group) for group in shard_groups(tokens)]
    write = WriteBatches(
        num_partitions=-(-len(batches) // per_shard),
        batches_each=per_shard,
        places=Shared.of(placed),
    )
    run_exchange(write, rows, reader.context)


def _write_validation(
    reader: _Reader, held_out: list[Source], batches: list[tuple[int, np.ndarray]], per_shard: int
) -> None:
    """Tokenises what is held out and writes it in order; it is small."""
    tables = []
    for number, source in enumerate(held_out):
        rows = source.texts["row"].to_numpy()
        tokens = _tokenise(reader, source, rows, "held out", str(number)) if len(rows) else None
        tables.append(tokens.read() if tokens else None)
    for start in range(0, len(batches), per_shard):
        parts = []
        for number, (place, rows) in enumerate(batches[start : start + per_shard], start):
            table = tables[place]
            assert table is not None
            numbers = pa.array(np.full(len(rows), number, dtype=np.int32))
            parts.append(table.take(pa.array(rows)).add_column(0, "batch", numbers).cast(EXAMPLE))
        path = shard_path(start // per_shard, VALIDATION)
        shard = write_table(reader.context.storage, path, pa.concat_tables(parts))
        reader.context.log.append([shard])
