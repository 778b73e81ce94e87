"""Dropout on the CPU with a quarter of the random numbers.

PyTorch draws a random number for each value, one after the other, which took a fifth of a training
step. Here one draw of 64 bits decides four values.
"""

from __future__ import annotations

import torch

_STEPS = 2**16  # a share is rounded to so many


def use_fast_dropout(model: torch.nn.Module) -> None:
    """Lets a model's dropout layers draw less while they are on a CPU; they drop as much."""
    for module in model.modules():
        if type(module) is torch.nn.Dropout:
            module.__class__ = CpuDropout


class CpuDropout(torch.nn.Dropout):
    """A dropout layer whose masks come from :func:`drop`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns the input, in training with a share of zeros."""
        if not self.training or self.inplace or input.device.type != "cpu":
            return super().forward(input)
        return drop(input, self.p)


def drop(values: torch.Tensor, share: float) -> torch.Tensor:
    """Sets a random share of a CPU's values to zero and scales the others to keep the mean."""
    dropped = round(share * _STEPS)
    if not 0 < dropped < _STEPS:
        return torch.nn.functional.dropout(values, share)
    # From torch's own generator, so that a seed gives the same masks again.
    draws = torch.empty((values.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: values.numel()].view(values.shape)
    kept = (bits >= dropped - _STEPS // 2).to(values.dtype)
    return values * kept.mul_(_STEPS / (_STEPS - dropped))
