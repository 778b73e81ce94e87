"""The step `index`: every passage embedded by the trained student, for search and serving."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.artifacts import Json
from cluster.steps import Step, StepContext
from pipelines.encoders import saved_encoder
from pipelines.mining.embeddings import embed_passages
from pipelines.records import EMBEDDED_PASSAGE

if TYPE_CHECKING:
    from pipelines.recipe.recipe import Recipe

TITLE = "embed the corpus with the student"


def step(recipe: Recipe) -> Step:
    """Returns the step."""

    def embed(context: StepContext) -> dict[str, Json]:
        student = saved_encoder(context.input("export"), recipe.student)
        return embed_passages(student, recipe.resources.encoder, context, EMBEDDED_PASSAGE)

    return Step(
        name="index",
        config={"dtype": recipe.student.dtype},
        inputs=("passages", "export"),
        work=embed,
    )
