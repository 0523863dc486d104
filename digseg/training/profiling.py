"""Traces of single steps, on demand."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from digseg.training.world import World


class StepProfiler:
    """Writes what the operators of some steps cost, for ``chrome://tracing`` or Perfetto, one file a step and rank.

    Args:
        steps: of these (the first is 1).
    """

    def __init__(self, steps: Collection[int], directory: Path, world: World) -> None:
        self._steps, self._directory, self._world = frozenset(steps), directory, world

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Trace what runs inside, if this step is one to trace; that step waits for the device at its end."""
        if number not in self._steps:
            yield
            return
        activities = [ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities, record_shapes=True, profile_memory=True) as trace:
            yield
            if self._world.device.type == "cuda":
                torch.cuda.synchronize(self._world.device)
        self._directory.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(self._directory / f"step-{number:08d}-rank-{self._world.rank}.json"))
