"""The segmenter: a diffusion U-Net whose decoder is aligned with class names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from digseg.config import Config, ModelConfig
from digseg.errors import DigSegError
from digseg.model.autoencoder import Autoencoder, build_autoencoder
from digseg.model.denoiser import build_scheduler, build_unet
from digseg.model.diffusion import NoisyMask, compose
from digseg.model.lora import add_adapters
from digseg.model.palette import colour_logits
from digseg.model.pathway import Pathway
from digseg.model.text import TextEncoder, load_text_encoder


@dataclass(frozen=True)  # no slots: ZeRO-3 looks for tensors in vars(output)
class SegmenterOutput:
    """What one pass gives for K classes."""

    logits: Tensor  # float32 [B, K, H, W]: the prediction
    feedback_logits: tuple[Tensor, ...]  # of each aligned scale, the coarsest first: float32 [B, K, h, w]
    mask_latents: Tensor  # [B, C, H/f, W/f]: estimate of the painted mask's latents (f: the autoencoder's factor)


@dataclass(slots=True)
class _Pass:
    """What the hooks on the U-Net's decoder need and leave behind during one forward pass."""

    tokens: Tensor
    queries: Tensor
    mask: Tensor
    feedback_logits: list[Tensor] = field(default_factory=list)
    features: Tensor | None = None


class Segmenter(nn.Module):
    """The trained U-Net and pathway. The autoencoder is frozen and not a submodule, nor is the noise schedule."""

    def __init__(self, unet: Any, pathway: Pathway, autoencoder: Autoencoder, scheduler: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.scheduler = scheduler
        self.unet = unet
        self.pathway = pathway
        self.final_timestep = int(scheduler.config.num_train_timesteps) - 1  # pure noise
        self.memory_format = torch.contiguous_format  # of the U-Net's activations
        self._pass: _Pass | None = None
        if not pathway.config.enabled:
            return
        # diffusers' forward has no seam inside the decoder; hooks keep it (and its checkpoints) untouched.
        for scale, block in zip(pathway.scales, reversed(unet.up_blocks[:-1]), strict=False):
            block.register_forward_hook(partial(self._align, scale))
        unet.up_blocks[-1].register_forward_hook(self._keep_features)

    @property
    def size_multiple(self) -> int:
        """Image sides must be multiples of this."""
        return int(self.autoencoder.factor * 2 ** (len(self.unet.config.block_out_channels) - 1))

    def forward(
        self,
        images: Tensor,
        text: Tensor,
        mask: Tensor,
        colours: Tensor,
        latents: Tensor | None = None,
        noisy: NoisyMask | None = None,
    ) -> SegmenterOutput:
        """Segment in one deterministic step (final timestep, mask half of the input zero), or denoise a mask a step.

        Args:
            images: ``[B, 3, H, W]`` in [-1, 1], H and W multiples of :attr:`size_multiple`.
            text: standardised class-name embeddings ``[B, K, D]``.
            mask: bool ``[B, K]``, True where a slot holds a class.
            colours: ``[B, K, 3]`` in [-1, 1].
            latents: ``[B, C, H/f, W/f]`` of the images where they are stored; None: the images are encoded.
            noisy: the mask at some timesteps of the multi-step objective; None: the one-step objective.
        """
        image_latents = self.autoencoder.encode(images) if latents is None else latents.to(images.dtype)
        tokens = self.pathway.tokens(text, colours)
        if not self.pathway.config.enabled:
            answer = self._denoised(image_latents, tokens, mask, noisy).float()
            painted = answer if noisy is None else compose(answer, noisy, torch.zeros_like(answer))
            return SegmenterOutput(colour_logits(self.autoencoder.decode(painted), colours, mask), (), painted)
        queries = self.pathway.queries(text, mask)
        with self._decoding(_Pass(tokens, queries, mask)) as state:
            residual = self._denoised(image_latents, tokens, mask, noisy).float()
        assert state.features is not None
        logits = self.pathway.head(state.features, images, queries, mask)
        posterior = self.autoencoder.compose(logits.softmax(1), colours)
        painted = posterior + residual if noisy is None else compose(residual, noisy, posterior)
        return SegmenterOutput(logits, tuple(state.feedback_logits), painted)

    def _denoised(self, image_latents: Tensor, tokens: Tensor, mask: Tensor, noisy: NoisyMask | None) -> Tensor:
        if noisy is None:
            mask_latents = torch.zeros_like(image_latents)
            timesteps = torch.full((image_latents.shape[0],), self.final_timestep, device=image_latents.device)
        else:
            mask_latents, timesteps = noisy.latents.to(image_latents.dtype), noisy.timesteps
        denoised: Tensor = self.unet(
            torch.cat([image_latents, mask_latents], dim=1).contiguous(memory_format=self.memory_format),
            timesteps,
            encoder_hidden_states=tokens,
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        return denoised

    @contextmanager
    def _decoding(self, state: _Pass) -> Iterator[_Pass]:
        self._pass = state
        try:
            yield state
        finally:
            self._pass = None

    def _align(self, scale: nn.Module, _module: nn.Module, _inputs: Any, h: Tensor) -> Tensor:
        assert self._pass is not None
        h, logits = scale(h, self._pass.tokens, self._pass.queries, self._pass.mask)
        self._pass.feedback_logits.append(logits)
        return h

    def _keep_features(self, _module: nn.Module, _inputs: Any, h: Tensor) -> None:
        assert self._pass is not None
        self._pass.features = h


def build_segmenter(config: Config, text_encoder: TextEncoder | None = None) -> Segmenter:
    """A new segmenter: what is not pretrained is drawn from ``config.run.seed``; the global torch RNG stays as it was.

    Raises:
        DigSegError: a pretrained part is missing or does not fit.
    """
    encoder = text_encoder or load_text_encoder(config.model)
    autoencoder = build_autoencoder(config.model.autoencoder, config.model.pickled_weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        unet = build_unet(config.model, autoencoder.channels)
        pathway = _build_pathway(config.model, unet, encoder.dim, autoencoder.factor)
        if config.model.lora is not None:
            add_adapters(unet, config.model.lora)
    return Segmenter(unet, pathway, autoencoder, build_scheduler(config.model))


def segmenter_shapes(
    config: ModelConfig, text_dim: int, autoencoder: Autoencoder, scheduler: Any, adapters: bool = False
) -> Segmenter:
    """A segmenter on the meta device: all its shapes and none of its weights.

    Args:
        adapters: with those of ``model.lora``, as it is trained; else as it is exported.
    """
    with torch.device("meta"):
        unet = build_unet(config, autoencoder.channels, shapes_only=True)
        pathway = _build_pathway(config, unet, text_dim, autoencoder.factor)
        if adapters and config.lora is not None:
            add_adapters(unet, config.lora)
    return Segmenter(unet, pathway, autoencoder, scheduler)


def _build_pathway(config: ModelConfig, unet: Any, text_dim: int, factor: int) -> Pathway:
    settings, channels = config.pathway, list(unet.config.block_out_channels)
    if settings.enabled and settings.scales >= len(channels):
        raise DigSegError(
            f"model.pathway.scales is {settings.scales}, but the U-Net has {len(channels)} levels, of which one is the "
            f"head's; at most {len(channels) - 1}"
        )
    pathway: Pathway = Pathway(
        text_dim=text_dim,
        token_dim=int(unet.config.cross_attention_dim),
        # What the decoder's block i gives has the channels of the level beside it.
        channels=channels[: settings.scales + 1],
        factor=factor,
        groups=int(unet.config.norm_num_groups),
        enabled=settings.enabled,
        feedback=settings.feedback,
        dim=settings.dim,
        head_dim=settings.head_dim,
        query_layers=settings.query_layers,
        query_scale=settings.query_scale,
        gate=config.initial_gate,
    )
    return pathway
