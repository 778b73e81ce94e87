"""The step `embedding_distillation`: the student learns a teacher's vectors, before any label."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from cluster.config import Config
from cluster.steps import Step
from pipelines.encoders import EncoderConfig
from pipelines.mixture.config import TextsConfig
from pipelines.training.config import TrainerConfig
from pipelines.training.training import training_step

if TYPE_CHECKING:
    from pipelines.recipe.recipe import Recipe

TITLE = "the student learns the teacher's vectors"
TEACHER = "embedding_distillation.teacher"


class EmbeddingTrainingConfig(TrainerConfig):
    """Embedding distillation; the defaults are those of a training with other values here."""

    epochs: float = Field(default=3, gt=0)
    learning_rate: float = Field(default=5e-4, gt=0, description="highest, after the warm-up")
    dropout: bool = Field(default=False, description="use the model's own dropout")


class EmbeddingDistillation(Config):
    """The first stage of a student that is smaller than its start; see `training/embedding_loss`.

    It is sentence-transformers' recipe for a model with fewer layers.
    """

    teacher: EncoderConfig | None = Field(
        default=None,
        description="an encoder of as many dimensions as the student; null: the retriever, whose"
        " vectors of the passages are there already",
    )
    mixture: TextsConfig = TextsConfig()
    training: EmbeddingTrainingConfig = EmbeddingTrainingConfig()


def step(recipe: Recipe) -> Step:
    """Returns the step of a recipe that has such a stage."""
    assert recipe.embedding_distillation is not None
    config = recipe.embedding_distillation.training
    return training_step("embedding_distillation", config, "embedding_distillation_mixture", recipe)
