"""The step `prefinetuning_mixture`: the batches of the training before the fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.steps import Step
from pipelines.datasets.decontamination import Decontamination
from pipelines.mixture.mixture import mixture_step

if TYPE_CHECKING:
    from pipelines.recipe.recipe import Recipe

TITLE = "mix the batches of pre-finetuning"


def step(recipe: Recipe, decontamination: Decontamination) -> Step:
    """Returns the step of a recipe that has such a stage; `decontamination` as for `mixture`."""
    first = recipe.prefinetuning
    assert first is not None
    return mixture_step(
        "prefinetuning_mixture", first.mixture, first.training, recipe, decontamination
    )
