"""A gradient cache found by trial and halved where memory runs out; the memory is simulated."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from actors.encoder import Encoder
from cluster.errors import UserError
from cluster.storage import open_storage
from pipelines.training import gradients, loss
from pipelines.training.config import LossConfig, TrainingConfig
from pipelines.training.examples import iterate_batches
from pipelines.training.gradients import slice_batch
from pipelines.training.memory import FITTED, fit, search_tokens
from pipelines.training.metrics import read_metrics
from pipelines.training.optimizer import make_optimizer, train_fitting
from pipelines.training.place import Place
from pipelines.training.train import _note
from pipelines.training.trainer import Job
from pipelines.training.worker import run_training

CONFIG = TrainingConfig(
    batch_size=16,
    max_query_tokens=32,
    max_passage_tokens=32,
    learning_rate=3e-3,
    dropout=False,
    checkpoint_every_batches=3,
    loss=LossConfig(matryoshka_dimensions=(16,), mask_duplicates=True),
    tracking=(),
)
WORLD, SEED = 2, 7
# What `_longest_batch` makes of 16 examples: their texts are up to a tenth shorter than 32 tokens.
LONGEST = 32


class Card:
    """A memory of so many bytes, of which a token of a pass takes 1000."""

    def __init__(self, encoder: Encoder, total: int, state: Callable[[], int]) -> None:
        self.encoder, self.total, self.passes = encoder, total, [0]
        self.state = state

    def room(self) -> int:
        return self.total

    def taken_by(self, work: Callable[[], None]) -> int:
        before = self.encoder.num_tokens
        work()
        self.passes.append(self.encoder.num_tokens - before)
        if self.passes[-1] == 0:  # the loss alone
            return 5000
        taken = 1000 * self.passes[-1] + 3000
        if taken + self.state() > self.total:
            raise torch.OutOfMemoryError("simulated")
        return taken


@pytest.fixture
def encoder(student: str) -> Encoder:
    found = Encoder.load(student, device="cpu")
    found.set_training(dropout=True)
    return found


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(8 * w.numel() for group in optimizer.param_groups for w in group["params"])


def test_trial_finds_what_fits_beside_the_optimizer_and_leaves_no_trace(encoder: Encoder):
    optimizer = make_optimizer(encoder, CONFIG)
    state = state_bytes(optimizer)
    encoder.model.register_buffer("passes", torch.zeros(1))
    encoder.model.register_forward_hook(lambda *_: encoder.model.passes.add_(1) and None)
    before = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    torch.manual_seed(SEED)
    numbers = torch.rand(3)
    torch.manual_seed(SEED)
    card = Card(encoder, 1_000_000 + state, lambda: state)
    found = fit(encoder, optimizer, CONFIG, memory=card).gradient_cache_tokens
    assert 0.9 * 0.75 * 990 < found <= 0.75 * 995
    assert max(card.passes) > 300  # seen to fit, not reckoned alone
    assert torch.equal(torch.rand(3), numbers)
    assert all(weight.grad is None for weight in encoder.model.parameters())
    assert not optimizer.state
    assert encoder.num_tokens == encoder.num_places == 0
    for name, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert encoder.model.training


def test_whole_batch_that_fits_has_no_cache_and_a_card_for_no_text_is_refused(encoder: Encoder):
    optimizer = make_optimizer(encoder, CONFIG)
    state = state_bytes(optimizer)
    for total, expected in ((10_000_000, None), (1_000_000, True)):
        card = Card(encoder, total + state, lambda: state)
        found = fit(encoder, optimizer, CONFIG, memory=card).gradient_cache_tokens
        assert (found and True) is expected
    for total in (20_000, 45_000):  # not even a pass; not with what is left for fragments
        card = Card(encoder, total + state, lambda: state)
        with pytest.raises(UserError, match="gradient_checkpointing: true, a max_passage_tokens b"):
            fit(encoder, optimizer, CONFIG, memory=card)


def test_more_hard_negatives_make_a_larger_batch(encoder: Encoder, examples: str):
    optimizer, batch = make_optimizer(encoder, CONFIG), next(iterate_batches(examples))
    sizes = []
    for num_negatives in (1, 3):
        card = Card(encoder, 10**9, lambda: 0)
        like = replace(batch, negatives=[[], [batch.queries[0]] * num_negatives])
        fit(encoder, optimizer, CONFIG, like=like, memory=card)
        sizes.append(max(card.passes))
    assert sizes[1] == pytest.approx(sizes[0] * 5 / 3, rel=0.01)


def test_cpu_has_no_cache_and_a_given_number_stays(encoder: Encoder):
    optimizer = make_optimizer(encoder, CONFIG)
    assert CONFIG.gradient_cache_tokens == "auto"
    assert fit(encoder, optimizer, CONFIG).gradient_cache_tokens is None
    card = Card(encoder, 1000, lambda: 0)
    for given in (4096, None):
        config = CONFIG.model_copy(update={"gradient_cache_tokens": given})
        assert fit(encoder, optimizer, config, memory=card).gradient_cache_tokens == given
    for refused in (63, "some"):
        with pytest.raises(ValidationError):
            TrainingConfig(gradient_cache_tokens=refused)


@pytest.mark.parametrize(
    ("curve", "share"),
    [
        (lambda tokens: 10**6 + 600 * tokens, 0.9),
        # What a single pass takes for a while stops to grow.
        (lambda tokens: 600 * tokens + 900 * min(tokens, 16384), 0.9),
        (lambda tokens: 600 * tokens * (1 + tokens / 50_000), 0.45),  # worse than it looked
    ],
    ids=["a line", "a bend", "a curve"],
)
def test_search_comes_near_what_fits_in_few_passes(curve: Callable[[int], float], share: float):
    room, tried = 64e6, []

    def taken_by(tokens: int) -> float:
        tried.append(tokens)
        taken = curve(tokens)
        return taken if taken < 1.25 * room else float("inf")

    found = search_tokens(taken_by, room=room, smallest=384, whole=10**6)
    assert curve(found) <= room < curve(int(found / share) + 1)
    assert found in tried
    assert len(tried) <= 7
    assert search_tokens(curve, room=room, smallest=384, whole=20_000) == 20_000
    assert search_tokens(curve, room=curve(384) - 1, smallest=384, whole=20_000) == 0


class Limit:
    """Runs out of memory where texts of more tokens than these go through a model at once."""

    def __init__(self, encoder: Encoder, tokens: int) -> None:
        self.embed, self.tokens = encoder.embed_tokens, tokens
        encoder.embed_tokens = self  # type: ignore[method-assign]

    def __call__(self, rows: Any, **options: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and len(rows) * max(map(len, rows)) > self.tokens:
            raise torch.OutOfMemoryError("simulated")
        return self.embed(rows, **options)


def test_step_that_runs_out_of_memory_is_halved_and_changes_nothing(examples: str, student: str):
    config = CONFIG.model_copy(update={"gradient_cache_tokens": None})
    found = []
    for limit in (10**9, 300):
        encoder = Encoder.load(student, device="cpu")
        Limit(encoder, limit)
        optimizer, losses, now = make_optimizer(encoder, config), [], config
        for batch in islice(iterate_batches(examples), 3):
            part = slice_batch(batch, config)
            *row, now = train_fitting(encoder, optimizer, part, now, rate=1e-3, seed=SEED)
            losses.append(row)
        found.append((losses, list(encoder.model.parameters()), now.gradient_cache_tokens))
    (losses, plain, tokens), (other_losses, halved, fewer) = found
    assert tokens is None
    assert 150 < fewer <= 300
    for one, other in zip(losses, other_losses, strict=True):
        assert other == pytest.approx(one, rel=1e-5)
    for one, other in zip(plain, halved, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)


def job(examples: str, student: str, output: Path, **settings: Any) -> Job:
    config = CONFIG.model_copy(update=settings)
    return Job(
        config=config, examples=examples, student=student, output=str(output), num_batches=12
    )


def test_training_tells_where_it_ran_out_and_goes_on_with_less(
    examples: str, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run_training(job(examples, student, tmp_path / "plain"), Place(device="cpu"))
    plain = read_metrics(open_storage(tmp_path / "plain"))
    assert not any("gradient_cache_tokens" in row for row in plain)
    assert _note(plain) == f"loss {sum(row['loss'] for row in plain) / 12:.3f}"
    load = Encoder.load

    def limited(*given: Any, **named: Any) -> Encoder:
        encoder = load(*given, **named)
        Limit(encoder, 300)
        return encoder

    monkeypatch.setattr(Encoder, "load", limited)
    run_training(job(examples, student, tmp_path / "less"), Place(device="cpu"))
    storage = open_storage(tmp_path / "less")
    rows = read_metrics(storage)
    tokens = rows[0]["gradient_cache_tokens"]
    assert [row.get("out_of_memory") for row in rows] == [1] + [None] * 11
    assert {row["gradient_cache_tokens"] for row in rows} == {tokens}
    assert _note(rows).endswith(f"in 1 batch, gradient cache of {tokens} tokens")
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in plain], rel=1e-4)
    # A next start goes on with what is left in the folder.
    storage.write_bytes(FITTED, b"200")
    storage.delete("work/checkpoints")
    run_training(job(examples, student, tmp_path / "less"), Place(device="cpu"))
    assert read_metrics(storage)[0]["gradient_cache_tokens"] == 200

    monkeypatch.setattr(Encoder, "load", load)
    encoder = Encoder.load(student, device="cpu")
    Limit(encoder, LONGEST - 1)
    monkeypatch.setattr(Encoder, "load", lambda *_, **__: encoder)
    with pytest.raises(UserError, match=r"does not fit in the memory of this cpu: set training\."):
        run_training(job(examples, student, tmp_path / "none"), Place(device="cpu"))


def test_restart_takes_what_the_trial_found(
    examples: str, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def found(*given: Any, **_: Any) -> TrainingConfig:
        return given[2].model_copy(update={"gradient_cache_tokens": 350})

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.training.trainer.fit", found)
        run_training(job(examples, student, tmp_path), Place(device="cpu"))
    storage = open_storage(tmp_path)
    storage.delete("work/checkpoints")
    run_training(job(examples, student, tmp_path), Place(device="cpu"))  # a CPU's trial: no cache
    assert {row["gradient_cache_tokens"] for row in read_metrics(storage)} == {350}


PLACES = ("forward", "loss", "backward", "sum")


def fail_once(place: str, encoder: Encoder, patch: pytest.MonkeyPatch) -> None:
    """Makes this worker run out of memory at one place of its next step."""
    left = [1]

    def first(*_: Any) -> None:
        if left:
            left.clear()
            raise torch.OutOfMemoryError("simulated")

    def before(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **named: Any) -> Any:
            first()
            return call(*given, **named)

        return wrapped

    if place == "forward":
        patch.setattr(encoder, "embed_tokens", before(encoder.embed_tokens))
    elif place == "loss":
        patch.setattr(loss, "_example_losses", before(loss._example_losses))
    elif place == "sum":
        patch.setattr(gradients, "_add_up_gradients", before(gradients._add_up_gradients))
    else:
        # The last gradient of a backward pass.
        encoder.model.get_input_embeddings().weight.register_hook(first)


def work(rank: int, folder: str, examples: str, student: str) -> None:
    """Two steps for each place where one of the workers runs out, and two undisturbed ones."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    torch.set_num_threads(1)
    config = CONFIG.model_copy(update={"gradient_cache_tokens": None})
    here = Place(rank=rank, world=WORLD)
    parts = [slice_batch(b, config, here) for b in islice(iterate_batches(examples), 2)]
    for place in ("none", *PLACES):
        encoder, now = Encoder.load(student, device="cpu"), config
        optimizer, losses = make_optimizer(encoder, config), []
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1 and place != "none":
                fail_once(place, encoder, patch)
            for part in parts:
                row = train_fitting(encoder, optimizer, part, now, rate=1e-3, seed=SEED + rank)
                losses, now = [*losses, *row[:2]], row[2]
        found = {
            "losses": losses,
            "tokens": now.gradient_cache_tokens,
            "weights": list(encoder.model.state_dict().values()),
        }
        torch.save(found, f"{folder}/{place}-{rank}.pt")
    card = Card(encoder, 10**9 if rank else 400_000, lambda: 0)
    found = fit(encoder, optimizer, CONFIG, here, memory=card)
    Path(f"{folder}/fitted-{rank}").write_text(str(found.gradient_cache_tokens))
    dist.destroy_process_group()


def test_workers_repeat_a_step_together_where_one_of_them_runs_out(
    examples: str, student: str, tmp_path: Path
):
    torch.multiprocessing.spawn(work, (str(tmp_path), examples, student), nprocs=WORLD)

    def read(place: str, rank: int) -> dict[str, Any]:
        return torch.load(tmp_path / f"{place}-{rank}.pt")

    undisturbed = read("none", 0)
    assert undisturbed["tokens"] is None
    for place in PLACES:
        one, other = read(place, 0), read(place, 1)
        assert one["tokens"] == other["tokens"] > LONGEST
        assert one["losses"] == other["losses"]
        assert one["losses"] == pytest.approx(undisturbed["losses"], rel=1e-5)
        for weights in zip(one["weights"], other["weights"], undisturbed["weights"], strict=True):
            assert torch.equal(*weights[:2])
            torch.testing.assert_close(weights[0], weights[2], rtol=1e-3, atol=1e-5)
    # The one with room for everything takes what the other one found.
    tokens = [int((tmp_path / f"fitted-{rank}").read_text()) for rank in range(WORLD)]
    assert tokens[0] == tokens[1] < 0.75 * 400
