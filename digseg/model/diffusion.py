"""Multi-step diffusion of the painted mask: schedule, noise, parametrisations, loss weights. Pure functions.

The forward process is ``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise`` with ``a_t`` the cumulative product of
``1 - beta`` (Ho et al. 2020, equation 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor

from digseg.config import DiffusionConfig
from digseg.errors import DigSegError


@dataclass(frozen=True)  # no slots: ZeRO-3 looks for tensors in vars(...)
class NoisyMask:
    """The mask half of the U-Net's input, and what is needed to read its output."""

    latents: Tensor  # x_t [B, C, h, w]
    timesteps: Tensor  # int64 [B]
    signal: Tensor  # a_t [B]
    prediction_type: str  # sample, v_prediction or epsilon


def noise_schedule(base: Any, settings: DiffusionConfig) -> Any:
    """The schedule that a mask is noised and sampled with: the betas of ``base``, the scheduler of a checkpoint.

    It samples at trailing timesteps, which begin with pure noise, and with ``zero_terminal_snr`` the last training
    timestep is pure noise too (Lin et al. 2023, arXiv 2305.08891, algorithm 1 and table 2). It is handed estimates of
    the clean mask, whatever the U-Net answers with.

    Raises:
        DigSegError: zero terminal SNR and a U-Net that answers with the noise.
    """
    if base.config.prediction_type == "epsilon" and settings.zero_terminal_snr:
        raise DigSegError(
            "objective.diffusion.zero_terminal_snr is true, but this U-Net predicts the noise (epsilon), which says "
            "nothing of the mask where the input is pure noise: set it to false, or start from a checkpoint that "
            "predicts v"
        )
    return DDIMScheduler.from_config(
        base.config,
        rescale_betas_zero_snr=settings.zero_terminal_snr,
        timestep_spacing="trailing",
        prediction_type="sample",
        clip_sample=False,
        thresholding=False,
    )


def add_noise(clean: Tensor, noise: Tensor, signal: Tensor) -> Tensor:
    """``x_t`` of ``clean [B, C, h, w]`` and ``noise``, with ``signal`` = a_t ``[B]``."""
    a = _per_sample(signal)
    return a.sqrt() * clean + (1 - a).sqrt() * noise


def compose(output: Tensor, noisy: NoisyMask, posterior: Tensor) -> Tensor:
    """The estimate of ``x_0`` from the U-Net's output and the colours of the aligned posterior P.

    The U-Net answers for the residual R = x_0 - P, which goes through the same process as x_0 once ``sqrt(a) P`` is
    taken from x_t. The usual algebra (Salimans & Ho 2022, arXiv 2202.00512, appendix D) on R then gives

    - sample: ``P + output``
    - v:      ``sqrt(a) x_t - sqrt(1 - a) output + (1 - a) P``
    - epsilon: ``(x_t - sqrt(1 - a) output) / sqrt(a)``, in which P cancels.
    """
    a = _per_sample(noisy.signal)
    if noisy.prediction_type == "sample":
        return posterior + output
    if noisy.prediction_type == "v_prediction":
        return a.sqrt() * noisy.latents - (1 - a).sqrt() * output + (1 - a) * posterior
    return (noisy.latents - (1 - a).sqrt() * output) / a.sqrt()


def loss_weights(signal: Tensor, prediction_type: str, min_snr_gamma: float | None) -> Tensor:
    """Weights ``[B]`` that make the squared error of x_0 that of the parametrisation's own target.

    With snr = a / (1 - a) these are 1 (sample), snr + 1 (v) and snr (epsilon); min-SNR weighting takes
    min(snr, gamma) instead whatever the parametrisation (Hang et al. 2023, arXiv 2303.09556, section 3.4).
    """
    snr = signal / (1 - signal)
    if min_snr_gamma is not None:
        return snr.clamp(max=min_snr_gamma)
    if prediction_type == "v_prediction":
        return snr + 1
    return snr if prediction_type == "epsilon" else torch.ones_like(snr)


def draw_noise(
    shape: torch.Size, positions: Tensor, num_timesteps: int, seed: int, strength: float
) -> tuple[Tensor, Tensor]:
    """Noise ``[B, C, h, w]`` and timesteps int64 ``[B]``; a sample's are a function of seed and position alone.

    Args:
        shape: of the noise.
        positions: int64 ``[B]``, global positions of the samples.
        num_timesteps: of the schedule; timesteps are uniform.
        strength: of :func:`multi_resolution_noise`, annealed: times t / T (Ke et al. 2024, Marigold, arXiv 2312.02145).
    """
    noises, timesteps = [], []
    for position in positions.tolist():
        generator = torch.Generator().manual_seed(_mixed(seed, position))
        timestep = int(torch.randint(num_timesteps, (1,), generator=generator))
        noises.append(multi_resolution_noise(shape[1:], strength * timestep / num_timesteps, generator))
        timesteps.append(timestep)
    return torch.stack(noises), torch.tensor(timesteps)


def multi_resolution_noise(shape: torch.Size, strength: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise ``[C, h, w]`` plus ``strength^i`` of noise at 1 / 2^i of the size, brought back to variance 1.

    Strength 0 is plain Gaussian noise.
    """
    noise = torch.randn(shape, generator=generator)
    if strength == 0:
        return noise
    channels, height, width = shape
    level = 0
    while min(height, width) > 1:
        level, height, width = level + 1, height // 2, width // 2
        coarse = torch.randn(1, channels, height, width, generator=generator)
        noise = noise + strength**level * F.interpolate(coarse, shape[1:], mode="bilinear", align_corners=False)[0]
    return noise / noise.std()


def _per_sample(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _mixed(seed: int, position: int) -> int:
    """One number of 63 bits that looks unlike those of neighbouring seeds and positions."""
    return int(np.random.SeedSequence((seed, position)).generate_state(1, np.uint64)[0] >> 1)
