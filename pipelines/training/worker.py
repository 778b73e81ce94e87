"""The training loop that every worker runs on its part of each batch, with Ray Train or alone."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from cluster.storage import open_storage
from pipelines.training.checkpoint import CheckpointWriter
from pipelines.training.memory import explain_out_of_memory, use_growing_segments
from pipelines.training.metrics import MetricsLog, MetricsRow
from pipelines.training.place import Place
from pipelines.training.trainer import Job, Trainer, load_student


def train_worker(settings: dict[str, Job]) -> None:
    """What Ray Train calls on every worker."""
    import ray.train
    from ray.train.torch import get_device

    context, job = ray.train.get_context(), settings["job"]
    place = Place(
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        local_world=context.get_local_world_size(),
        # A worker that was given no GPU sees those of its machine anyway.
        device=str(get_device()) if job.config.use_gpu else "cpu",
    )
    run_training(job, place, report=ray.train.report)


def run_training(
    job: Job, place: Place, *, report: Callable[[MetricsRow], None] = lambda _: None
) -> None:
    """Trains on this worker's slices; rank 0 also writes metrics, checkpoints and the encoder.

    Needs no Ray; ``run_training(job, Place())`` trains in this process. All workers call `report`,
    for every checkpoint once it is whole and at the end.

    Raises:
        UserError: The training does not fit in this worker's memory.
        TokayError: It fits in smaller parts, with which the next start goes on.
    """
    use_growing_segments()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.local_world))
    config, storage = job.config, open_storage(job.output)
    encoder = load_student(job, place.device)
    with explain_out_of_memory(encoder, config), CheckpointWriter(storage) as checkpoints:
        trainer, rank0 = Trainer(job, place, encoder), place.rank == 0
        settings = config.model_dump(mode="json")
        log = MetricsLog(storage, trainer.done, config.tracking, settings) if rank0 else None
        unreported: MetricsRow = {}
        for batch, part in trainer.batches():
            checkpoints.check()
            row = trainer.batch(batch, part) | trainer.validate()
            due = trainer.ended or trainer.done % config.checkpoint_every_batches == 0
            if log:
                log.append(row, flush=due)
            if due:
                checkpoints.wait()
                if unreported:
                    report(unreported)
                unreported = row
            if due and not trainer.ended:
                checkpoints.save(trainer.done, encoder.model, trainer.optimizer, write=rank0)
        if unreported:
            report(unreported)
        trainer.finish()
        if log:
            log.close()
