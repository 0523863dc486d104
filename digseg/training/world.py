"""Who this process is among the processes of a run. Everything else asks this one object."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class World:
    """The place of one worker process. ``local_*`` count the workers of the same machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None  # that collective calls go through; None: the one of all

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for the run: logs, publishes checkpoints, exports."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """The GPU's name, or ``cpu``."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

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

    def join(self) -> None:
        """Make the process group, where nobody made it yet: NCCL on GPUs, gloo on CPUs."""
        if dist.is_initialized():
            return
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world_size == 1:
            # No port to choose, so nothing that could be taken.
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend, rank=self.rank, world_size=self.world_size)

    def apart(self) -> World:
        """The same ranks talking through a group of their own, for another thread (collective).

        PyTorch's asynchronous checkpoints do so too: calls of two threads through one group would mix.
        """
        return replace(self, group=dist.new_group(backend="gloo")) if self.world_size > 1 else self

    def limit_waits(self, seconds: float) -> None:
        """Let collectives raise where another rank does not come within ``seconds``, in all groups made so far.

        (The groups that DeepSpeed makes for itself take PyTorch's default of 10 to 30 minutes otherwise.)
        """
        if self.world_size > 1:
            for group in list(dist.distributed_c10d._world.pg_map):
                dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier(self.group)

    def gather(self, value: _T) -> list[_T]:
        """The ``value`` of every rank, on every rank (small Python objects)."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, self.group)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the ranks; ``values`` is used up."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over the ranks; ``values`` is used up."""
        return self.sum(values).div_(self.world_size) if self.world_size > 1 else values


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective call failed because another rank was lost or did not come; gloo says so in words only."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def default_device(local_rank: int) -> torch.device:
    """This worker's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())
