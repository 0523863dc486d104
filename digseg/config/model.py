"""The section ``model`` of a run: what the segmenter is built of."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from digseg.config.section import Location, NonNegative, Positive, Section


class AutoencoderConfig(Section):
    """Image <-> latent. ``shuffle`` is pixel (un)shuffle; ``kl`` a diffusers AutoencoderKL directory."""

    type: Literal["shuffle", "kl"] = "shuffle"
    factor: Annotated[int, Field(ge=1)] = 4  # of ``shuffle``; ``kl`` brings its own
    path: Location | None = None

    @model_validator(mode="after")
    def _path_belongs_to_kl(self) -> Self:
        if (self.type == "kl") != (self.path is not None):
            raise ValueError(
                "type kl needs path (a diffusers AutoencoderKL directory)"
                if self.type == "kl"
                else f"path is {self.path!r}, but type shuffle has no weights: drop path or set type: kl"
            )
        return self


class TextConfig(Section):
    """Frozen text encoder. ``minilm`` comes with the installation; ``clip`` is a local directory."""

    type: Literal["minilm", "clip"] = "minilm"
    path: Location | None = None

    @model_validator(mode="after")
    def _clip_has_a_path(self) -> Self:
        if self.type == "clip" and self.path is None:
            raise ValueError("type clip needs path (a directory with a CLIP text encoder and tokenizer)")
        return self


class UNetConfig(Section):
    """diffusers UNet2DConditionModel; one entry of ``block_out_channels`` and ``attention`` per level."""

    block_out_channels: Annotated[list[Positive], Field(min_length=2)] = [32, 64, 96, 128]
    attention: list[bool] = [False, False, False, True]
    layers_per_block: Positive = 1
    cross_attention_dim: Positive = 128
    num_heads: Positive = 4
    norm_num_groups: Positive = 32
    attention_kernel: Literal["auto", "xformers", "sdpa", "math"] = "auto"

    @model_validator(mode="after")
    def _levels_match(self) -> Self:
        if len(self.attention) != len(self.block_out_channels):
            raise ValueError(
                f"attention has {len(self.attention)} entries, block_out_channels "
                f"{len(self.block_out_channels)}: give one per level"
            )
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups or channels % self.num_heads:
                raise ValueError(
                    f"block_out_channels: {channels} must be divisible by norm_num_groups "
                    f"({self.norm_num_groups}) and num_heads ({self.num_heads})"
                )
        return self


class PathwayConfig(Section):
    """The text pathway aligned with the decoder's features."""

    dim: Positive = 64  # of the text-aligned space at the feedback scale
    head_dim: Positive = 13  # of the full-resolution head, before the image's 3 channels join
    query_layers: NonNegative = 1  # transformer layers over the set of class names
    query_scale: float = 1.4  # initial log of the similarity's scale
    gate: float = 0.5  # initial feedback gate; 0 for a pretrained U-Net


class ModelConfig(Section):
    """The segmenter's parts."""

    autoencoder: AutoencoderConfig = AutoencoderConfig()
    text: TextConfig = TextConfig()
    unet: UNetConfig = UNetConfig()
    pathway: PathwayConfig = PathwayConfig()
