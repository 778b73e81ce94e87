import copy

import pytest
import torch
from torch.nn import functional

from actors.kernels.linear import OneDnnLinear, use_onednn

ROWS = torch.randn(2, 7, 16, generator=torch.manual_seed(0))


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def layer(request: pytest.FixtureRequest) -> torch.nn.Linear:
    torch.manual_seed(0)
    found = torch.nn.Sequential(torch.nn.Linear(16, 24, bias=request.param))
    use_onednn(found)
    if not isinstance(found[0], OneDnnLinear):
        pytest.skip("oneDNN is asked for on x86 alone")
    return found[0]


def expected(layer: torch.nn.Linear, rows: torch.Tensor) -> torch.Tensor:
    return functional.linear(rows, layer.weight, layer.bias)


def test_product_and_its_gradients_equal_pytorchs(layer: torch.nn.Linear):
    target = torch.randn(2, 7, 24, generator=torch.manual_seed(1))
    found = []
    for compute in (layer, lambda rows: expected(layer, rows)):
        rows = ROWS.clone().requires_grad_()
        product = compute(rows)
        inputs = [rows, *layer.parameters()]
        found.append([product, *torch.autograd.grad((product * target).sum(), inputs)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changed_weights_are_arranged_again(layer: torch.nn.Linear, dtype: torch.dtype):
    layer.to(dtype)
    rows = ROWS.to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for _ in range(2):
        with torch.inference_mode():
            torch.testing.assert_close(
                layer(rows), expected(layer, rows), atol=tolerance, rtol=tolerance
            )
        with torch.no_grad():  # as an optimizer does
            layer.weight.mul_(-3)
    layer.load_state_dict({name: -w for name, w in layer.state_dict().items()})
    with torch.inference_mode():
        torch.testing.assert_close(
            layer(rows), expected(layer, rows), atol=9 * tolerance, rtol=tolerance
        )


def test_copy_has_weights_of_its_own(layer: torch.nn.Linear):
    with torch.no_grad():
        before = layer(ROWS)
        twin = copy.deepcopy(layer)
        twin.weight.zero_()
        assert twin(ROWS).abs().max() < layer(ROWS).abs().max()
        torch.testing.assert_close(layer(ROWS), before)


def test_autocast_decides_the_precision(layer: torch.nn.Linear):
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(ROWS).dtype == torch.bfloat16
        with torch.no_grad():
            assert layer(ROWS).dtype == torch.bfloat16


def test_no_rows_give_no_rows(layer: torch.nn.Linear):
    assert layer(torch.zeros(0, 16)).shape == (0, 24)
