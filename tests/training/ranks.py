"""Several ranks of one machine as processes, joined by gloo through a file."""

from __future__ import annotations

import multiprocessing
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from digseg.training.world import World


def run_ranks(function: Callable[..., None], world_size: int, folder: Path, *arguments: Any) -> None:
    """Run ``function(world, *arguments)`` in ``world_size`` processes; raises if one of them does."""
    # The server imports what is slow once, and every rank is forked from it.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["digseg.training.trainer"])
    store = folder / f"store-{uuid.uuid4().hex}"
    mp.start_processes(
        _rank, (world_size, str(store), function, arguments), nprocs=world_size, start_method="forkserver"
    )


def _rank(rank: int, world_size: int, store: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    function(World(rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size), *arguments)
    dist.destroy_process_group()
