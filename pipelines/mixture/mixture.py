"""The step `mixture`: FRet and labelled sets in one format, tokenised, in the order of training.

The artifact is the training run's whole diet: batches of one data set each, all epochs, in order.
So training streams it once, and a resumed run skips to its batch, whatever the number of workers.
What was held out for validation lies beside it in `validation/`, in batches too.

Tasks write the sets' texts; the order is drawn from what is known of each row; then an exchange
tokenises the texts that are drawn and takes them to their batches.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from cluster.artifacts import Artifact, Json
from cluster.errors import UserError
from cluster.exchange import run_exchange
from cluster.shard_groups import ShardGroup
from cluster.steps import Step, StepContext
from pipelines.datasets.decontamination import Decontamination
from pipelines.datasets.labelled_rows import version
from pipelines.datasets.labelled_sets import RUN_PASSAGES
from pipelines.encoders import saved_encoder
from pipelines.fingerprints import fingerprinted
from pipelines.mixture.config import MixtureConfig, SetsConfig
from pipelines.mixture.fixed_passages import make_fixed_mixture
from pipelines.mixture.formats import Format
from pipelines.mixture.reading import FRET_SET, fret_of, read_sets
from pipelines.mixture.sampling import draw_batches
from pipelines.mixture.sources import (
    EXAMPLES_PER_SHARD,
    Source,
    batches_in_order,
    draw_rows,
    hold_out,
    set_weight,
    without,
)
from pipelines.mixture.stored_rows import (
    TEXTS_PER_GROUP,
    Batches,
    Places,
    WriteBatches,
    read_keys,
    write_validation,
)
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
    if fret_of(config):
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
                format_=Format(
                    student=student,
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
            format_=Format(
                student=student,
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


@dataclass(frozen=True, kw_only=True)
class WriteExamples(WriteBatches):
    """Formatted texts are tokenised, and meet in their batches."""

    format_: Format
    rows_per_group: int | None = TEXTS_PER_GROUP
    schema: pa.Schema = EXAMPLE

    def split(self, source: ShardGroup) -> pa.Table:
        """Returns the examples of a source at their places, each tokenised once."""
        return self.placed(source, self.places.get(), self._tokenised)

    def _tokenised(self, rows: pa.Table) -> pa.Table:
        return self.format_.load().with_tokens(rows, symmetric=rows["symmetric"][0].as_py())


def make_mixture(
    config: SetsConfig,
    *,
    format_: Format,
    decontamination: Decontamination,
    batch_size: int,
    epochs: float,
    context: StepContext,
) -> dict[str, Json]:
    """Formats every set, draws the batches, tokenises what they hold and writes them.

    The driver holds what is drawn by, 32 bytes an example, and 16 for each of its places.

    Raises:
        UserError: No example is left, or a labelled set does not exist.
        TooManyRejects: Too many rows of a labelled set cannot be read.
    """
    context.log.resume()  # so that rejects do not begin it anew
    texts, labelled = read_sets(config, format_, decontamination, context)
    sources = _sources(config, texts)
    held_out = hold_out(sources, config)
    sources = [without(source, out) for source, out in zip(sources, held_out, strict=True)]
    sources = [source for source in sources if len(source)]
    if not sources:
        raise UserError(
            "no training example is left: every generated query was dropped (see the fret step's"
            " manifest) and the recipe's labelled sets give none; write more seeds, loosen fret or"
            " name other sets"
        )
    num_rows = sum(map(len, sources))
    num_batches = max(1, round(epochs * num_rows / batch_size))
    batches = list(
        draw_batches([source.rows() for source in sources], batch_size, num_batches, config.seed)
    )
    per_shard = max(1, EXAMPLES_PER_SHARD // batch_size)

    def exchange(sources: list[Source], batches: Batches) -> tuple[WriteExamples, list[ShardGroup]]:
        places = Places.of(batches, [source.keys["row"] for source in sources])
        write = WriteExamples.of(batches, per_shard, places, format_=format_)
        return write, places.sources(texts)

    if any(map(len, held_out)):
        in_order = batches_in_order(list(map(len, held_out)), batch_size)
        write_validation(*exchange(held_out, in_order), context)
    run_exchange(*exchange(sources, batches), context)
    drawn = Counter(place for place, _ in batches)
    return {
        "num_batches": num_batches,
        "num_examples": num_rows,
        "num_validation_examples": sum(map(len, held_out)),
        "sets": {source.name: len(source) for source in sources},
        "batches": {source.name: drawn[place] for place, source in enumerate(sources)},
        "labelled": labelled.sets,
        "num_evaluation_queries": len(decontamination),
        "contaminated": labelled.contaminated,
    }


def _sources(config: SetsConfig, texts: Artifact) -> list[Source]:
    """Returns the sets that have rows, as far as these are drawn."""
    fret = fret_of(config)
    limits = [(FRET_SET, fret.fret_max_rows, fret.fret_weight)] if fret else []
    limits += [(each.name, each.max_rows, each.weight) for each in config.labelled]
    sources = []
    for (name, max_rows, weight), keys in zip(limits, read_keys(texts, len(limits)), strict=True):
        keys = draw_rows(keys, max_rows, name, config.seed)
        sources.append(
            Source(
                name=name,
                weight=set_weight(weight, len(keys), config),
                keys=keys,
                uniform_tasks=fret is not None
                and name == FRET_SET
                and fret.fret_tasks == "uniform",
            )
        )
    return [source for source in sources if len(source)]
