"""The step `training`: the mixture's batches through Ray Train."""

from cluster.artifacts import Json
from cluster.steps import StepContext
from pipelines.student import model_folder
from pipelines.training.config import TrainingConfig
