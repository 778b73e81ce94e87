from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pydantic import ValidationError

from pipelines.training.config import LossConfig
from pipelines.training.loss import Vectors, _gather, contrastive_loss, related_examples

GECKO = LossConfig(temperature=0.1)
BATCH, DIMENSIONS = 5, 8
# The second example has none, the fourth two; the rest is padding.
HAS_NEGATIVE = np.array([[1, 0], [0, 0], [1, 0], [1, 1], [0, 1]], dtype=bool)
NONE = np.nan
TEACHER = np.array(  # of the positive and its negatives; the fifth has none
    [[2, 0.4, NONE], [1, NONE, NONE], [0.7, 1.1, NONE], [2, 0.5, 0.3], [NONE] * 3]
)
RELATED = np.eye(BATCH, dtype=bool)
RELATED[0, 3] = RELATED[3, 0] = True
# Every switch: what it sets in the configuration, and what contrastive_loss is told.
SWITCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no in-batch negatives": ({"in_batch_negatives": False}, {}),
    "no hard negatives": ({"hard_negatives": False}, {}),
    "no same-tower negatives": ({"same_tower_negatives": "none"}, {}),
    "same-tower negatives where symmetric": ({"same_tower_negatives": "symmetric"}, {}),
    "a symmetric batch": ({"same_tower_negatives": "symmetric"}, {"symmetric": True}),
    "duplicates": ({}, {"related": RELATED}),
    "margin": ({"mask_margin": 0.02}, {}),
    "matryoshka": ({"matryoshka_dimensions": (2, 5)}, {}),
    "weighted matryoshka": (
        {"matryoshka_dimensions": (6, 4), "matryoshka_weights": (0.5, 2)},
        {},
    ),
    "hardness": ({"hardness": 5}, {}),
    "spread-out": ({"spread_out_weight": 0.3}, {}),
    "distillation": ({"distillation_weight": 0.7, "teacher_temperature": 0.4}, {}),
    "a student's temperature": ({"distillation_weight": 0.7, "student_temperature": 0.3}, {}),
    "a tenth of equation 3": ({"contrastive_weight": 0.1}, {}),
    "lists alone": ({"contrastive_weight": 0, "distillation_weight": 0.7}, {}),
}
EVERYTHING = (
    {
        "matryoshka_dimensions": (4,),
        "matryoshka_weights": (0.5,),
        "mask_margin": 0.1,
        "hardness": 2,
        "spread_out_weight": 0.3,
        "distillation_weight": 0.7,
    },
    {"related": RELATED},
)
# What scored lists are trained with: a little contrast, and no negative above the positive.
LISTS = (
    {
        "contrastive_weight": 0.1,
        "hard_negatives": False,
        "mask_margin": 0,
        "distillation_weight": 1,
        "student_temperature": 0.05,
        "teacher_temperature": 1,
    },
    {},
)
CASES = {
    "equation 3": [({}, {})],
    "everything": [EVERYTHING],
    "lists": [LISTS],
    **{name: [switch] for name, switch in SWITCHES.items()},
    **{
        f"{first}, {second}": [SWITCHES[first], SWITCHES[second]]
        for first, second in combinations(SWITCHES, 2)
        if not SWITCHES[first][0].keys() & SWITCHES[second][0].keys()
        and {first, second} != {"no in-batch negatives", "no hard negatives"}
    },
}


def case(name: str) -> tuple[LossConfig, dict[str, Any]]:
    settings: dict[str, Any] = {"temperature": 0.1}
    told: dict[str, Any] = {}
    for more, other in CASES[name]:
        settings |= more
        told |= other
    return LossConfig(**settings), told


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def softmax(scores: list[float]) -> np.ndarray:
    powers = np.exp(np.array(scores) - np.max(scores))
    return powers / powers.sum()


def plain_loss(
    arrays: list[np.ndarray],
    config: LossConfig,
    told: dict[str, Any],
    frozen: list[np.ndarray] | None = None,
) -> float:
    """Equation 3 term by term, with the options written out; hardness is judged on `frozen`."""
    related, tau = told.get("related"), config.temperature
    same_tower = config.same_tower_negatives == "all" or (
        config.same_tower_negatives == "symmetric" and told.get("symmetric", False)
    )
    weights = config.matryoshka_weights or [1] * len(config.matryoshka_dimensions)
    total = 0.0
    for size, weight in [(DIMENSIONS, 1), *zip(config.matryoshka_dimensions, weights, strict=True)]:
        q, p, n = (unit(vectors[..., :size]) for vectors in arrays)
        fixed_q, _, fixed_n = (unit(vectors[..., :size]) for vectors in frozen or arrays)
        losses = []
        for i in range(len(q)):
            own = q[i] @ p[i]
            terms = [np.exp(own / tau)]
            for k in np.flatnonzero(HAS_NEGATIVE[i]) if config.hard_negatives else ():
                hardness = np.exp(config.hardness * (fixed_q[i] @ fixed_n[i, k]))
                terms.append(hardness * np.exp(q[i] @ n[i, k] / tau))
            spread = 0.0
            for j in range(len(q)):
                if j == i:
                    continue
                spread += ((q[i] @ q[j]) ** 2 + (p[i] @ p[j]) ** 2) / (len(q) - 1)
                if related is not None and related[i, j]:
                    continue
                highest = np.inf if config.mask_margin is None else own + config.mask_margin
                if config.in_batch_negatives and q[i] @ p[j] <= highest:
                    terms.append(np.exp(q[i] @ p[j] / tau))
                if same_tower and q[i] @ q[j] <= highest:
                    terms.append(np.exp(q[i] @ q[j] / tau))
            loss = -config.contrastive_weight * np.log(np.exp(own / tau) / sum(terms))
            loss += config.spread_out_weight * spread
            known = np.flatnonzero(~np.isnan(TEACHER[i]))
            if config.distillation_weight and len(known) > 1:
                candidates = [p[i], *n[i]]
                wanted = softmax([TEACHER[i, c] / config.teacher_temperature for c in known])
                student_tau = (
                    tau if config.student_temperature is None else config.student_temperature
                )
                found = softmax([q[i] @ candidates[c] / student_tau for c in known])
                divergence = float((wanted * np.log(wanted / found)).sum())
                loss += config.distillation_weight * divergence
            losses.append(loss)
        total += weight * np.mean(losses)
    return float(total / (1 + sum(weights)))


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
        teacher_scores=torch.from_numpy(TEACHER),
    )


def loss_of(vectors: Vectors, config: LossConfig, told: dict[str, Any]) -> torch.Tensor:
    related = told.get("related")
    return contrastive_loss(
        vectors,
        config,
        sizes=[BATCH],
        related=None if related is None else torch.from_numpy(related),
        symmetric=told.get("symmetric", False),
    )


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_the_plain_version(name: str):
    config, told = case(name)
    arrays = sample()
    vectors = vectors_of(arrays)
    loss = loss_of(vectors, config, told)
    assert loss.item() == pytest.approx(plain_loss(arrays, config, told), rel=1e-10)
    loss.backward()
    tensors = (vectors.queries, vectors.positives, vectors.negatives)
    rng, step = np.random.default_rng(1), 1e-5
    for place, (array, tensor) in enumerate(zip(arrays, tensors, strict=True)):
        gradient = np.zeros_like(array) if tensor.grad is None else tensor.grad.numpy()
        for _ in range(4):
            # Along the sphere: the plain version renormalises.
            direction = rng.standard_normal(array.shape)
            direction -= (direction * array).sum(-1, keepdims=True) * array
            ends = []
            for sign in (1, -1):
                moved = list(arrays)
                moved[place] = array + sign * step * direction
                ends.append(plain_loss(moved, config, told, frozen=arrays))
            slope = (ends[0] - ends[1]) / (2 * step)
            assert (gradient * direction).sum() == pytest.approx(slope, abs=1e-6)


def test_every_switch_changes_the_loss():
    values = [plain_loss(sample(), *case(name)) for name in ("equation 3", *SWITCHES)]
    same = {"a symmetric batch": "equation 3"}
    same |= {"same-tower negatives where symmetric": "no same-tower negatives"}
    assert len(set(values)) == len(values) - len(same)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"matryoshka_dimensions": (4,), "matryoshka_weights": (1, 2)}, "one for each"),
        ({"in_batch_negatives": False, "hard_negatives": False}, "nothing to learn from"),
        ({"contrastive_weight": 0}, "nothing to learn from: give a distillation_weight"),
        ({"contrastive_weight": -1}, "greater than or equal to 0"),
        ({"student_temperature": 0}, "greater than 0"),
        ({"matryoshka_dimensions": (0,)}, "above 0"),
    ],
)
def test_config_that_cannot_be_is_refused(settings: dict[str, Any], said: str):
    with pytest.raises(ValidationError, match=said):
        LossConfig(**settings)


def test_margin_of_nothing_masks_what_scores_above_the_positive():
    config, told = case("lists")
    unmasked = config.model_copy(update={"mask_margin": None})
    losses = [loss_of(vectors_of(sample()), each, told).item() for each in (config, unmasked)]
    assert losses[0] < losses[1]


def test_lists_alone_need_no_other_example(monkeypatch: pytest.MonkeyPatch):
    def not_called(*_: Any) -> None:
        raise AssertionError("equation 3 is computed")

    monkeypatch.setattr("pipelines.training.loss._contrastive", not_called)
    monkeypatch.setattr("pipelines.training.loss._gather", not_called)
    config = case("lists alone")[0]
    whole = contrastive_loss(vectors_of(sample()), config, sizes=[BATCH])
    parts = [
        contrastive_loss(_rows(vectors_of(sample()), rows), config, sizes=[3, 2], rank=rank)
        for rank, rows in enumerate((slice(3), slice(3, BATCH)))
    ]
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), rel=1e-12)
    # Where nobody is taught there is still a loss, whose gradient is 0.
    vectors = replace(vectors_of(sample()), teacher_scores=None)
    loss = contrastive_loss(vectors, config, sizes=[BATCH])
    loss.backward()
    assert loss.item() == 0 and vectors.queries.grad is not None
    assert not vectors.queries.grad.any()


def test_order_of_a_list_moves_towards_the_teachers():
    rng = np.random.default_rng(0)
    num_lists, size = 6, 8
    teacher = -np.sort(-rng.standard_normal((num_lists, size)))  # the positive is the best
    queries = torch.tensor(unit(rng.standard_normal((num_lists, 16))), requires_grad=True)
    passages = torch.tensor(unit(rng.standard_normal((num_lists, size, 16))))
    vectors = Vectors(
        queries=queries,
        positives=passages[:, 0],
        negatives=passages[:, 1:],
        has_negative=torch.ones(num_lists, size - 1, dtype=torch.bool),
        teacher_scores=torch.tensor(teacher),
    )
    config = LossConfig(
        contrastive_weight=0,
        distillation_weight=1,
        teacher_temperature=1,
        student_temperature=0.1,
    )
    contrastive_loss(vectors, config, sizes=[num_lists]).backward()
    assert queries.grad is not None

    def agreement(queries: torch.Tensor) -> float:
        """The share of a list's pairs that stand in the teacher's order, the mean of lists."""
        near = (passages @ queries.detach()[:, :, None])[..., 0].numpy()
        return float(np.mean([near[:, a] > near[:, b] for a, b in combinations(range(size), 2)]))

    rates = [0, 0.1, 0.2, 0.4]
    agreed = [agreement(queries - rate * queries.grad) for rate in rates]
    assert agreed == sorted(agreed) and agreed[-1] > agreed[0] + 0.1, agreed


def test_missing_negative_is_ignored():
    arrays = sample()
    changed = [*arrays[:2], np.where(HAS_NEGATIVE[..., None], arrays[2], unit(arrays[2][::-1]))]
    losses = [contrastive_loss(vectors_of(a), GECKO, sizes=[BATCH]) for a in (arrays, changed)]
    assert losses[0].item() == losses[1].item()


def test_matryoshka_dimension_above_the_encoders_is_refused():
    config = LossConfig(matryoshka_dimensions=(16,))
    with pytest.raises(ValueError, match="only 8 dimensions"):
        contrastive_loss(vectors_of(sample()), config, sizes=[BATCH])


def test_matryoshka_dimension_that_is_the_encoders_changes_nothing():
    losses = [
        contrastive_loss(vectors_of(sample()), config, sizes=[BATCH]).item()
        for config in (GECKO, LossConfig(temperature=0.1, matryoshka_dimensions=(DIMENSIONS,)))
    ]
    assert losses[0] == losses[1]


def test_batch_is_of_no_symmetric_set_unless_that_is_said():
    config = LossConfig(temperature=0.1, same_tower_negatives="symmetric")
    loss = contrastive_loss(vectors_of(sample()), config, sizes=[BATCH])
    assert loss.item() == pytest.approx(plain_loss(sample(), config, {}), rel=1e-10)


def test_batch_of_two_is_spread_out():
    config = LossConfig(temperature=0.1, spread_out_weight=0.3)
    loss = contrastive_loss(_rows(vectors_of(sample()), slice(2)), config, sizes=[2])
    arrays = [array[:2] for array in sample()]
    assert loss.item() == pytest.approx(plain_loss(arrays, config, {}), rel=1e-10)


def test_text_as_near_as_the_margin_is_still_a_negative():
    config = LossConfig(temperature=0.1, mask_margin=0.0, same_tower_negatives="none")
    axes = np.eye(DIMENSIONS)[:BATCH]  # products of these are exact
    arrays = [axes, axes[[0, 0, 2, 3, 4]], np.stack([axes[::-1], axes], axis=1)]
    loss = contrastive_loss(vectors_of(arrays), config, sizes=[BATCH])
    assert loss.item() == pytest.approx(plain_loss(arrays, config, {}), rel=1e-10)


def test_examples_without_a_teacher_are_trained_without():
    config = LossConfig(temperature=0.1, distillation_weight=0.7)
    untaught = replace(vectors_of(sample()), teacher_scores=None)
    assert contrastive_loss(untaught, config, sizes=[BATCH]).item() == pytest.approx(
        plain_loss(sample(), GECKO, {}), rel=1e-10
    )


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_rows_of_all_workers_are_gathered_with_the_gradients_of_all(
    rank: int, monkeypatch: pytest.MonkeyPatch
):
    """In one process, which the other two workers' messages are put into."""
    sizes = [1, 3, 2]
    rows = [torch.full((size, 2), 10.0 * (worker + 1)) for worker, size in enumerate(sizes)]
    rows = [part + torch.arange(len(part))[:, None] for part in rows]

    def all_gather(parts: list[torch.Tensor], mine: torch.Tensor) -> None:
        assert len(parts) == 3 and mine.tolist() == [
            *rows[rank].tolist(),
            *[[0.0, 0.0]] * (3 - sizes[rank]),
        ]
        for part, theirs in zip(parts, rows, strict=True):
            part.fill_(-1.0)[: len(theirs)] = theirs

    monkeypatch.setattr("pipelines.training.loss.agree", lambda device: None)
    monkeypatch.setattr("pipelines.training.loss.dist.all_gather", all_gather)
    monkeypatch.setattr("pipelines.training.loss.dist.all_reduce", lambda total: total.add_(100))
    own = rows[rank].clone().requires_grad_()
    gathered = _gather(own, sizes, rank)
    assert gathered.tolist() == torch.cat(rows).tolist()
    places = torch.arange(12.0).view(6, 2)
    (gathered * places).sum().backward()
    first = sum(sizes[:rank])
    assert own.grad is not None
    assert own.grad.tolist() == (places[first : first + sizes[rank]] + 100).tolist()
    # A worker whose rows need no gradient takes part in the others' backward pass.
    assert _gather(rows[rank], sizes, rank).requires_grad
    assert _gather(rows[0], [1], 0) is rows[0]


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
        teacher_scores=vectors.teacher_scores[rows],
    )


def _worker(rank: int, folder: str, world: int, counts: dict[int, str]) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    for count, name in counts.items():
        order = [i for r in range(world) for i in range(r, count, world)]
        weight = torch.eye(DIMENSIONS, dtype=torch.float64, requires_grad=True)
        own = _rows(vectors_of(sample()), slice(rank, count, world))
        loss = contrastive_loss(
            _encoded(own, weight),
            case(name)[0],
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
    # Uneven, even, and nothing for the second; and without a word between them.
    counts = {5: "everything", 4: "everything", 1: "everything", 3: "lists alone"}
    mp.spawn(_worker, args=(str(tmp_path), 2, counts), nprocs=2)
    for count, name in counts.items():
        result = torch.load(tmp_path / f"{count}.pt", weights_only=True)
        weight = torch.eye(DIMENSIONS, dtype=torch.float64, requires_grad=True)
        alone = contrastive_loss(
            _encoded(_rows(vectors_of(sample()), slice(count)), weight),
            case(name)[0],
            sizes=[count],
            related=torch.from_numpy(RELATED[:count, :count]),
        )
        alone.backward()
        torch.testing.assert_close(result["loss"], alone.detach())
        torch.testing.assert_close(result["gradient"], weight.grad)
