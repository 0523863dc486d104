"""Kinds of GPUs by their data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU: dense tensor-core peaks and memory."""

    name: str
    bf16_flops: float  # per second; fp16 is the same
    tf32_flops: float
    memory_bytes: float
    said: tuple[str, ...]  # all of these are part of the name that the driver gives the device


GPUS = {
    "a10g": Gpu("NVIDIA A10G", 70e12, 35e12, 24e9, ("A10G",)),
    "a100-40": Gpu("NVIDIA A100 40 GB", 312e12, 156e12, 40e9, ("A100", "40GB")),
    "a100": Gpu("NVIDIA A100 80 GB", 312e12, 156e12, 80e9, ("A100", "80GB")),
    "l40s": Gpu("NVIDIA L40S", 362e12, 183e12, 48e9, ("L40S",)),
    "h100": Gpu("NVIDIA H100 SXM", 989e12, 494e12, 80e9, ("H100", "HBM3")),
    "h200": Gpu("NVIDIA H200", 989e12, 494e12, 141e9, ("H200",)),
    "b200": Gpu("NVIDIA B200", 2250e12, 1125e12, 180e9, ("B200",)),
}


def known_gpu(device_name: str) -> Gpu | None:
    """The kind of a device by the name that ``torch.cuda.get_device_name`` gives it; None: not in :data:`GPUS`."""
    words = device_name.replace("-", " ").split()
    for gpu in GPUS.values():
        if all(word in words for word in gpu.said):
            return gpu
    return None
