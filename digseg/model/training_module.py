"""The segmenter with its loss: the one module that a training engine wraps."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from digseg.config import Config
from digseg.model.diffusion import NoisyMask, add_noise, draw_noise, loss_weights, noise_schedule
from digseg.model.objective import area_score_loss, class_score_loss, dice_loss, one_hot, reconstruction_loss
from digseg.model.palette import palette
from digseg.model.segmenter import Segmenter


class QueryBatch(Protocol):
    """What the loss reads of a batch (``digseg.data.loader.Batch`` is one)."""

    @property
    def images(self) -> Tensor:
        """float32 ``[B, 3, H, W]`` in [-1, 1]."""

    @property
    def latents(self) -> Tensor | None:
        """``[B, C, h, w]`` of the images where they are stored, else None."""

    @property
    def labels(self) -> Tensor:
        """int64 ``[B, H, W]``: slot in the row's query, 255 = ignore."""

    @property
    def query_ids(self) -> Tensor:
        """int64 ``[B, K]``: row of the text table, -1 = no class."""

    @property
    def colour_ids(self) -> Tensor:
        """int64 ``[B, K]``: row of the palette."""

    @property
    def class_weights(self) -> Tensor:
        """float32 ``[B, K]``."""

    @property
    def positions(self) -> Tensor:
        """int64 ``[B]``, in the global order; the noise of the multi-step objective follows from them."""


class SegmenterLoss(nn.Module):
    """``forward(batch)`` gives the loss and its parts as scalars.

    Weights stay float32; in bf16 and fp16 the segmenter runs under autocast and the losses are computed in
    float32.
    """

    text_table: Tensor
    palette: Tensor
    signal: Tensor  # of the multi-step objective: a_t of each timestep, see digseg.model.diffusion

    def __init__(self, segmenter: Segmenter, config: Config, text_table: Tensor) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.objective = config.objective
        self.seed = config.run.seed
        self.precision = config.training.precision
        self.register_buffer("text_table", text_table, persistent=False)
        self.register_buffer("palette", palette(config.data.queries.palette_size), persistent=False)
        if self.objective.type == "multi_step":
            schedule = noise_schedule(segmenter.scheduler, self.objective.diffusion)
            self.register_buffer("signal", schedule.alphas_cumprod.float(), persistent=False)

    def forward(self, batch: QueryBatch) -> dict[str, Tensor]:
        mask = batch.query_ids >= 0
        text = self.text_table[batch.query_ids.clamp(min=0)]
        colours = self.palette[batch.colour_ids]
        device = batch.images.device
        target = self.segmenter.autoencoder.compose(one_hot(batch.labels, mask.shape[1]), colours)
        noisy = self._noisy(target, batch.positions) if self.objective.type == "multi_step" else None
        with lowered_precision(self.precision, device):
            output = self.segmenter(batch.images, text, mask, colours, batch.latents, noisy)
        class_score = class_score_loss(output.logits, batch.labels, batch.class_weights)
        scales = [area_score_loss(one, batch.labels, batch.class_weights) for one in output.feedback_logits]
        parts = {
            "class_score": class_score,
            "feedback": torch.stack(scales).mean() if scales else class_score.new_zeros(()),
            "reconstruction": reconstruction_loss(output.mask_latents, target, batch.labels, self._weights(noisy)),
        }
        if self.objective.dice > 0:
            parts["dice"] = dice_loss(output.logits, batch.labels)
        weighted = [getattr(self.objective, name) * part for name, part in parts.items()]
        return {"loss": sum(weighted[1:], weighted[0]), **{name: part.detach() for name, part in parts.items()}}

    def _noisy(self, target: Tensor, positions: Tensor) -> NoisyMask:
        strength = self.objective.diffusion.multi_resolution_noise
        noise, timesteps = draw_noise(target.shape, positions, len(self.signal), self.seed, strength)
        timesteps = timesteps.to(target.device)
        signal = self.signal[timesteps]
        latents = add_noise(target, noise.to(target.device), signal)
        return NoisyMask(latents, timesteps, signal, self.segmenter.scheduler.config.prediction_type)

    def _weights(self, noisy: NoisyMask | None) -> Tensor | None:
        if noisy is None:
            return None
        return loss_weights(noisy.signal, noisy.prediction_type, self.objective.diffusion.min_snr_gamma)


def lowered_precision(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Autocast to what ``training.precision`` means on ``device``; nothing for fp32."""
    resolved = resolve_precision(precision, device)
    if resolved == "fp32":  # on every device, those without autocast too
        return nullcontext()
    return torch.autocast(device.type, torch.float16 if resolved == "fp16" else torch.bfloat16)


def resolve_precision(precision: str, device: torch.device) -> str:
    """``fp32``, ``bf16`` or ``fp16``: ``auto`` takes bf16 on CUDA and on CPUs with bf16 instructions.

    Without them (AVX2 and older) PyTorch's bf16 convolutions are tens of times slower than float32 ones.
    """
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() else "fp32"
