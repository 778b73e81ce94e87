"""FSDP2 over two processes, without Ray: as one worker, and going on from its checkpoints."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from actors.encoder import Encoder
from cluster.errors import TokayError
from cluster.storage import open_storage
from pipelines.datasets.retrieval import RetrievalDataset, TitledText
from pipelines.training import gradients
from pipelines.training.config import LoraConfig, LossConfig, TrainingConfig, ValidationConfig
from pipelines.training.layers import add_projection
from pipelines.training.metrics import read_metrics
from pipelines.training.place import Place
from pipelines.training.sharding import shard
from pipelines.training.trainer import Job
from pipelines.training.validation import WatchedSet
from pipelines.training.worker import run_training

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NUM_BATCHES, WORLD = 12, 2
CONFIG = TrainingConfig(
    batch_size=16,
    max_query_tokens=32,
    max_passage_tokens=32,
    learning_rate=3e-3,
    dropout=False,
    checkpoint_every_batches=3,
    loss=LossConfig(matryoshka_dimensions=(16,), mask_duplicates=True),
    sharding="fsdp2",
    tracking=(),
)
TEST_SET = RetrievalDataset(
    name="flight",
    passages={
        str(n): TitledText("", text) for n, text in enumerate(("a wing", "a shock", "a gas"))
    },
    queries={"a": "flow over a wing", "b": "gas"},
    qrels={"a": {"0": 1}, "b": {"2": 1}},
)


WATCHED = {"validation": ValidationConfig(every_batches=4, test_set="flight", patience=9)}
RUNS: dict[str, dict[str, Any]] = {
    "plain": WATCHED,
    "cut": WATCHED,
    "adapters": {
        "lora": LoraConfig(rank=8),
        "gradient_cache_tokens": 64,
        "gradient_checkpointing": True,
        "soup_checkpoints": 3,
    },
    "trainings": {"soup_trainings": 3},
    "memory": {},
    "bfloat16": {**WATCHED, "precision": "bfloat16"},
}


class Killed(Exception):
    pass


def train(
    folder: Path, name: str, place: Place, job: dict[str, str], kill_after: int | None = None
) -> list[dict[str, Any]]:
    """Trains as `RUNS` says, into a folder that begins with a run's name."""
    settings = RUNS[name.removesuffix("-alone")]

    def report(row: dict[str, Any]) -> None:
        if kill_after is not None and row["batch"] + 1 >= kill_after:
            raise Killed

    output = str(folder / name)
    student = "projected" if name.startswith("bfloat16") else "student"
    told = Job(
        config=CONFIG.model_copy(update=settings),
        output=output,
        num_batches=NUM_BATCHES,
        test_set=WatchedSet(data=TEST_SET) if "validation" in settings else None,
        examples=job["examples"],
        student=job[student],
    )
    with pytest.raises(Killed) if kill_after else nullcontext():
        run_training(told, place, report=report)
    return read_metrics(open_storage(output))


class Failing:
    """Embeds texts with gradients so many times, and then there is no memory for more."""

    def __init__(self, embed: Callable[..., torch.Tensor]) -> None:
        self.embed, self.left = embed, 40

    def __call__(self, *given: Any) -> torch.Tensor:
        self.left -= torch.is_grad_enabled()
        if not self.left:
            raise torch.OutOfMemoryError("simulated")
        return self.embed(*given)


def work(rank: int, folder: Path, job: dict[str, str]) -> None:
    """What each of the two processes does."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    gradients._PASS_TOKENS = 100  # several passes, not as many of one worker as of the other
    place = Place(rank=rank, world=WORLD, local_world=WORLD, device="cpu")
    train(folder, "cut", place, job, kill_after=6)
    if rank == 0:
        shutil.copytree(folder / "cut", folder / "cut-alone")
    dist.barrier()  # the checkpoint is written
    for name in RUNS:
        if name != "memory":
            train(folder, name, place, job)
    with pytest.MonkeyPatch.context() as patch:
        # Runs out of memory in the fifth batch; on both, so that none of them waits in vain.
        patch.setattr(gradients, "embed", Failing(gradients.embed))
        with pytest.raises(TokayError, match="goes on from the last checkpoint with gradient_cac"):
            train(folder, "memory", place, job)
    dist.barrier()
    train(folder, "memory", place, job)
    encoder = Encoder.load(job["projected"], device="cpu")
    total = encoder.num_parameters
    shard(encoder.model, bfloat16=False)
    own = sum(weight.to_local().numel() for weight in encoder.model.parameters())
    (folder / f"share-{rank}").write_text(str(own / total))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def job(examples: str, student: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    encoder = Encoder.load(student, device="cpu")
    add_projection(encoder, 16)
    projected = str(tmp_path_factory.mktemp("projected"))
    encoder.save(projected, model_card="")
    return {"examples": examples, "student": student, "projected": projected}


@pytest.fixture(scope="module")
def folder(job: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two workers with shares have trained."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.spawn(work, (folder, job), nprocs=WORLD)
    return folder


def weights(output: Path) -> list[torch.Tensor]:
    return list(Encoder.load(str(output / "encoder"), device="cpu").model.parameters())


def rows(output: Path) -> list[dict[str, Any]]:
    return read_metrics(open_storage(output))


def compare(folder: Path, name: str, job: dict[str, str], tolerance: float) -> None:
    alone = train(folder, f"{name}-alone", Place(device="cpu"), job)
    found = rows(folder / name)
    assert len(found) == NUM_BATCHES
    for key in ("loss", "gradient_norm", "validation_loss"):
        expected = {row["batch"]: row[key] for row in alone if key in row}
        assert len(expected) == (3 if "validation" in RUNS[name] else 0) or "validation" not in key
        assert {row["batch"]: row[key] for row in found if key in row} == pytest.approx(
            expected, rel=tolerance
        )


@pytest.mark.parametrize(
    "name", ["plain", pytest.param("adapters", marks=pytest.mark.chaos), "cut", "trainings"]
)
def test_two_workers_with_shares_train_as_one_does(name: str, folder: Path, job: dict[str, str]):
    """Also where the one goes on from the two workers' checkpoint."""
    compare(folder, name, job, 1e-3)
    ndcg = [
        [row.get("validation_ndcg_at_10") for row in rows(folder / each)]
        for each in (name, f"{name}-alone")
    ]
    assert ndcg[0] == ndcg[1]
    for one, other in zip(weights(folder / f"{name}-alone"), weights(folder / name), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-3)


def test_workers_with_shares_begin_again_with_less_where_memory_ran_out(
    folder: Path, job: dict[str, str]
):
    tokens = [row.get("gradient_cache_tokens") for row in rows(folder / "memory")]
    began = tokens.count(None)
    assert began % CONFIG.checkpoint_every_batches == 0 and 0 < began < NUM_BATCHES
    assert tokens[began:] == tokens[-1:] * (NUM_BATCHES - began)
    compare(folder, "memory", job, 1e-3)


def test_weights_gathered_as_bfloat16_train_a_projection_too(folder: Path, job: dict[str, str]):
    compare(folder, "bfloat16", job, 0.1)


def test_killed_workers_with_shares_go_on_to_the_last_bit(folder: Path):
    whole, cut = folder / "plain", folder / "cut"
    assert [row["loss"] for row in rows(cut)] == [row["loss"] for row in rows(whole)]
    for one, other in zip(weights(whole), weights(cut), strict=True):
        assert torch.equal(one, other)


def test_worker_holds_its_share_alone(folder: Path):
    shares = [float((folder / f"share-{rank}").read_text()) for rank in range(WORLD)]
    assert sum(shares) == pytest.approx(1)
    assert max(shares) < 0.51
