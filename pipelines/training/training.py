"""The step `training`: the mixture's batches through Ray Train."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from cluster.artifacts import Json
from cluster.steps import Step, StepContext
from cluster.storage import join
from pipelines.datasets.retrieval import RetrievalDataset
from pipelines.datasets.test_sets import load_folder, test_set_fingerprint
from pipelines.encoders import MODEL, TRAINED
from pipelines.fingerprints import fingerprinted
from pipelines.training.config import TrainerConfig

if TYPE_CHECKING:
    from pipelines.recipe.recipe import Recipe

TITLE = "train the student"


def step(recipe: Recipe) -> Step:
    """Returns the step."""
    return training_step("training", recipe.training, "mixture", recipe)


def training_step(name: str, config: TrainerConfig, mixture: str, recipe: Recipe) -> Step:
    """Returns a step that trains the student on the batches of the step `mixture`.

    It goes on with the encoder of the stage before, or else begins with the step `student`'s.
    """
    named = config.validation.test_set if config.validation else None
    test_set = next((each for each in recipe.evaluation if each.name == named), None)
    stages = [prefix.removesuffix(".") or "training" for prefix in recipe.stages]
    first = stages.index(name) == 0
    before = "student" if first else stages[stages.index(name) - 1]
    folder = MODEL if first else TRAINED

    def train_student(context: StepContext) -> dict[str, Json]:
        """Trains the student; the step's folder gets `encoder/` and `metrics.jsonl`."""
        from pipelines.training.examples import count_batches
        from pipelines.training.metrics import recent_loss
        from pipelines.training.train import train
        from pipelines.training.trainer import Job
        from pipelines.training.validation import WatchedSet

        watched = None
        if test_set is not None:
            # The recipe was checked: it is a retrieval set.
            data = cast(RetrievalDataset, load_folder(test_set))
            watched = WatchedSet(data=data, task=test_set.task)
        examples, output = context.input(mixture).uri, context.storage.uri
        job = Job(
            config=config,
            examples=examples,
            student=join(context.input(before).uri, folder),
            output=output,
            num_batches=count_batches(examples),
            test_set=watched,
            trust_remote_code=recipe.student.trust_remote_code,
        )
        context.progress.update(0, job.num_batches)
        rows = train(job, scratch=join(output, "work", "ray"), progress=context.progress)
        metrics = {"num_batches": len(rows), "final_loss": round(recent_loss(rows), 4)}
        if "gradient_cache_tokens" in rows[-1]:
            metrics["gradient_cache_tokens"] = rows[-1]["gradient_cache_tokens"]
        return metrics

    watched_on = {} if test_set is None else {"test_set": test_set_fingerprint(test_set)}
    return Step(
        name=name,
        config={**fingerprinted(config), **watched_on},
        inputs=(mixture, before),
        work=train_student,
    )
