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
    ranks = start_ranks(function, world_size, folder, *arguments)
    while not ranks.join():
        pass


def start_ranks(function: Callable[..., None], world_size: int, folder: Path, *arguments: Any) -> mp.ProcessContext:
    """Start what :func:`run_ranks` runs."""
    # The server imports what is slow once, and every rank is forked from it.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["digseg.training.trainer", "pytest"])
    store = folder / f"store-{uuid.uuid4().hex}"
    arguments = (world_size, str(store), function, arguments)
    ranks = mp.start_processes(_rank, arguments, nprocs=world_size, join=False, start_method="forkserver")
    assert ranks is not None
    return ranks


def _rank(rank: int, world_size: int, store: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    function(World(rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size), *arguments)
    dist.destroy_process_group()
