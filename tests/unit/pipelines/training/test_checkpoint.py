import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cluster.errors import StorageError
from cluster.storage import LocalStorage, Storage, open_storage
from pipelines.training import checkpoint
from pipelines.training.checkpoint import (
    BEST,
    FOLDER,
    SOUP,
    CheckpointWriter,
    average_weights,
    load_checkpoint,
    restore_weights,
    save_weights,
)
from pipelines.training.config import TrainingConfig
from pipelines.training.gradients import uses_bfloat16
from pipelines.training.optimizer import learning_rate


def small() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    torch.manual_seed(number)
    optimizer.zero_grad()
    model(torch.randn(8, 4)).pow(3).sum().backward()
    optimizer.step()


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(tmp_path)
    return open_storage(request.getfixturevalue("bucket") + "/training")


def test_training_goes_on_from_a_checkpoint_as_if_never_stopped(storage: Storage):
    whole = small()
    for number in range(6):
        step(*whole, number)
    before = small()
    for number in range(3):
        step(*before, number)
        with CheckpointWriter(storage) as writer:
            writer.save(number + 1, *before)
    after = small()
    assert load_checkpoint(storage, *after) == 3
    for number in range(3, 6):
        step(*after, number)
    for expected, found in zip(whole[0].parameters(), after[0].parameters(), strict=True):
        assert torch.equal(expected, found)


def test_only_the_last_checkpoint_is_kept_and_half_a_one_is_not_seen(tmp_path: Path):
    storage, (model, optimizer) = LocalStorage(tmp_path), small()
    assert load_checkpoint(storage, model, optimizer) == 0
    for batches in (2, 4):
        with CheckpointWriter(storage) as writer:
            writer.save(batches, model, optimizer)
    assert len(storage.list(FOLDER)) == 1
    (tmp_path / FOLDER / ".000000009.safetensors.x.unfinished").write_bytes(b"half")
    assert load_checkpoint(storage, model, optimizer) == 4


class SlowStorage(LocalStorage):
    """Takes a while for an upload, and refuses those of some paths."""

    seconds, refused = 0.5, ""

    def upload(self, source: Path, path: str) -> None:
        time.sleep(self.seconds)
        if self.refused and self.refused in path:
            raise StorageError(f"cannot use {path}: simulated")
        super().upload(source, path)


def test_checkpoint_is_written_while_the_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def slow(*given: Any) -> None:
        time.sleep(SlowStorage.seconds)  # so that the next step comes before the first byte
        save_file(*given)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    storage, (model, optimizer) = SlowStorage(tmp_path), small()
    step(model, optimizer, 0)
    with CheckpointWriter(storage) as writer:
        writer.save(1, model, optimizer)
        writer.wait()
        before = [weights.detach().clone() for weights in model.parameters()]
        moments = [optimizer.state[w]["exp_avg"].clone() for w in model.parameters()]
        start = time.perf_counter()
        writer.save(2, model, optimizer)
        step(model, optimizer, 1)
        writer.check()
        assert time.perf_counter() - start < SlowStorage.seconds
        assert [Path(path).stem for path in storage.list(FOLDER)] == ["000000001"]
        start = time.perf_counter()
        writer.save(3, model, optimizer)  # after the one before
        assert time.perf_counter() - start > 0.5 * SlowStorage.seconds
        assert [Path(path).stem for path in storage.list(FOLDER)] == ["000000002"]
        other = small()
        assert load_checkpoint(storage, *other) == 2
        for weights, expected, moment in zip(other[0].parameters(), before, moments, strict=True):
            assert torch.equal(weights, expected)  # without the step that was taken meanwhile
            assert torch.equal(other[1].state[weights]["exp_avg"], moment)
    assert [Path(path).stem for path in storage.list(FOLDER)] == ["000000003"]


def test_checkpoint_that_cannot_be_written_ends_the_training(tmp_path: Path):
    storage, (model, optimizer) = SlowStorage(tmp_path), small()
    storage.refused = "000000002"
    with CheckpointWriter(storage) as writer:
        writer.save(1, model, optimizer)
        writer.save(2, model, optimizer)
        with pytest.raises(StorageError, match="simulated"):
            writer.save(3, model, optimizer)
        with pytest.raises(StorageError, match="simulated"):
            writer.check()
    assert load_checkpoint(storage, model, optimizer) == 1


def test_soup_is_the_mean_of_the_written_weights_and_the_models_own(tmp_path: Path):
    storage, (model, optimizer) = LocalStorage(tmp_path), small()
    written = []
    for number in range(3):
        step(model, optimizer, number)
        written.append([weights.detach().clone() for weights in model.parameters()])
        if number < 2:
            save_weights(storage, SOUP, number, model)
    average_weights(storage, model)
    for *parts, found in zip(*written, model.parameters(), strict=True):
        torch.testing.assert_close(found.detach(), torch.stack(parts).mean(0))


def test_restored_weights_are_those_that_were_written(tmp_path: Path):
    storage, (model, optimizer) = LocalStorage(tmp_path), small()
    before = [weights.detach().clone() for weights in model.parameters()]
    save_weights(storage, BEST, 7, model)
    step(model, optimizer, 0)
    restore_weights(storage, BEST, 7, model)
    for expected, found in zip(before, model.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_learning_rate_rises_then_falls_to_nothing():
    config = TrainingConfig(learning_rate=1.0, warmup_ratio=0.2)
    rates = [learning_rate(config, batch, 10) for batch in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.2
    config = TrainingConfig(learning_rate=1.0, warmup_ratio=0)
    assert learning_rate(config, 0, 1) == 1.0


def test_precision_auto_asks_the_hardware(monkeypatch: pytest.MonkeyPatch):
    cpu, auto = torch.device("cpu"), TrainingConfig(precision="auto")
    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able})
        assert uses_bfloat16(auto, cpu) is able
    assert uses_bfloat16(TrainingConfig(precision="bfloat16"), cpu)
    assert not uses_bfloat16(TrainingConfig(), cpu)
