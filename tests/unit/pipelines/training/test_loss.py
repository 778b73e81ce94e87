from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipelines.training.config import TrainingConfig
from pipelines.training.loss import Vectors, contrastive_loss, related_examples

GECKO = TrainingConfig(temperature=0.1)
BATCH, DIMENSIONS = 5, 8
# The second example has none, the fourth two; the rest is padding.
HAS_NEGATIVE = np.array([[1, 0], [0, 0], [1, 0], [1, 1], [0, 1]], dtype=bool)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def plain_loss(
    queries: np.ndarray,
    positives: np.ndarray,
    negatives: np.ndarray,
    config: TrainingConfig,
    related: np.ndarray | None = None,
) -> float:
    """Equation 3 term by term, with the options written out."""
    means = []
    for size in {DIMENSIONS, *config.matryoshka_dimensions}:
        q, p, n = (unit(vectors[..., :size]) for vectors in (queries, positives, negatives))
        losses = []
        for i in range(len(q)):
            own = q[i] @ p[i]
            terms = [np.exp(own / config.temperature)]
            for k in np.flatnonzero(HAS_NEGATIVE[i]):
                terms.append(np.exp(q[i] @ n[i, k] / config.temperature))
            for j in range(len(q)):
                if j == i or (related is not None and related[i, j]):
                    continue
                terms.append(np.exp(q[i] @ p[j] / config.temperature))
                margin = config.same_tower_margin
                too_near = margin is not None and q[i] @ q[j] > own + margin
                if config.same_tower_negatives and not too_near:
                    terms.append(np.exp(q[i] @ q[j] / config.temperature))
            losses.append(-np.log(np.exp(own / config.temperature) / sum(terms)))
        means.append(np.mean(losses))
    return float(np.mean(means))


def sample() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((BATCH, DIMENSIONS))
    queries, positives, *negatives = (unit(base + rng.standard_normal(base.shape)) for _ in "qpnn")
    return [queries, positives, np.stack(negatives, axis=1)]


def vectors_of(arrays: list[np.ndarray]) -> Vectors:
    queries, positives, negatives = (torch.tensor(a, requires_grad=True) for a in arrays)
    return Vectors(
        queries=queries,
        positives=positives,
        negatives=negatives,
        has_negative=torch.from_numpy(HAS_NEGATIVE),
    )


RELATED = np.eye(BATCH, dtype=bool)
RELATED[0, 3] = RELATED[3, 0] = True
CASES = {
    "gecko": (GECKO, None),
    "without same-tower negatives": (
        GECKO.model_copy(update={"same_tower_negatives": False}),
        None,
    ),
    "margin": (GECKO.model_copy(update={"same_tower_margin": 0.05}), None),
    "duplicates": (GECKO, RELATED),
    "matryoshka": (GECKO.model_copy(update={"matryoshka_dimensions": (3, 5)}), None),
    "everything": (
        GECKO.model_copy(update={"matryoshka_dimensions": (4,), "same_tower_margin": 0.1}),
        RELATED,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_the_plain_version(case: str):
    config, related = CASES[case]
    arrays = sample()
    vectors = vectors_of(arrays)
    loss = contrastive_loss(
        vectors,
        config,
        sizes=[BATCH],
        related=None if related is None else torch.from_numpy(related),
    )
    assert loss.item() == pytest.approx(plain_loss(*arrays, config, related), rel=1e-10)
    loss.backward()
    # Vectors arrive with unit length; the plain version renormalises, so compare tangents.
    tensors = (vectors.queries, vectors.positives, vectors.negatives)
    step = 1e-5
    for place, (array, tensor) in enumerate(zip(arrays, tensors, strict=True)):
        gradient = tensor.grad.numpy()
        tangent = gradient - (gradient * array).sum(-1, keepdims=True) * array
        for entry in np.ndindex(array.shape):
            change = np.zeros_like(array)
            change[entry] = step
            ends = []
            for sign in (1, -1):
                moved = list(arrays)
                moved[place] = array + sign * change
                ends.append(plain_loss(*moved, config, related))
            assert tangent[entry] == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-6)


def test_options_change_the_loss():
    arrays = sample()
    values = {plain_loss(*arrays, config, related) for config, related in CASES.values()}
    assert len(values) == len(CASES)


def test_missing_negative_is_ignored():
    arrays = sample()
    changed = [*arrays[:2], np.where(HAS_NEGATIVE[..., None], arrays[2], unit(arrays[2][::-1]))]
    losses = [contrastive_loss(vectors_of(a), GECKO, sizes=[BATCH]) for a in (arrays, changed)]
    assert losses[0].item() == losses[1].item()


def test_matryoshka_dimension_above_the_encoders_is_refused():
    config = GECKO.model_copy(update={"matryoshka_dimensions": (16,)})
    with pytest.raises(ValueError, match="only 8 dimensions"):
        contrastive_loss(vectors_of(sample()), config, sizes=[BATCH])


def test_related_examples_share_a_query_a_positive_or_both_roles():
    related = related_examples(["a", "a", "b", "c", "d"], ["1", "2", "2", "a", "9"])
    expected = np.eye(5, dtype=bool)
    for i, j in [(0, 1), (1, 2), (0, 3), (1, 3)]:
        expected[i, j] = expected[j, i] = True
    np.testing.assert_array_equal(related.numpy(), expected)


def _encoded(vectors: Vectors, weight: torch.Tensor) -> Vectors:
    """A linear 'encoder', so that one weight's gradient sees every vector."""
    queries, positives, negatives = (
        torch.nn.functional.normalize(tensor @ weight, dim=-1)
        for tensor in (vectors.queries, vectors.positives, vectors.negatives)
    )
    return replace(vectors, queries=queries, positives=positives, negatives=negatives)


def _rows(vectors: Vectors, rows: slice) -> Vectors:
    return Vectors(
        queries=vectors.queries.detach()[rows],
        positives=vectors.positives.detach()[rows],
        negatives=vectors.negatives.detach()[rows],
        has_negative=vectors.has_negative[rows],
    )


def _worker(rank: int, folder: str, world: int, counts: list[int]) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    for count in counts:
        order = [i for r in range(world) for i in range(r, count, world)]
        weight = torch.eye(DIMENSIONS, dtype=torch.float64, requires_grad=True)
        own = _rows(vectors_of(sample()), slice(rank, count, world))
        loss = contrastive_loss(
            _encoded(own, weight),
            CASES["everything"][0],
            sizes=[len(range(r, count, world)) for r in range(world)],
            rank=rank,
            related=torch.from_numpy(RELATED[np.ix_(order, order)]),
        )
        loss.backward()
        total, gradient = loss.detach(), torch.zeros_like(weight)
        if weight.grad is not None:  # none where this worker has no example
            gradient += weight.grad
        dist.all_reduce(total)
        dist.all_reduce(gradient)
        if rank == 0:
            torch.save({"loss": total, "gradient": gradient}, f"{folder}/{count}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_loss_and_gradient_of_one(tmp_path: Path):
    counts = [5, 4, 1]  # uneven, even, and nothing for the second
    mp.spawn(_worker, args=(str(tmp_path), 2, counts), nprocs=2)
    for count in counts:
        result = torch.load(tmp_path / f"{count}.pt", weights_only=True)
        weight = torch.eye(DIMENSIONS, dtype=torch.float64, requires_grad=True)
        alone = contrastive_loss(
            _encoded(_rows(vectors_of(sample()), slice(count)), weight),
            CASES["everything"][0],
            sizes=[count],
            related=torch.from_numpy(RELATED[:count, :count]),
        )
        alone.backward()
        torch.testing.assert_close(result["loss"], alone.detach())
        torch.testing.assert_close(result["gradient"], weight.grad)
