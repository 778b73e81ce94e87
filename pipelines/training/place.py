"""Where a worker stands among those that train together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Place:
    """A worker's place among the others, who have joined one ``torch.distributed`` group.

    Attributes:
        rank: From 0.
        world: Number of workers.
        local_world: Number of workers on this machine.
        device: As torch names it; None: the GPU if there is one.
    """

    rank: int = 0
    world: int = 1
    local_world: int = 1
    device: str | None = None


ALONE = Place()
