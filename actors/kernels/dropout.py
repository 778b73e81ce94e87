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
    if not 0 < round(share * _STEPS) < _STEPS:
        return torch.nn.functional.dropout(values, share)
    return values * scaled(draw_kept(values.shape, share), share, values.dtype)


def draw_kept(shape: torch.Size, share: float) -> torch.Tensor:
    """Draws which values are kept: bool of this shape, false for the share."""
    count = shape.numel()
    # From torch's own generator, so that a seed gives the same masks again.
    draws = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return (draws.view(torch.int16)[:count] >= round(share * _STEPS) - _STEPS // 2).view(shape)


def scaled(kept: torch.Tensor, share: float, dtype: torch.dtype) -> torch.Tensor:
    """Returns what the values are multiplied with: 0, or what keeps their mean."""
    return kept.to(dtype).mul_(_STEPS / (_STEPS - round(share * _STEPS)))
