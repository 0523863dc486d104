"""The denoising U-Net: diffusers' UNet2DConditionModel on [image latent, noisy mask latent]."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn

from digseg.config import ModelConfig, UNetConfig
from digseg.errors import DigSegError
from digseg.model.pretrained import UNET, load_scheduler, load_unet, model_shapes

_KEY = "model.pretrained"
# What makes a U-Net ask for more than a latent, a timestep and tokens (SDXL, class-conditional models, ...).
_FURTHER_INPUTS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")


def build_unet(config: ModelConfig, latent_channels: int, shapes_only: bool = False) -> Any:
    """The U-Net with ``2 * latent_channels`` inputs and ``latent_channels`` outputs, pretrained or from scratch.

    Args:
        shapes_only: without weights, for use on the meta device.

    Raises:
        DigSegError: ``model.pretrained`` has none that fits (see :func:`digseg.model.pretrained.load_model`).
    """
    if config.pretrained is None:
        return _from_scratch(config.unet, latent_channels)
    if shapes_only:
        unet = model_shapes(UNet2DConditionModel, config.pretrained, UNET, _KEY)
    else:
        unet = load_unet(config.pretrained, _KEY, config.pickled_weights)
    _check_inputs(unet, config.pretrained, latent_channels)
    grow_conv_in(unet)
    return unet


def build_scheduler(config: ModelConfig) -> Any:
    """The noise schedule: that of the pretrained checkpoint, else one from scratch."""
    return scheduler_from_scratch() if config.pretrained is None else load_scheduler(config.pretrained, _KEY)


def scheduler_from_scratch() -> Any:
    """Stable Diffusion's noise schedule, on the clean sample."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="sample",
        clip_sample=False,
    )


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


def _from_scratch(config: UNetConfig, latent_channels: int) -> Any:
    levels = len(config.block_out_channels)
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention]
    up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(config.attention)]
    return UNet2DConditionModel(
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


def _check_inputs(unet: Any, source: str, latent_channels: int) -> None:
    further = [f"{name} {unet.config.get(name)!r}" for name in _FURTHER_INPUTS if unet.config.get(name) is not None]
    if further or not isinstance(unet.config.cross_attention_dim, int):
        raise DigSegError(
            f"{_KEY} {source!r}: this U-Net needs inputs that segmentation does not have "
            f"({', '.join(further) or 'several text encoders'}), as SDXL's does; use Stable Diffusion 1.5, 2.0 or 2.1"
        )
    if (unet.config.in_channels, unet.config.out_channels) != (latent_channels, latent_channels):
        raise DigSegError(
            f"{_KEY} {source!r}: the U-Net has {unet.config.in_channels} inputs and {unet.config.out_channels} "
            f"outputs, but the autoencoder's latents have {latent_channels} channels; use a text-to-image checkpoint "
            "(not one for inpainting or depth) with its own autoencoder"
        )
