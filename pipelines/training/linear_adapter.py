"""The step `linear_adapter`: one matrix behind the pooling learns the order of all lists.

The transformer stays as it is, so each query is encoded once and passages not at all: thousands of
lists are learnt from in seconds, and so few numbers forget little. Tasks bring lists and vectors
together in batches, as for the mixture of fixed passages; one task where training's workers run
learns from them, a shard in memory at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pydantic import Field

from cluster.artifacts import Artifact, Json, unfinished_artifact
from cluster.config import Config
from cluster.errors import UserError
from cluster.exchange import run_exchange, run_tasks
from cluster.shard_groups import shard_groups
from cluster.stages import StageResources
from cluster.step_task import run_in_task
from cluster.steps import Step, StepContext
from pipelines.encoders import TRAINED, EncoderConfig, load_encoder, saved_encoder, upload_folder
from pipelines.fingerprints import fingerprinted
from pipelines.mixture.fixed_lists import (
    LISTS,
    LISTS_PER_SHARD,
    VECTORS,
    StoredLists,
    WriteLists,
    find_vectors,
    write_lists,
)
from pipelines.mixture.formats import Format
from pipelines.mixture.stored_rows import Places, part
from pipelines.records import FIXED_EXAMPLE

if TYPE_CHECKING:
    import torch

    from cluster.steps import Progress
    from pipelines.recipe.recipe import Recipe
    from pipelines.training.config import TrainingConfig

TITLE = "a matrix behind the pooling learns the lists"
BATCHES = "batches"
# The row of a list is its number among them all.
_BATCH = pa.schema(
    [
        pa.field("row", pa.int64()),
        *(FIXED_EXAMPLE.field(name) for name in ("batch", "teacher_scores", "vectors")),
    ]
)


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


@dataclass(frozen=True, kw_only=True)
class ListBatch:
    """Some lists, padded to the length of the longest.

    Attributes:
        queries: float32 ``[lists, dimensions]``.
        passages: float16 ``[lists, longest, dimensions]``; what fills up a list counts nothing.
        teacher_scores: float32 ``[lists, longest]``, -inf where a list has no passage.
    """

    queries: np.ndarray
    passages: np.ndarray
    teacher_scores: np.ndarray

    @classmethod
    def of(
        cls, queries: np.ndarray, passages: list[np.ndarray], scores: list[np.ndarray]
    ) -> ListBatch:
        """Pads lists, each with its own first passage."""
        width = max(map(len, passages))
        missing = [width - len(rows) for rows in passages]
        filled = [
            np.concatenate([rows, np.repeat(rows[:1], more, axis=0)])
            for rows, more in zip(passages, missing, strict=True)
        ]
        padded = [
            np.pad(np.asarray(own, np.float32), (0, more), constant_values=-np.inf)
            for own, more in zip(scores, missing, strict=True)
        ]
        return cls(queries=queries, passages=np.stack(filled), teacher_scores=np.stack(padded))


def step(recipe: Recipe) -> Step:
    """Returns the step of a recipe that has a linear adapter."""
    config, student, training = recipe.linear_adapter, recipe.student, recipe.training
    assert config is not None

    def run(context: StepContext) -> dict[str, Json]:
        saved = saved_encoder(context.input("training"), student, folder=TRAINED)
        # Of bfloat16 weights, as the student may be searched with, the saved ones would be rounded.
        saved = saved.model_copy(update={"dtype": "float32"})
        format_ = Format(student=saved, max_query_tokens=0, max_passage_tokens=0)
        lists = write_lists(
            context.input("fret"), recipe.mixture.fret_only_tasks, format_, part(context, LISTS)
        )
        inputs = {LISTS: lists.rows, BATCHES: write_batches(lists, config, context)}
        device = None if training.use_gpu else "cpu"
        return run_in_task(
            partial(_learn, config, saved, device),
            replace(context, inputs=inputs),
            _resources(training),
        )

    return Step(
        name="linear_adapter",
        config={**fingerprinted(config), "only_tasks": list(recipe.mixture.fret_only_tasks)},
        inputs=("training", "fret", "embeddings"),
        work=run,
    )


def write_batches(
    lists: StoredLists, config: LinearAdapterConfig, context: StepContext
) -> Artifact:
    """Has tasks write the lists with their vectors, in the order in which they are learnt from.

    Raises:
        UserError: There is no list.
    """
    num_lists, embeddings = lists.rows.num_rows, context.input("embeddings")
    if not num_lists:
        raise UserError(
            "linear_adapter: no query is left to learn from: every one was dropped (see the fret"
            " step's manifest); write more seeds, loosen fret or leave linear_adapter out"
        )
    (dimensions,) = run_tasks(_dimensions, iter([(embeddings,)]))
    batches = [(0, rows) for rows in draw_lists(num_lists, config)]
    numbers = np.arange(num_lists)
    places = Places.of(batches, [numbers])
    vectors = find_vectors(
        lists, np.unique(places.rows), places.times, embeddings, dimensions, part(context, VECTORS)
    )
    per_shard = max(1, LISTS_PER_SHARD // len(batches[0][1]))
    write = WriteLists.of(
        batches, per_shard, places, schema=_BATCH, dimensions=dimensions, format_=None
    )
    sources = [(LISTS, group) for group in places.sources(lists.rows)]
    sources += [(VECTORS, group) for group in shard_groups(vectors)]
    own = part(context, BATCHES)
    run_exchange(write, sources, own)
    return unfinished_artifact(own.storage, own.log.files())


def num_batches(num_lists: int, config: LinearAdapterConfig) -> int:
    """Returns how many batches all epochs have."""
    return max(1, round(config.epochs * num_lists / min(config.batch_size, num_lists)))


def draw_lists(num_lists: int, config: LinearAdapterConfig) -> Iterator[np.ndarray]:
    """Yields the lists of each batch: all of them come once before any comes again."""
    size, order = min(config.batch_size, num_lists), np.random.default_rng(config.seed)
    waiting = np.empty(0, np.int64)
    for _ in range(num_batches(num_lists, config)):
        if len(waiting) < size:
            waiting = np.concatenate([waiting, order.permutation(num_lists)])
        yield waiting[:size].copy()  # and not the whole permutation
        waiting = waiting[size:]


def read_batches(batches: Artifact, queries: np.ndarray) -> Iterator[ListBatch]:
    """Yields the batches, reading shard by shard; `queries` has the vectors of all lists.

    Raises:
        UserError: The vectors of queries and passages differ in length.
    """
    for table in batches.tables():
        numbers = table["batch"].to_numpy()
        starts = [0, *(np.flatnonzero(np.diff(numbers)) + 1), len(numbers)]
        for start, end in pairwise(starts):
            some = table.slice(start, end - start)
            scores = [np.array(row, np.float32) for row in some["teacher_scores"].to_pylist()]
            vectors = [
                np.frombuffer(row, np.float16).reshape(len(own), -1)
                for row, own in zip(some["vectors"].to_pylist(), scores, strict=True)
            ]
            if vectors[0].shape[1] != queries.shape[1]:
                raise UserError(
                    f"linear_adapter: the retriever's vectors have {vectors[0].shape[1]} dimensions"
                    f" and the student's {queries.shape[1]}: name a student of as many"
                )
            yield ListBatch.of(queries[some["row"].to_numpy()], vectors, scores)


def fit_matrix(
    batches: Iterable[ListBatch],
    num_batches: int,
    dimensions: int,
    config: LinearAdapterConfig,
    progress: Progress,
    device: torch.device | None = None,
) -> tuple[torch.Tensor, list[float]]:
    """Learns W of ``x -> W x / |W x|``, for queries and passages, from the identity on.

    The loss is the KL divergence from the teacher's distribution over a list, as in
    `training/loss.py`, and `weight_decay` times the squared Frobenius norm of W - I.

    Args:
        batches: As many as `num_batches` says, and at least one.
        num_batches: Over which the learning rate falls.
        dimensions: Of the vectors.
        config: How.
        progress: Told of the batches done.
        device: Where to compute; the CPU by default.

    Returns:
        W, float32 ``[dimensions, dimensions]``, and each batch's divergence.
    """
    import torch
    from torch.nn.functional import normalize

    learnt = torch.zeros(dimensions, dimensions, device=device, requires_grad=True)
    optimizer, losses = torch.optim.Adam([learnt], lr=config.learning_rate), list[float]()
    for number, batch in enumerate(batches):
        query, passages, scores = (
            torch.from_numpy(each).to(learnt.device).float()
            for each in (batch.queries, batch.passages, batch.teacher_scores)
        )
        scores = scores / config.teacher_temperature
        query = normalize(query + query @ learnt.T, dim=1)
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
    return torch.eye(len(learnt)) + learnt.detach().cpu(), losses


def _learn(
    config: LinearAdapterConfig, saved: EncoderConfig, device: str | None, context: StepContext
) -> dict[str, Json]:
    """Encodes all queries, learns the matrix and writes the encoder with it.

    The queries' vectors are in a file, from which each batch takes its own.

    Raises:
        UserError: The vectors of queries and passages differ in length.
    """
    from pipelines.training.layers import add_linear_adapter

    encoder, lists, batches = (
        load_encoder(saved, device),
        context.input(LISTS),
        context.input(BATCHES),
    )
    shape, start = (lists.num_rows, encoder.dimensions), 0
    with tempfile.TemporaryDirectory() as temporary:
        queries = np.memmap(Path(temporary, "queries"), np.float32, "w+", shape=shape)
        for table in lists.tables(["text"]):
            texts = table["text"].to_pylist()
            queries[start : start + len(texts)] = encoder.encode(texts)
            start += len(texts)
            context.progress.update(start, lists.num_rows, "encoding")
        matrix, losses = fit_matrix(
            read_batches(batches, queries),
            num_batches(lists.num_rows, config),
            encoder.dimensions,
            config,
            context.progress,
            encoder.device,
        )
        add_linear_adapter(encoder, matrix)
        folder = Path(temporary, "encoder")
        encoder.save(folder, model_card="# The trained student behind its linear adapter\n")
        upload_folder(folder, context.storage, TRAINED)
    tenth = max(1, len(losses) // 10)
    return {
        "num_lists": lists.num_rows,
        "first_loss": round(float(np.mean(losses[:tenth])), 4),
        "final_loss": round(float(np.mean(losses[-tenth:])), 4),
    }


def _resources(training: TrainingConfig) -> StageResources:
    """Returns what a worker of the training asks for."""
    return StageResources(
        num_cpus=0.0 if training.use_gpu else 1.0,
        num_gpus=1.0 if training.use_gpu else 0.0,
        node_resource=training.node_resource,
    )


def _dimensions(embeddings: Artifact) -> int:
    shard = next(shard for shard in embeddings.shards if shard.num_rows)
    return len(embeddings.shard(shard, ["embedding"])["embedding"][0])
