"""The kernel of the U-Net's attention: chosen, installed as processors, and verified."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor

from digseg.errors import DigSegError

_KEY = "model.attention"
_PROCESSORS: dict[str, type] = {"sdpa": AttnProcessor2_0, "math": AttnProcessor, "xformers": XFormersAttnProcessor}


@dataclass(frozen=True, slots=True)
class AttentionKernel:
    """The kernel that is in use, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def use_attention(unet: Any, asked: str, device: torch.device) -> AttentionKernel:
    """Install the attention processors of ``asked`` on every attention layer, for ``device``.

    ``UNet2DConditionModel.set_attention_backend`` would return normally and change nothing: these layers have
    processors of the older kind, which decide the kernel by their class.

    Raises:
        DigSegError: xformers is asked for without CUDA, or is not installed.
    """
    kernel = _chosen(asked, device)
    unet.set_attn_processor(_PROCESSORS[kernel.name]())
    used = attention_kernels(unet)
    if used not in ([kernel.name], []):
        raise RuntimeError(f"attention kernel {kernel.name} was installed, but {used} are in use")
    return kernel


def attention_kernels(unet: Any) -> list[str]:
    """The kernels that the U-Net's attention layers really use, by their processors; none where it has no layer."""
    names = {kind: name for name, kind in _PROCESSORS.items()}
    return sorted({names[type(processor)] for processor in unet.attn_processors.values()})


def _chosen(asked: str, device: torch.device) -> AttentionKernel:
    if asked == "xformers":
        _check_xformers(device)
    if asked != "auto":
        return AttentionKernel(asked, "asked for")
    if device.type == "cuda":
        # xformers dispatches most shapes to the same kernels since 0.0.34.
        return AttentionKernel("sdpa", "auto: PyTorch's fused kernels are the fastest on CUDA")
    return AttentionKernel("math", f"auto: the plain product is faster than PyTorch's fused one on {device.type}")


def _check_xformers(device: torch.device) -> None:
    if device.type != "cuda":
        raise DigSegError(
            f"{_KEY}: xformers has no kernel for {device.type}; set {_KEY} to auto, sdpa or math on this machine"
        )
    if importlib.util.find_spec("xformers") is None:
        raise DigSegError(f"{_KEY}: xformers is not installed; run `pip install 'digseg[gpu]'`, or set auto or sdpa")
