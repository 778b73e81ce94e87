"""The step `prefinetuning`: the training before the fine-tuning (Gecko, section 3.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.config import Config
from cluster.steps import Step
from pipelines.mixture.config import PrefinetuningMixtureConfig
from pipelines.training.config import TrainingConfig
from pipelines.training.training import training_step

if TYPE_CHECKING:
    from pipelines.recipe.recipe import Recipe

TITLE = "pre-finetune the student"


class Prefinetuning(Config):
    """The stage before fine-tuning: pairs with in-batch negatives (Gecko, section 3.1)."""

    mixture: PrefinetuningMixtureConfig
    training: TrainingConfig = TrainingConfig()


def step(recipe: Recipe) -> Step:
    """Returns the step of a recipe that has such a stage."""
    assert recipe.prefinetuning is not None
    config = recipe.prefinetuning.training
    return training_step("prefinetuning", config, "prefinetuning_mixture", recipe)
