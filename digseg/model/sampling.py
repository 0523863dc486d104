"""Prediction with a model of the multi-step objective: DDIM from noise to the painted mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from digseg.config import DiffusionConfig
from digseg.model.diffusion import NoisyMask, noise_schedule
from digseg.model.segmenter import Segmenter


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the mask is sampled: deterministic given the seed (DDIM with eta 0, Song et al. 2021, arXiv 2010.02502)."""

    diffusion: DiffusionConfig
    steps: int  # 1 to 1000
    seed: int = 0
    ensemble: int = 1  # masks from so many draws of noise, whose probabilities are averaged


def sample_logits(
    segmenter: Segmenter, images: Tensor, text: Tensor, mask: Tensor, colours: Tensor, latents: Tensor, how: Sampling
) -> Tensor:
    """Logits ``[B, K, H, W]``, up to a constant; the arguments are those of :meth:`Segmenter.forward`.

    The aligned posterior of the last step is the prediction, as in one step; the mask's latents carry what the steps
    before it found. All images start from the same noise.
    """
    scheduler = noise_schedule(segmenter.scheduler, how.diffusion)
    scheduler.set_timesteps(how.steps)
    total: Tensor | None = None
    for member in range(how.ensemble):
        generator = torch.Generator().manual_seed(how.seed + member)
        noise = torch.randn(latents.shape[1:], generator=generator).to(latents.device).expand_as(latents)
        posterior = _denoised(segmenter, images, text, mask, colours, latents, noise, scheduler).softmax(1)
        total = posterior if total is None else total + posterior
    assert total is not None  # the ensemble has a member
    return (total / how.ensemble).clamp_min(torch.finfo(total.dtype).tiny).log()


def _denoised(
    segmenter: Segmenter,
    images: Tensor,
    text: Tensor,
    mask: Tensor,
    colours: Tensor,
    latents: Tensor,
    noisy: Tensor,
    scheduler: Any,
) -> Tensor:
    logits = noisy  # replaced in the first step
    for timestep in scheduler.timesteps:
        state = NoisyMask(
            latents=noisy,
            timesteps=torch.full((len(images),), int(timestep), device=images.device),
            signal=scheduler.alphas_cumprod[timestep].to(noisy).expand(len(images)),
            prediction_type=segmenter.scheduler.config.prediction_type,
        )
        output = segmenter(images, text, mask, colours, latents, state)
        logits = output.logits
        noisy = scheduler.step(output.mask_latents, timestep, noisy).prev_sample
    return logits
