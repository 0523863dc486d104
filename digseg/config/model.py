"""The section ``model`` of a run: what the segmenter is built of."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from digseg.config.section import NonNegative, Positive, Section, Weights


class AutoencoderConfig(Section):
    """Image <-> latent. ``shuffle`` is pixel (un)shuffle; ``kl`` Stable Diffusion's AutoencoderKL."""

    type: Literal["shuffle", "kl"] = "shuffle"
    factor: Annotated[int, Field(ge=1)] = 4  # of ``shuffle``; ``kl`` brings its own
    path: Weights | None = None  # of ``kl``: a diffusers directory, its vae folder, or a hub id
    slicing: bool = False  # of ``kl``: encode and decode the images of a batch one by one, to save memory
    # Of ``kl``: encode and decode images above the size that it was trained on in overlapping tiles. Its norms then
    # see a tile instead of the image, which changes such latents.
    tiling: bool = False

    @model_validator(mode="after")
    def _path_belongs_to_kl(self) -> Self:
        if self.type != "kl" and (self.slicing or self.tiling):
            raise ValueError("slicing and tiling are for type kl; shuffle has nothing to save: drop them")
        if (self.type == "kl") != (self.path is not None):
            raise ValueError(
                "type kl needs path (a diffusers AutoencoderKL directory)"
                if self.type == "kl"
                else f"path is {self.path!r}, but type shuffle has no weights: drop path or set type: kl"
            )
        return self


class TextConfig(Section):
    """Frozen text encoder. ``minilm`` comes with the installation; ``clip`` is Stable Diffusion's, or any CLIP."""

    type: Literal["minilm", "clip"] = "minilm"
    path: Weights | None = None  # of ``clip``: a diffusers directory, one of encoder and tokenizer, or a hub id

    @model_validator(mode="after")
    def _clip_has_a_path(self) -> Self:
        if self.type == "clip" and self.path is None:
            raise ValueError("type clip needs path (a directory with a CLIP text encoder and tokenizer)")
        return self


class UNetConfig(Section):
    """A U-Net from scratch, of diffusers; one entry of ``block_out_channels`` and ``attention`` per level."""

    block_out_channels: Annotated[list[Positive], Field(min_length=2)] = [32, 64, 96, 128]
    attention: list[bool] = [False, False, False, True]
    layers_per_block: Positive = 1
    cross_attention_dim: Positive = 128
    num_heads: Positive = 4
    norm_num_groups: Positive = 32

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

    enabled: bool = True  # without it, the U-Net paints the mask alone and its colours are the prediction
    scales: Positive = 1  # decoder scales that are aligned, from the finest up; Stable Diffusion's U-Nets have 3
    feedback: bool = True  # whether the attended class tokens are added back to the features
    dim: Positive = 64  # of the text-aligned space at a decoder scale
    head_dim: Positive = 13  # of the full-resolution head, before the image's 3 channels join
    query_layers: NonNegative = 1  # transformer layers over the set of class names
    query_scale: float = 1.4  # initial log of the similarity's scale
    gate: float | None = None  # initial gate of the feedback; None: 0.5, and 0 for a pretrained U-Net


class LoraConfig(Section):
    """Low-rank adapters, trained in place of the pretrained U-Net's own weights."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] | None = None  # an adapter's product counts alpha / rank times; None: once
    # Layers that have one: every linear layer or convolution of the U-Net that is called so.
    targets: Annotated[list[str], Field(min_length=1)] = ["to_q", "to_k", "to_v", "to_out.0"]

    @property
    def scale(self) -> float:
        """What an adapter's product is multiplied with."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class ModelConfig(Section):
    """The segmenter's parts."""

    # Stable Diffusion 1.5, 2.0 or 2.1 to start from: a diffusers directory, or an id on the Hugging Face hub. The
    # autoencoder and the text encoder are its own, unless their sections say otherwise.
    pretrained: Weights | None = None
    pickled_weights: bool = False  # take weights that only come pickled (*.bin); else safetensors alone
    attention: Literal["auto", "xformers", "sdpa", "math"] = "auto"  # kernel of the U-Net's attention in training
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    text: TextConfig = TextConfig()
    unet: UNetConfig = UNetConfig()
    lora: LoraConfig | None = None  # None: the pretrained U-Net's weights are trained themselves
    pathway: PathwayConfig = PathwayConfig()

    @model_validator(mode="before")
    @classmethod
    def _pretrained_brings_its_parts(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("pretrained") is None:
            return values
        return {
            **values,
            "autoencoder": _part_of(values["pretrained"], "kl", values.get("autoencoder")),
            "text": _part_of(values["pretrained"], "clip", values.get("text")),
        }

    @model_validator(mode="after")
    def _one_unet(self) -> Self:
        if self.pretrained is not None and self.unet != UNetConfig():
            raise ValueError(
                "unet describes a U-Net from scratch, but pretrained brings its own: drop unet or pretrained"
            )
        if self.lora is not None and self.pretrained is None:
            raise ValueError("lora keeps a pretrained U-Net's weights as they are: set pretrained, or drop lora")
        return self

    @property
    def initial_gate(self) -> float:
        """Where the pathway's feedback starts: closed on a pretrained U-Net, which has never seen it."""
        if self.pathway.gate is not None:
            return self.pathway.gate
        return 0.5 if self.pretrained is None else 0.0


def _part_of(pretrained: Any, kind: str, section: Any) -> Any:
    """The settings of a part, with that of the pretrained checkpoint where they name no other."""
    if section is None:
        section = {}
    if not isinstance(section, dict) or section.get("type", kind) != kind:
        return section
    return {**section, "type": kind, "path": section.get("path") or pretrained}
