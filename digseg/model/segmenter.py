"""The segmenter: a diffusion U-Net whose decoder is aligned with class names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from digseg.config import Config, ModelConfig
from digseg.model.autoencoder import Autoencoder, build_autoencoder
from digseg.model.denoiser import build_unet
from digseg.model.pathway import Feedback, QueryEncoder, RefinedHead
from digseg.model.text import TextEncoder, load_text_encoder

FINAL_TIMESTEP = 999  # of the 1000 steps that Stable Diffusion's schedules have: pure noise


@dataclass(frozen=True)  # no slots: ZeRO-3 looks for tensors in vars(output)
class SegmenterOutput:
    """What one pass gives for K classes."""

    logits: Tensor  # float32 [B, K, H, W]: the prediction
    feedback_logits: Tensor  # float32 [B, K, H/f, W/f] (f = the autoencoder's factor)
    mask_latents: Tensor  # [B, C, H/f, W/f]: estimate of the painted mask's latents


@dataclass(slots=True)
class _Pass:
    """What the hooks on the U-Net's decoder need and leave behind during one forward pass."""

    tokens: Tensor
    queries: Tensor
    mask: Tensor
    feedback_logits: list[Tensor] = field(default_factory=list)
    features: Tensor | None = None


class Segmenter(nn.Module):
    """Trainable part: U-Net, query encoder, feedback, head. The autoencoder is frozen and not a submodule."""

    def __init__(self, config: ModelConfig, text_dim: int, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        unet = build_unet(config.unet, autoencoder.channels)
        token_dim = config.unet.cross_attention_dim
        groups = config.unet.norm_num_groups
        channels = config.unet.block_out_channels
        self.unet = unet
        self.queries = QueryEncoder(text_dim, token_dim, config.pathway)
        self.feedback = Feedback(channels[1], token_dim, groups, config.pathway)
        self.head = RefinedHead(channels[0], token_dim, autoencoder.factor, groups, config.pathway)
        self._pass: _Pass | None = None
        # diffusers' forward has no seam inside the decoder; hooks keep it (and its checkpoints) untouched.
        unet.up_blocks[-2].register_forward_hook(self._feed_back)
        unet.up_blocks[-1].register_forward_hook(self._keep_features)

    @property
    def size_multiple(self) -> int:
        """Image sides must be multiples of this."""
        return int(self.autoencoder.factor * 2 ** (len(self.unet.config.block_out_channels) - 1))

    def forward(
        self, images: Tensor, text: Tensor, mask: Tensor, colours: Tensor, latents: Tensor | None = None
    ) -> SegmenterOutput:
        """Segment in one deterministic step (final timestep, mask half of the input zero).

        Args:
            images: ``[B, 3, H, W]`` in [-1, 1], H and W multiples of :attr:`size_multiple`.
            text: standardised class-name embeddings ``[B, K, D]``.
            mask: bool ``[B, K]``, True where a slot holds a class.
            colours: ``[B, K, 3]`` in [-1, 1].
            latents: ``[B, C, H/f, W/f]`` of the images where they are stored; None: the images are encoded.
        """
        image_latents = self.autoencoder.encode(images) if latents is None else latents.to(images.dtype)
        tokens, queries = self.queries(text, mask, colours)
        with self._decoding(_Pass(tokens, queries, mask)) as state:
            residual: Tensor = self.unet(
                torch.cat([image_latents, torch.zeros_like(image_latents)], dim=1),
                torch.full((len(images),), FINAL_TIMESTEP, device=images.device),
                encoder_hidden_states=tokens,
                encoder_attention_mask=mask,
                return_dict=False,
            )[0]
        assert state.features is not None
        logits = self.head(state.features, images, queries, mask)
        posterior = self.autoencoder.compose(logits.softmax(1), colours)
        return SegmenterOutput(logits, state.feedback_logits[0], posterior + residual.float())

    @contextmanager
    def _decoding(self, state: _Pass) -> Iterator[_Pass]:
        self._pass = state
        try:
            yield state
        finally:
            self._pass = None

    def _feed_back(self, _module: nn.Module, _inputs: Any, h: Tensor) -> Tensor:
        assert self._pass is not None
        h, logits = self.feedback(h, self._pass.tokens, self._pass.queries, self._pass.mask)
        self._pass.feedback_logits.append(logits)
        return h

    def _keep_features(self, _module: nn.Module, _inputs: Any, h: Tensor) -> None:
        assert self._pass is not None
        self._pass.features = h


def build_segmenter(config: Config, text_encoder: TextEncoder | None = None) -> Segmenter:
    """A new segmenter with weights drawn from ``config.run.seed``; the global torch RNG is left as it was."""
    encoder = text_encoder or load_text_encoder(config.model.text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        return Segmenter(config.model, encoder.dim, build_autoencoder(config.model.autoencoder))
