"""The step `student`: the encoder that training starts from."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator

from cluster.artifacts import Json
from cluster.errors import UserError
from cluster.step_task import run_in_task
from cluster.steps import Step, StepContext
from pipelines.encoders import MODEL, EncoderConfig, load_encoder, upload_folder
from pipelines.fingerprints import NotFingerprinted, fingerprinted

if TYPE_CHECKING:
    from actors.encoder import Encoder
    from pipelines.recipe.recipe import Recipe

TITLE = "make the student"


class StudentConfig(EncoderConfig):
    """The encoder that training starts from."""

    dtype: Annotated[Literal["float32", "bfloat16", "float16", "auto"], NotFingerprinted] = Field(
        default="auto", description="in evaluation and index; training keeps float32 weights"
    )
    layers: tuple[int, ...] | None = Field(
        default=None, description="keep only these layers of the model, from 0"
    )
    pooling: Literal["mean", "cls", "lasttoken"] | None = Field(
        default=None, description="the model's own if null; mean for a bidirectional decoder"
    )
    bidirectional: bool = Field(
        default=False, description="let every token of a decoder see those behind it too"
    )
    projection: int | None = Field(
        default=None, ge=1, description="dimensions of a linear layer behind the pooling"
    )

    @field_validator("layers")
    @classmethod
    def _rise(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if layers is not None and (
            not layers or list(layers) != sorted({*layers}) or layers[0] < 0
        ):
            raise ValueError("give rising indices from 0, such as [0, 2, 5]")
        return layers


def step(recipe: Recipe) -> Step:
    """Returns the step."""
    return Step(
        name="student",
        config=fingerprinted(recipe.student),
        inputs=(),
        work=lambda context: run_in_task(
            partial(make_student, recipe.student), context, recipe.resources.encoder
        ),
    )


def make_student(config: StudentConfig, context: StepContext) -> dict[str, Json]:
    """Saves the starting point, so that `before` and `after` are files of the same kind.

    Raises:
        UserError: The model cannot be cut so, or cannot be made bidirectional.
    """
    encoder = load_student(config)
    parts = [f"`{config.model}`"]
    parts += [f"layers {list(config.layers)}"] if config.layers is not None else []
    parts += [f"a projection to {config.projection} dimensions"] if config.projection else []
    parts += ["bidirectional attention"] if config.bidirectional else []
    parts.append(f"{encoder.pooling} pooling")
    card = f"# Student before training\n\nMade of {', '.join(parts)}.\n"
    with tempfile.TemporaryDirectory() as temporary:
        encoder.save(temporary, model_card=card)
        upload_folder(Path(temporary), context.storage, MODEL)
    return {"num_parameters": encoder.num_parameters, "dimensions": encoder.dimensions}


def load_student(config: StudentConfig) -> Encoder:
    """Loads the model and makes the student of it.

    Raises:
        UserError: The model cannot be cut so, or cannot be made bidirectional.
    """
    from pipelines.training.layers import add_projection, cut_layers, make_bidirectional

    weights = config.model_copy(update={"dtype": "float32"})  # to be trained
    pooling = config.pooling or ("mean" if config.bidirectional else None)
    encoder = load_encoder(weights, device="cpu", pooling=pooling)  # it is trained elsewhere
    try:
        if config.layers is not None:
            encoder = cut_layers(encoder, config.layers)
    except ValueError as error:
        raise UserError(f"student.layers: {error}") from error
    try:
        if config.bidirectional:
            make_bidirectional(encoder)
    except ValueError as error:
        raise UserError(f"student.bidirectional: {error}") from error
    if config.projection is not None:
        add_projection(encoder, config.projection)
    return encoder
