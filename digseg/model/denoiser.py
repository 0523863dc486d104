"""The denoising U-Net: diffusers' UNet2DConditionModel on [image latent, noisy mask latent]."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from torch import nn

from digseg.config import UNetConfig
from digseg.errors import DigSegError


def build_unet(config: UNetConfig, latent_channels: int) -> Any:
    """A U-Net from scratch with ``2 * latent_channels`` inputs and ``latent_channels`` outputs."""
    levels = len(config.block_out_channels)
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention]
    up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(config.attention)]
    unet = UNet2DConditionModel(
        in_channels=2 * latent_channels,
        out_channels=latent_channels,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        cross_attention_dim=config.cross_attention_dim,
        # diffusers' name for the number of heads of this model class
        attention_head_dim=(config.num_heads,) * levels,
        norm_num_groups=config.norm_num_groups,
    )
    set_attention_kernel(unet, config.attention_kernel, torch.device("cpu"))
    return unet


def grow_conv_in(unet: Any) -> None:
    """Double the input channels of a pretrained U-Net in place: weights repeated and halved, bias kept.

    The grown network on ``[x, m]`` starts as the base network on ``(x + m) / 2``.
    """
    old = unet.conv_in
    new = nn.Conv2d(2 * old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding)
    with torch.no_grad():
        new.weight.copy_(old.weight.repeat(1, 2, 1, 1) / 2)
        assert new.bias is not None
        new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=new.in_channels)


def set_attention_kernel(unet: Any, kernel: str, device: torch.device) -> str:
    """Install the attention processor of ``kernel`` and return the kernel really used.

    ``auto`` is PyTorch's fused attention on CUDA and the plain product elsewhere, which is faster on a CPU
    at this project's small sizes.

    Raises:
        DigSegError: xformers asked for without CUDA, or not installed.
    """
    if kernel == "auto":
        kernel = "sdpa" if device.type == "cuda" else "math"
    if kernel == "xformers":
        if device.type != "cuda":
            raise DigSegError("model.unet.attention_kernel: xformers has no CPU operator; use auto, sdpa or math here")
        unet.enable_xformers_memory_efficient_attention()
    else:
        unet.set_attn_processor(AttnProcessor2_0() if kernel == "sdpa" else AttnProcessor())
    used = attention_kernel(unet)
    assert used in (kernel, ""), f"{kernel} was asked for, {used} is installed"
    return kernel


def attention_kernel(unet: Any) -> str:
    """The kernel that the U-Net's attention really uses, by its processors; empty if it has none."""
    names = {AttnProcessor2_0: "sdpa", AttnProcessor: "math", XFormersAttnProcessor: "xformers"}
    return "+".join(sorted({names[type(processor)] for processor in unet.attn_processors.values()}))
