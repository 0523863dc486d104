"""Who this process is among the processes of a run. Everything else asks this one object."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class World:
    """The place of one worker process. ``local_*`` count the workers of the same machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for the run: logs, publishes checkpoints, exports."""
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> World:
        """The world that torchrun (or Ray Train) set in ``RANK``, ``WORLD_SIZE``, ...; else one process."""
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size))),
            device=default_device(local_rank),
        )


def default_device(local_rank: int) -> torch.device:
    """This worker's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())
