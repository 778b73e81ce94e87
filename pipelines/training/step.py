"""The step `training`: the mixture's batches through Ray Train."""

from cluster.artifacts import Json
from cluster.steps import StepContext
from cluster.storage import join
from pipelines.student import model_folder
from pipelines.training.config import TrainingConfig
from pipelines.training.train import train


def train_student(config: TrainingConfig, context: StepContext) -> dict[str, Json]:
    """Trains the student; the step's folder gets `encoder/` and `metrics.jsonl`."""
    context.progress.update(0, context.input("mixture").manifest.metrics["num_batches"])
    rows = train(
        config,
        examples=context.input("mixture").uri,
        student=model_folder(context.input("student")),
        output=context.storage.uri,
        scratch=join(context.storage.uri, "work", "ray"),
        progress=context.progress,
    )
    tail = [row["loss"] for row in rows[-20:]]
    return {"num_batches": len(rows), "final_loss": round(sum(tail) / len(tail), 4)}
