"""The step `linear_adapter`: one matrix behind the pooling learns the order of all lists.

The transformer stays as it is, so each query is encoded once and passages not at all: thousands of
lists are learnt from in seconds, and so few numbers forget little.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from cluster.artifacts import Json
from cluster.config import Config
from cluster.steps import Step, StepContext
from pipelines.encoders import TRAINED, load_encoder, saved_encoder, upload_folder
from pipelines.fingerprints import fingerprinted
from pipelines.mixture.fixed_passages import read_lists, read_vectors
from pipelines.records import EMBEDDING

if TYPE_CHECKING:
    import torch

    from cluster.steps import Progress
    from pipelines.recipe.recipe import Recipe

TITLE = "a matrix behind the pooling learns the lists"
_QUERIES_AT_ONCE = 4096


class LinearAdapterConfig(Config):
    """A linear map of queries and passages alike, learnt from the lists of `mixture.fixed_passages`
    after the training.
    """

    epochs: float = Field(default=3, gt=0)
    batch_size: int = Field(default=64, ge=2, description="lists")
    learning_rate: float = Field(default=3e-4, gt=0, description="at first; it falls to 0")
    teacher_temperature: float = Field(default=0.5, gt=0, description="divides the fused scores")
    student_temperature: float = Field(default=0.05, gt=0, description="divides similarities")
    weight_decay: float = Field(
        default=0.1, ge=0, description="of the squared distance of the matrix from the identity"
    )
    seed: int = 0


def step(recipe: Recipe) -> Step:
    """Returns the step of a recipe that has a linear adapter."""
    config, student = recipe.linear_adapter, recipe.student
    assert config is not None

    def run(context: StepContext) -> dict[str, Json]:
        from pipelines.training.layers import add_linear_adapter

        trained = context.input("training")
        saved = saved_encoder(trained, student, folder=TRAINED)
        # Of bfloat16 weights, as the student may be searched with, the saved ones would be rounded.
        encoder = load_encoder(saved.model_copy(update={"dtype": "float32"}), device="cpu")
        places: dict[str, int] = {}
        lists = read_lists(context.input("fret"), recipe.mixture, encoder, places)
        embedded = context.input("embeddings").tables(EMBEDDING.names)
        vectors, _ = read_vectors(embedded, places, None, encoder)
        queries = np.concatenate(
            [
                encoder.encode(lists["text"][start : start + _QUERIES_AT_ONCE].to_pylist())
                for start in range(0, lists.num_rows, _QUERIES_AT_ONCE)
            ]
        )
        matrix, losses = fit_matrix(
            queries,
            vectors,
            lists["places"].to_pylist(),
            lists["teacher_scores"].to_pylist(),
            config,
            context.progress,
        )
        add_linear_adapter(encoder, matrix)
        with tempfile.TemporaryDirectory() as temporary:
            encoder.save(temporary, model_card="# The trained student behind its linear adapter\n")
            upload_folder(Path(temporary), context.storage, TRAINED)
        tenth = max(1, len(losses) // 10)
        return {
            "num_lists": lists.num_rows,
            "first_loss": round(float(np.mean(losses[:tenth])), 4),
            "final_loss": round(float(np.mean(losses[-tenth:])), 4),
        }

    return Step(
        name="linear_adapter",
        config={**fingerprinted(config), "only_tasks": list(recipe.mixture.fret_only_tasks)},
        inputs=("training", "fret", "embeddings"),
        work=run,
    )


def fit_matrix(
    queries: np.ndarray,
    vectors: np.ndarray,
    places: list[list[int]],
    teacher_scores: list[list[float]],
    config: LinearAdapterConfig,
    progress: Progress,
) -> tuple[torch.Tensor, list[float]]:
    """Learns W of ``x -> W x / |W x|``, for queries and passages, from the identity on.

    The loss is the KL divergence from the teacher's distribution over a list, as in
    `training/loss.py`, and `weight_decay` times the squared Frobenius norm of W - I.

    Args:
        queries: float32 ``[lists, dimensions]``.
        vectors: Of passages, ``[passages, dimensions]``.
        places: For each list, its passages' rows in `vectors`; lists may differ in length.
        teacher_scores: For each list, one for each of its passages.
        config: How.
        progress: Told of the batches done.

    Returns:
        W, float32 ``[dimensions, dimensions]``, and each batch's divergence.
    """
    import torch
    from torch.nn.functional import normalize, pad

    def padded(rows: Sequence[Sequence[float]], batch: np.ndarray, fill: float) -> torch.Tensor:
        width = max(len(rows[row]) for row in batch)
        tensors = (torch.tensor(rows[row]) for row in batch)
        return torch.stack([pad(each, (0, width - len(each)), value=fill) for each in tensors])

    size, order = min(config.batch_size, len(places)), np.random.default_rng(config.seed)
    num_batches = max(1, round(config.epochs * len(places) / size))
    asked, known = torch.from_numpy(queries), torch.from_numpy(vectors)
    learnt = torch.zeros(queries.shape[1], queries.shape[1], requires_grad=True)
    optimizer, losses = torch.optim.Adam([learnt], lr=config.learning_rate), []
    waiting = np.empty(0, np.int64)
    for number in range(num_batches):
        if len(waiting) < size:
            waiting = np.concatenate([waiting, order.permutation(len(places))])
        batch, waiting = waiting[:size], waiting[size:]
        scores = padded(teacher_scores, batch, -torch.inf) / config.teacher_temperature
        rows = padded(places, batch, 0).long()
        passages = known[rows].float()
        query = normalize(asked[batch] + asked[batch] @ learnt.T, dim=1)
        passages = normalize(passages + passages @ learnt.T, dim=2)
        similarities = (query[:, None] * passages).sum(dim=2) / config.student_temperature
        teacher = scores.log_softmax(dim=1)
        student = similarities.masked_fill(scores == -torch.inf, -torch.inf).log_softmax(dim=1)
        gaps = teacher.exp() * (teacher - student)
        divergence = gaps.masked_fill(scores == -torch.inf, 0).sum(dim=1).mean()
        optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - number / num_batches)
        optimizer.zero_grad()
        loss = divergence + config.weight_decay * learnt.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(divergence.detach()))
        progress.update(number + 1, num_batches, f"divergence {losses[-1]:.3f}")
    return torch.eye(len(learnt)) + learnt.detach(), losses
