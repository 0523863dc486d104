"""The kernel of the U-Net's attention: chosen, installed as processors, and verified."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor

from digseg.errors import DigSegError

_KEY = "model.attention"
_ALIGNMENT = 8  # entries of a mask's row: xformers reads 16 bytes at a time


class AlignedXFormersProcessor(XFormersAttnProcessor):  # type: ignore[misc]
    """xformers' kernels for any number of class tokens; see :func:`aligned_keys`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *rest: Any,
        **further: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None and attention_mask is not None:
            kind, dtype = hidden_states.device.type, hidden_states.dtype
            computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
            encoder_hidden_states, attention_mask = aligned_keys(encoder_hidden_states, attention_mask, computed)
        attended: Tensor = super().__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask, *rest, **further
        )
        return attended


_PROCESSORS: dict[str, type] = {"sdpa": AttnProcessor2_0, "math": AttnProcessor, "xformers": AlignedXFormersProcessor}


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


def aligned_keys(tokens: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tokens ``[B, K, D]`` and what is added to their scores, ``[B, 1, K]``, as xformers' kernels take them: K padded
    to a multiple of 8, the bias of the queries' ``dtype``. What is padded gets no attention."""
    spare = -tokens.shape[1] % _ALIGNMENT
    nothing = torch.finfo(dtype).min / 2  # not infinite, which a kernel may multiply by 0
    return F.pad(tokens, (0, 0, 0, spare)), F.pad(bias.to(dtype), (0, spare), value=nothing)


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
            f"{_KEY}: xformers has no kernel for {device.type}; set {_KEY} to auto, sdpa or math on this machine (with "
            "CUDA, `pip install 'digseg[gpu]'` installs it)"
        )
    if importlib.util.find_spec("xformers") is None:
        raise DigSegError(f"{_KEY}: xformers is not installed; run `pip install 'digseg[gpu]'`, or set auto or sdpa")
