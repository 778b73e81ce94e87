"""Which encoder a recipe means: its retriever, its student, or what a step saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from actors.encoder_templates import PromptTemplates
from cluster.artifacts import Artifact
from cluster.config import Config
from cluster.storage import Storage, join

if TYPE_CHECKING:
    from actors.encoder import Encoder

# Where the steps `student` and `export` leave their encoder, and where those that train do.
MODEL, TRAINED = "model", "encoder"


class EncoderConfig(Config):
    """An encoder and the prompts around its texts; templates of None are the model's own."""

    model: str = Field(description="folder, hub id or embedded:NAME")
    max_tokens: int = Field(default=256, ge=8)
    query_template: str | None = Field(
        default=None, description="'task: {task} | query: {text}' is Gecko's"
    )
    passage_template: str | None = Field(
        default=None, description="'title: {title} | text: {text}' is Gecko's"
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    trust_remote_code: bool = Field(
        default=False,
        description="run code that comes with it; --trust-remote-code must say it too",
    )

    @model_validator(mode="after")
    def _templates_have_a_place_for_the_text(self) -> Self:
        for key in ("query_template", "passage_template"):
            template = getattr(self, key)
            try:
                PromptTemplates(**{key.removesuffix("_template"): template or "{text}"})
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
        return self


def load_encoder(
    config: EncoderConfig, device: str | None = None, pooling: str | None = None
) -> Encoder:
    """Loads the encoder that a recipe means; `device` and `pooling` as in `Encoder.load`."""
    from actors.encoder import Encoder

    return Encoder.load(
        config.model,
        max_tokens=config.max_tokens,
        dtype=config.dtype,
        device=device,
        trust_remote_code=config.trust_remote_code,
        pooling=pooling,
        query_template=config.query_template,
        passage_template=config.passage_template,
    )


def saved_encoder(step: Artifact, student: EncoderConfig, folder: str = MODEL) -> EncoderConfig:
    """Describes an encoder that a finished step saved in `folder`, with its own templates.

    It is loaded as the recipe's `student` is.
    """
    return EncoderConfig(
        model=join(step.uri, folder),
        max_tokens=student.max_tokens,
        dtype=student.dtype,
        trust_remote_code=student.trust_remote_code,
    )


def upload_folder(folder: Path, storage: Storage, path: str) -> None:
    """Copies the files of a folder to one below a step's."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            storage.upload(file, f"{path}/{file.relative_to(folder).as_posix()}")
