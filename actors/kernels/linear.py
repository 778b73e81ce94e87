"""Matrix products of a model on the CPU by oneDNN.

PyTorch gives float32 products to MKL, which on an AMD processor leaves the AVX-512 units unused:
oneDNN, which PyTorch carries too and uses for bfloat16, was 2.2 times as fast there. A weight that
oneDNN has laid out for itself beforehand gives another tenth, at the price of a second copy of it
once a model embeds without gradients.
"""

from __future__ import annotations

import platform
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional

_Arranged = tuple[tuple[int, int], torch.Tensor]
# Beside the modules and not in them: these tensors can be neither pickled nor saved.
_arranged: WeakKeyDictionary[torch.nn.Module, _Arranged] = WeakKeyDictionary()
_ROWS = 2048  # of the products that a weight is laid out for


def native_bfloat16(device: torch.device) -> bool:
    """Says whether the device multiplies bfloat16 itself; others emulate it, slowly."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def use_onednn(model: torch.nn.Module) -> None:
    """Lets a model's linear layers compute by oneDNN while they are on an x86 CPU.

    The layers stay ``nn.Linear`` with the same weights, and give the same gradients.
    """
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not there or platform.machine() not in ("x86_64", "AMD64"):
        return
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = OneDnnLinear


class OneDnnLinear(torch.nn.Linear):
    """A linear layer that asks oneDNN where that is the faster way."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns ``input @ weight.T + bias``."""
        weight, bias = self.weight, self.bias
        if (
            input.device.type != "cpu"
            or input.dtype != weight.dtype
            or torch.is_autocast_enabled("cpu")
            or input.numel() == 0
        ):
            return functional.linear(input, weight, bias)
        if torch.is_grad_enabled():  # in bfloat16, PyTorch asks oneDNN itself
            if weight.dtype == torch.float32:
                return cast(torch.Tensor, _Product.apply(input, weight, bias))  # type: ignore[no-untyped-call]
            return functional.linear(input, weight, bias)
        if weight.dtype == torch.float32 or (
            weight.dtype == torch.bfloat16 and native_bfloat16(weight.device)
        ):
            return _product(input, self._arranged_weight(), bias)
        return functional.linear(input, weight, bias)

    def _arranged_weight(self) -> torch.Tensor:
        state = (self.weight.data_ptr(), self.weight._version)
        cached = _arranged.get(self)
        if cached is None or cached[0] != state:
            arranged = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), _ROWS)
            _arranged[self] = cached = (state, arranged)
        return cached[1]


def _product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


class _Product(torch.autograd.Function):
    """``rows @ weight.T + bias`` in float32, forwards and backwards by oneDNN."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        return _product(rows, weight, bias)

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        rows, weight = ctx.saved_tensors
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        flat = gradient.reshape(-1, gradient.shape[-1])
        inputs = rows.reshape(-1, rows.shape[-1])
        return (
            _product(flat, weight.t(), None).view_as(rows) if of_rows else None,
            _product(flat.t(), inputs.t(), None) if of_weight else None,
            flat.sum(0) if of_bias else None,
        )
