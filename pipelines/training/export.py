"""The step `export`: the trained student as a sentence-transformers folder, its parity proven."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.artifacts import Json
from cluster.steps import Step, StepContext
from pipelines.training.student import export_student

if TYPE_CHECKING:
    from pipelines.recipe.recipe import Recipe

TITLE = "export and check parity"
NUM_PARITY_TEXTS = 32


def step(recipe: Recipe) -> Step:
    """Returns the step."""

    def export(context: StepContext) -> dict[str, Json]:
        passages = context.input("passages")
        texts = passages.shard(passages.shards[0], ["text"])["text"].to_pylist()
        return export_student(recipe.name, recipe.student, texts[:NUM_PARITY_TEXTS], context)

    first = ("prefinetuning_mixture",) if recipe.prefinetuning else ()
    return Step(
        name="export",
        title=TITLE,
        config={"recipe": recipe.name},
        inputs=("training", "mixture", "fret", "passages", *first),
        work=export,
    )
