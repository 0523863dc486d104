"""How fast a run is, and how much of its device that uses."""

from __future__ import annotations

import json
import resource
import time
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from digseg.config import Config
from digseg.model.training_module import resolve_precision
from digseg.training.flops import ImageFlops, image_flops
from digseg.training.gpus import known_gpu

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PRODUCTS = 6  # of matrices, of which the fastest counts
_SIDES = {"cpu": 512, "cuda": 8192}  # of these matrices

_counted: dict[str, ImageFlops] = {}  # by what decides it: a process may train several runs


class Throughput:
    """Turns images/s into operations and their share of what the device can do.

    Args:
        num_classes: slots of a query.
    """

    def __init__(self, config: Config, text_dim: int, num_classes: int, device: torch.device, world_size: int) -> None:
        self._device, self._world_size = device, world_size
        self.image_flops = _flops(config, text_dim, num_classes)
        self.peak_flops, self.peak_source = device_peak(resolve_precision(config.training.precision, device), device)

    def figures(self, images_per_second: float) -> dict[str, float]:
        """``tflops`` of all processes (10^12 a second), ``mfu`` (their share of the peak of all devices: model FLOPs
        utilisation, Chowdhery et al. 2022, appendix B), and ``memory_gb``, this process' largest so far."""
        flops = images_per_second * self.image_flops.training
        return {
            "tflops": flops / 1e12,
            "mfu": flops / (self._world_size * self.peak_flops),
            "memory_gb": _peak_memory_bytes(self._device) / 1e9,
        }


class StepClock:
    """Seconds of each step without waiting for any: on a GPU, the device notes the times itself."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._stretches: list[list[Any]] = []
        self.start()

    def start(self) -> None:
        """A step begins now, after something else; the steps so far stay."""
        self._stretches.append([self._mark()])

    def step(self) -> None:
        """A step ends now, and the next one begins."""
        self._stretches[-1].append(self._mark())

    def percentiles(self) -> dict[str, float]:
        """``step_time_p50_s`` and ``step_time_p95_s``, 0 where there was no step; forgets the steps. Waits for the
        device."""
        seconds = [self._between(first, second) for stretch in self._stretches for first, second in pairwise(stretch)]
        self._stretches = []
        self.start()
        p50, p95 = np.percentile(seconds, [50, 95]) if seconds else (0.0, 0.0)
        return {"step_time_p50_s": float(p50), "step_time_p95_s": float(p95)}

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _between(self, first: Any, second: Any) -> float:
        if not self._on_gpu:
            return float(second - first)
        second.synchronize()
        return float(first.elapsed_time(second)) / 1e3


def device_peak(precision: str, device: torch.device) -> tuple[float, str]:
    """Operations a second that a device can do, and where the figure is from: ``data sheet`` for 16 bits on a GPU of
    :data:`digseg.training.gpus.GPUS`, else ``measured``, see :func:`measured_peak`."""
    gpu = known_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is None or precision == "fp32":
        return measured_peak(precision, device), "measured"
    return gpu.bf16_flops, "data sheet"


def measured_peak(precision: str, device: torch.device) -> float:
    """Operations a second of the fastest of a few matrix products, with as many threads as this process trains with."""
    side = _SIDES.get(device.type, _SIDES["cpu"])
    matrix = torch.ones(side, side, dtype=_DTYPES[precision], device=device)
    clock = StepClock(device)
    seconds = []
    for _ in range(_PRODUCTS):
        clock.start()
        torch.mm(matrix, matrix)
        clock.step()
        seconds.append(clock.percentiles()["step_time_p50_s"])
    return float(2 * side**3 / min(seconds))


def _flops(config: Config, text_dim: int, num_classes: int) -> ImageFlops:
    decides = config.model_dump(mode="json", include={"model", "objective"})
    decides |= {"data": [config.data.crop_size, config.data.latents is None], "query": [text_dim, num_classes]}
    key = json.dumps(decides, sort_keys=True)
    if key not in _counted:
        _counted[key] = image_flops(config, text_dim, num_classes)
    return _counted[key]


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # which Linux counts in KiB
