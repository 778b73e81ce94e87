"""A worker's part of a batch, and its loss and gradients; other workers' messages are made up."""

import sys
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.training import gradients
from pipelines.training.agreement import OutOfMemory
from pipelines.training.config import LossConfig, TrainingConfig
from pipelines.training.examples import Batch
from pipelines.training.gradients import (
    Slice,
    _add_up_gradients,
    _chunks,
    _embed_all,
    _plan,
    _replayable,
    backward,
    batch_loss,
    evaluation_loss,
    slice_batch,
    uses_bfloat16,
)
from pipelines.training.loss import Vectors, contrastive_loss
from pipelines.training.place import Place

CONFIG = TrainingConfig(
    loss=LossConfig(temperature=0.1, same_tower_negatives="symmetric", mask_duplicates=True)
)


def text(number: int) -> np.ndarray:
    return np.array([number], np.int64)


def batch(**changed: Any) -> Batch:
    """Five examples: the second has no hard negative, the third two; the fifth is not scored."""
    fields: dict[str, Any] = {
        "number": 0,
        "dataset": "a",
        "queries": [text(n) for n in range(5)],
        "positives": [text(10 + n) for n in range(5)],
        "negatives": [[text(20)], [], [text(22), text(32)], [text(23)], [text(24)]],
        "teacher_scores": [[2.0, 0.5], [1.0], [3.0, 0.25, 0.125], [4.0, 0.75], []],
        "query_ids": ["q0", "q1", "q0", "q3", "q4"],
        "positive_ids": ["p0", "p1", "p2", "p1", "q3"],
        "symmetric": False,
    }
    return Batch(**{**fields, **changed})


def numbers(rows: Any) -> list[int]:
    return [int(row[0]) for row in rows]


def test_worker_alone_has_the_whole_batch() -> None:
    part = slice_batch(batch(), CONFIG)
    assert numbers(part.queries) == [0, 1, 2, 3, 4]
    assert numbers(part.rows) == [*range(5), *range(10, 15), 20, 22, 32, 23, 24]
    assert (part.sizes, part.rank, part.symmetric) == ([5], 0, False)
    assert slice_batch(batch(symmetric=True), CONFIG).symmetric


@pytest.mark.parametrize(
    ("rank", "own", "negatives", "scores"),
    [
        (0, [0, 1, 2], [20, 22, 32], [[2, 0.5, None], [1, None, None], [3, 0.25, 0.125]]),
        (1, [3, 4], [23, 24], [[4, 0.75], [None] * 2]),
    ],
)
def test_each_worker_has_examples_that_lie_side_by_side(
    rank: int, own: list[int], negatives: list[int], scores: list[list[float | None]]
) -> None:
    part = slice_batch(batch(), CONFIG, Place(rank=rank, world=2))
    assert numbers(part.queries) == own
    assert numbers(part.positives) == [10 + number for number in own]
    assert numbers(part.negatives) == negatives
    assert part.num_negatives.tolist() == [len(batch().negatives[number]) for number in own]
    assert (part.sizes, part.rank) == ([3, 2], rank)
    assert part.teacher_scores is not None
    known = [[None if np.isnan(s) else s for s in row] for row in part.teacher_scores.tolist()]
    assert known == scores
    # Related are 0 and 2 (query), 1 and 3 (positive), 3 and 4 (both roles).
    assert part.related is not None
    expected = {(n, n) for n in range(5)} | {(0, 2), (2, 0), (1, 3), (3, 1), (3, 4), (4, 3)}
    found = {(i, j) for i, j in part.related.nonzero().tolist()}
    assert found == expected


def test_batch_without_scores_or_masks_has_none() -> None:
    unmasked = CONFIG.model_copy(update={"loss": LossConfig(mask_duplicates=False)})
    part = slice_batch(batch(teacher_scores=[[]] * 5), unmasked)
    assert part.teacher_scores is None and part.related is None


def vectors(num_rows: int) -> torch.Tensor:
    drawn = torch.randn(num_rows, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(drawn, dim=1)


@pytest.mark.parametrize("symmetric", [False, True])
def test_loss_of_a_batch_gives_each_example_its_own_negatives(symmetric: bool) -> None:
    config = CONFIG.model_copy(
        update={"loss": CONFIG.loss.model_copy(update={"distillation_weight": 0.5})}
    )
    part = slice_batch(batch(symmetric=symmetric), config)
    embedded = vectors(15)
    negatives = torch.zeros(5, 2, 4)
    has_negative = torch.zeros(5, 2, dtype=torch.bool)
    for row, (example, place) in enumerate([(0, 0), (2, 0), (2, 1), (3, 0), (4, 0)], start=10):
        negatives[example, place], has_negative[example, place] = embedded[row], True
    given = Vectors(
        queries=embedded[:5],
        positives=embedded[5:10],
        negatives=negatives,
        has_negative=has_negative,
        teacher_scores=part.teacher_scores,
    )
    expected = contrastive_loss(
        given, config.loss, sizes=[5], related=part.related, symmetric=symmetric
    )
    assert batch_loss(embedded, part, config).item() == expected.item()
    unscored = slice_batch(batch(symmetric=symmetric, teacher_scores=[[]] * 5), config)
    assert batch_loss(embedded, unscored, config).item() < expected.item()


@pytest.mark.parametrize(
    ("max_tokens", "pass_tokens", "expected"),
    [
        (100, 100, [[3, 0, 1, 2]]),
        (8, 100, [[3, 0, 1], [2]]),  # 3 * 2 = 6 places, and 4 * 5 with the longest
        (5, 100, [[3, 0], [1], [2]]),
        (6, 100, [[3, 0, 1], [2]]),  # just full
        (4, 100, [[3, 0], [1], [2]]),
        (3, 100, [[3], [0], [1], [2]]),
        (1, 100, [[3], [0], [1], [2]]),  # a longer text goes alone
        (11, 6, [[3, 0, 1, 2]]),  # two passes: 3 * 2 places, and 5 alone
        (10, 6, [[3, 0, 1], [2]]),
        (11, 5, [[3, 0, 1, 2]]),  # 2 * 2, 2 and 5
        (9, 2, [[3, 0, 1], [2]]),
    ],
)
def test_chunks_count_the_padding_of_their_passes(
    max_tokens: int, pass_tokens: int, expected: list[list[int]]
) -> None:
    assert _chunks([2, 2, 5, 1], max_tokens, pass_tokens) == expected


def test_no_rows_make_no_chunk() -> None:
    assert _chunks([], 10, 10) == []


class LinearEncoder:
    """A text of token ids is the product of a weight and its first two ids, of unit length."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.model = torch.nn.Linear(2, 4, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.model.weight.copy_(vectors(8)[:4, :2])
        self.passes: list[list[int]] = []
        self.settings: set[tuple[int | None, bool, torch.dtype]] = set()

    def embed_tokens(self, rows: Any, batch_tokens: int | None = None) -> torch.Tensor:
        self.passes.append([len(row) for row in rows])
        autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        self.settings.add((batch_tokens, *autocast))
        if not rows:
            return torch.zeros(0, 4, dtype=torch.float64)
        given = torch.stack([torch.tensor([row[0], row[-1]]).double() for row in rows])
        noise = 1 + 0.1 * torch.rand(1) * (self.model.training)
        return torch.nn.functional.normalize(self.model(given * noise + noise), dim=1)


def real_batch() -> Batch:
    rng = np.random.default_rng(0)
    draw = iter(rng.integers(1, 9, (20, 9)))

    def rows(count: int) -> list[np.ndarray]:
        return [next(draw)[: 2 + place % 5] for place in range(count)]

    return batch(
        queries=rows(5), positives=rows(5), negatives=[rows(1), [], rows(2), rows(1), rows(1)]
    )


@pytest.mark.parametrize("max_tokens", [1, 6, 12, 1000])
def test_cache_gives_the_loss_and_gradient_of_the_whole(max_tokens: int) -> None:
    found = []
    for config in (CONFIG, CONFIG.model_copy(update={"gradient_cache_tokens": max_tokens})):
        encoder: Any = LinearEncoder()
        encoder.model.eval()
        loss = backward(encoder, slice_batch(real_batch(), config), config)
        found.append((loss, encoder.model.weight.grad))
        cut = config is not CONFIG and max_tokens < 1000
        assert (len(encoder.passes) > 1) == cut
    (expected, plain), (loss, gradient) = found
    assert loss == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(gradient, plain)
    assert evaluation_loss(encoder, slice_batch(real_batch(), CONFIG), CONFIG) == pytest.approx(
        expected, rel=1e-9
    )


def test_model_computes_in_the_precision_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder: Any = LinearEncoder()
    for precision, sharded in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        monkeypatch.setattr(gradients, "is_sharded", lambda model, sharded=sharded: sharded)
        gradients.embed(encoder, [text(3)], CONFIG.model_copy(update={"precision": precision}))
    modes = {(tokens, autocast) for tokens, autocast, _ in encoder.settings}
    assert modes == {(None, False), (None, True), (sys.maxsize, True)}
    assert {dtype for _, autocast, dtype in encoder.settings if autocast} == {torch.bfloat16}


def test_place_among_the_workers_is_told_to_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(gradients, "contrastive_loss", lambda *_, **given: told.append(given))
    part = slice_batch(batch(symmetric=True), CONFIG, Place(rank=1, world=2))
    batch_loss(vectors(6), part, CONFIG)
    assert told == [{"sizes": [3, 2], "rank": 1, "related": part.related, "symmetric": True}]


def test_sharded_model_has_the_loss_and_gradient_of_a_whole_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cached = CONFIG.model_copy(update={"gradient_cache_tokens": 12})
    found = []
    for sharded, config in ((False, CONFIG), (True, CONFIG), (True, cached)):
        monkeypatch.setattr(gradients, "is_sharded", lambda model, sharded=sharded: sharded)
        monkeypatch.setattr(gradients, "highest", lambda count, device: count + 2)
        encoder: Any = LinearEncoder()
        encoder.model.eval()
        loss = backward(encoder, slice_batch(real_batch(), config), config)
        found.append((loss, encoder.model.weight.grad))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-9)
        torch.testing.assert_close(gradient, found[0][1])


def test_chunk_is_embedded_again_with_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder: Any = LinearEncoder()
    rows = [text(3), text(4)]
    torch.manual_seed(7)
    first, second = (_replayable(encoder, rows, CONFIG) for _ in range(2))
    before = torch.get_rng_state()
    values = first()
    assert torch.equal(torch.get_rng_state(), before)  # the training's own draws go on
    torch.rand(3)
    assert torch.equal(first(), values) and not torch.equal(second(), values)
    seeds: list[int] = []
    monkeypatch.setattr(gradients.torch, "manual_seed", seeds.append)
    for _ in range(20):
        _replayable(encoder, rows, CONFIG)()
    assert len(set(seeds)) == 20 and 2**50 < max(seeds) < 2**62


class Others:
    """Another worker that adds the same to every sum, and has run out of memory or not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, adds: float = 0.0) -> None:
        self.adds, self.agreed, self.summed = adds, list[bool](), 0
        monkeypatch.setattr(gradients, "agree", self.agree)
        monkeypatch.setattr(gradients.dist, "all_reduce", self.all_reduce)

    def agree(self, device: torch.device, *, ran_out: bool = False) -> None:
        assert device == torch.device("cpu")
        self.agreed.append(ran_out)

    def all_reduce(self, total: torch.Tensor) -> None:
        self.summed += 1
        total += self.adds


def test_gradients_of_all_workers_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    others = Others(monkeypatch, adds=100)
    weights = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    weights[0].grad = torch.arange(6.0).view(2, 3)
    _add_up_gradients(weights)
    grads = [weight.grad for weight in weights]
    assert grads[0] is not None and grads[1] is not None
    assert grads[0].tolist() == [[100, 101, 102], [103, 104, 105]]
    assert grads[1].tolist() == [100] * 4  # this worker had none
    assert (others.agreed, others.summed) == ([False], 1)


def part_of_two() -> Slice:
    """The second worker's, who has no example: what is added is the first one's."""
    return Slice(
        queries=[],
        positives=[],
        negatives=[],
        num_negatives=torch.zeros(0, dtype=torch.int64),
        teacher_scores=None,
        sizes=[5, 0],
        rank=1,
        related=None,
        symmetric=False,
    )


def test_loss_and_gradients_are_those_of_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    others = Others(monkeypatch, adds=7)
    monkeypatch.setattr(gradients, "batch_loss", lambda *_: torch.tensor(0.5))
    encoder: Any = LinearEncoder()
    frozen = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    encoder.model.register_parameter("frozen", frozen)
    assert backward(encoder, part_of_two(), CONFIG) == 7.5
    assert encoder.model.weight.grad.tolist() == torch.full((4, 2), 7.0).tolist()
    assert frozen.grad is None and others.summed == 2
    assert evaluation_loss(encoder, part_of_two(), CONFIG) == 7.5


@pytest.mark.parametrize(("sizes", "agreed"), [([5], []), ([5, 0], [True])])
def test_worker_that_runs_out_of_memory_says_so_to_the_others(
    sizes: list[int], agreed: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError

    others = Others(monkeypatch)
    monkeypatch.setattr(gradients, "batch_loss", fail)
    part = slice_batch(batch(), CONFIG)
    with pytest.raises(OutOfMemory):
        backward(LinearEncoder(), Slice(**{**vars(part), "sizes": sizes}), CONFIG)  # type: ignore[arg-type]
    assert others.agreed == agreed
    monkeypatch.setattr(gradients, "is_sharded", lambda model: True)
    monkeypatch.setattr(gradients, "highest", lambda count, device: count)
    with pytest.raises(torch.OutOfMemoryError):
        backward(LinearEncoder(), Slice(**{**vars(part), "sizes": sizes}), CONFIG)  # type: ignore[arg-type]


def test_sharded_model_passes_as_often_as_with_every_other_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [np.arange(1, length + 1) for length in (2, 2, 5, 1)]
    encoder: Any = LinearEncoder()
    encoder.model.eval()
    filled, chunks = _plan(encoder, rows, 6)
    assert (len(filled), chunks) == (4, [[3, 0, 1], [2]])
    plain = _embed_all(encoder, rows, CONFIG)
    monkeypatch.setattr(gradients, "_PASS_TOKENS", 6)
    assert _plan(encoder, rows, 11)[1] == [[3, 0, 1, 2]]  # in two passes
    monkeypatch.setattr(gradients, "is_sharded", lambda model: True)
    monkeypatch.setattr(gradients, "highest", lambda count, device: count + 2)
    assert _plan(encoder, rows, 11)[1][2:] == [[3, 0, 1], [2]]  # each in one
    filled, chunks = _plan(encoder, rows, 6)
    assert [row.tolist() for row in filled[4:]] == [[0], [0]]
    assert {row.dtype for row in filled} == {np.dtype(np.int64)}
    assert chunks == [[4], [5], [3, 0, 1], [2]]
    encoder.passes.clear()
    assert torch.equal(_embed_all(encoder, rows, CONFIG), plain)
    assert encoder.passes == [[1], [1], [1, 2, 2], [5]]


def test_precision_is_what_is_asked_or_what_the_hardware_multiplies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    asked = [CONFIG.model_copy(update={"precision": p}) for p in ("bfloat16", "float32", "auto")]
    for able in (True, False):
        monkeypatch.setattr("actors.kernels.linear.native_bfloat16", lambda device, able=able: able)
        assert [uses_bfloat16(config, cpu) for config in asked] == [True, False, able]
