import pytest
import torch

from actors.kernels.dropout import CpuDropout, drop, use_fast_dropout


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_share_of_values_is_dropped_and_the_mean_kept(share: float, dtype: torch.dtype):
    torch.manual_seed(0)
    found = drop(torch.ones(1001, 999, dtype=dtype), share)
    assert found.dtype == dtype
    assert (found == 0).float().mean().item() == pytest.approx(share, abs=0.002)
    assert found.float().mean().item() == pytest.approx(1, abs=0.01)
    assert len(found.unique()) == 2


def test_neighbours_are_dropped_apart():
    torch.manual_seed(0)
    dropped = (drop(torch.ones(10**6), 0.5) == 0).float() - 0.5
    for distance in (1, 2, 3, 4, 8):
        assert abs((dropped[distance:] * dropped[:-distance]).mean().item()) < 0.001


def test_seed_gives_the_mask_again_and_the_gradient_wears_it():
    layer = torch.nn.Sequential(torch.nn.Dropout(0.3))
    use_fast_dropout(layer)
    assert isinstance(layer[0], CpuDropout)
    values = torch.randn(7, 5, requires_grad=True)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(layer(values))
    assert torch.equal(*found)
    (gradient,) = torch.autograd.grad(found[0].sum(), values)
    torch.testing.assert_close(gradient * values, found[0])
    layer.eval()
    assert torch.equal(layer(values), values)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_or_everything_is_dropped(share: float):
    assert torch.equal(drop(torch.ones(3, 3), share), torch.full((3, 3), 1 - share))
