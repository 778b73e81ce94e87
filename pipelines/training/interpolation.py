"""Weights between those that a training started from and those that it ended with.

Fine-tuning forgets some of what its start could do; half-way back much of that is there again, and
much of what was learned too (WiSE-FT, arXiv 2109.01903; for embedding models LM-Cocktail, arXiv
2311.13534).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


def interpolate(
    start: Mapping[str, torch.Tensor], trained: Mapping[str, torch.Tensor], weight: float
) -> dict[str, torch.Tensor]:
    """Returns ``(1 - weight) * start + weight * trained``, tensor by tensor, in float32.

    Weight 0 gives the start and weight 1 the trained tensors, bit by bit. A projection is a tensor
    as any other; adapters (LoRA) have to be merged before.

    Raises:
        ValueError: The two are not of one model.
    """
    if other := start.keys() ^ trained.keys():
        raise ValueError(f"tensor {min(other)!r} is in one of the two models alone")
    mixed = {}
    for name, before in start.items():
        after = trained[name]
        if before.shape != after.shape:
            raise ValueError(f"tensor {name!r} is {[*before.shape]} and {[*after.shape]}")
        if before.is_floating_point():
            # At the ends nothing is mixed in: a training that diverged left no numbers.
            ends = {0.0: before.float(), 1.0: after.float()}
            mixed[name] = (
                ends[weight] if weight in ends else torch.lerp(ends[0.0], ends[1.0], weight)
            )
        elif torch.equal(before, after):
            mixed[name] = before
        else:
            raise ValueError(f"tensor {name!r} holds no fractions, and other numbers in the two")
    return mixed
