"""The steps `prefinetuning` and `training`: a mixture's batches through Ray Train."""

from __future__ import annotations

from cluster.artifacts import Json
from cluster.steps import StepContext
from cluster.storage import join
from pipelines.training.config import TrainingConfig
from pipelines.training.examples import count_batches
from pipelines.training.metrics import recent_loss
from pipelines.training.train import train
from pipelines.training.trainer import Job
from pipelines.training.validation import WatchedSet


def train_student(
    config: TrainingConfig,
    *,
    mixture: str,
    student: str,
    test_set: WatchedSet | None,
    trust_remote_code: bool,
    context: StepContext,
) -> dict[str, Json]:
    """Trains the student; the step's folder gets `encoder/` and `metrics.jsonl`.

    Args:
        config: The stage's configuration.
        mixture: Name of the step whose batches are trained on.
        student: Folder or URI of the encoder to start from.
        test_set: What the training is watched on, if anything.
        trust_remote_code: Run Python code that comes with the student.
        context: Of the step.

    Raises:
        UserError: There are no examples.
    """
    examples, output = context.input(mixture).uri, context.storage.uri
    job = Job(
        config=config,
        examples=examples,
        student=student,
        output=output,
        num_batches=count_batches(examples),
        test_set=test_set,
        trust_remote_code=trust_remote_code,
    )
    context.progress.update(0, job.num_batches)
    rows = train(job, scratch=join(output, "work", "ray"), progress=context.progress)
    metrics = {"num_batches": len(rows), "final_loss": round(recent_loss(rows), 4)}
    if "gradient_cache_tokens" in rows[-1]:
        metrics["gradient_cache_tokens"] = rows[-1]["gradient_cache_tokens"]
    return metrics
