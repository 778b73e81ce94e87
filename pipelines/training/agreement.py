"""How several workers end a step together when one of them has run out of memory.

All workers agree before each collective operation of a step. One that has run out agrees at once,
in place of the operation that the others come to next, so that none waits for it in vain.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from cluster.errors import TokayError


class OutOfMemory(TokayError):
    """A worker's memory was too small for a step; raised on all of them."""

    def __init__(self) -> None:
        super().__init__("a training step needs more memory than there is")


def agree(device: torch.device, *, ran_out: bool = False) -> None:
    """Waits until all workers are here, and lets them go on together, unless one `ran_out`.

    Raises:
        OutOfMemory: A worker has run out of memory.
    """
    if highest(int(ran_out), device):
        raise OutOfMemory


def highest(count: int, device: torch.device) -> int:
    """Returns the highest count of all workers; all of them call this."""
    return _reduced(count, device, dist.ReduceOp.MAX)


def lowest(count: int, device: torch.device) -> int:
    """Returns the lowest count of all workers; all of them call this."""
    return _reduced(count, device, dist.ReduceOp.MIN)


def _reduced(count: int, device: torch.device, operation: dist.ReduceOp.RedOpType) -> int:
    reduced = torch.tensor(count, device=device)
    dist.all_reduce(reduced, operation)
    return int(reduced)
