"""A small AutoencoderKL with random weights, in the layout of a diffusers checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL


def write_kl_autoencoder(directory: Path, seed: int = 0, scaling_factor: float = 0.18215) -> Path:
    """Write one of factor 2 with 4 latent channels into ``directory/vae``; returns ``directory``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, scaling_factor=scaling_factor,
        )  # fmt: skip
    vae.save_pretrained(directory / "vae")
    return directory
