"""Image and mask to latent space and back: one interface, two implementations."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from digseg.config import AutoencoderConfig
from digseg.errors import DigSegError


class Autoencoder(Protocol):
    """Frozen map between pixels ``[B, 3, H, W]`` in [-1, 1] and latents ``[B, channels, H/factor, W/factor]``."""

    factor: int
    channels: int

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def compose(self, weights: Tensor, colours: Tensor) -> Tensor:
        """Latents of a soft mask: ``weights [B, K, H, W]`` sum to 1 over K, ``colours [B, K, 3]`` in [-1, 1]."""


def build_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """The autoencoder that ``model.autoencoder`` describes."""
    if config.type == "shuffle":
        return ShuffleAutoencoder(config.factor)
    assert config.path is not None  # the schema requires it
    return KLAutoencoder.load(config.path)


class ShuffleAutoencoder:
    """Pixel (un)shuffle: lossless, weights-free; ``3 factor^2`` channels."""

    def __init__(self, factor: int) -> None:
        self.factor = factor
        self.channels = 3 * factor * factor

    def encode(self, images: Tensor) -> Tensor:
        return F.pixel_unshuffle(images, self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents, self.factor)

    def compose(self, weights: Tensor, colours: Tensor) -> Tensor:
        # Unshuffling is linear and per pixel, so this is exact at pixel resolution.
        painted = torch.einsum("bkhw,bkc->bchw", weights, colours)
        return self.encode(painted)


class KLAutoencoder:
    """diffusers' AutoencoderKL (Stable Diffusion's VAE), frozen; the latent is the scaled posterior mean."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae.requires_grad_(False).eval()
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.channels = int(vae.config.latent_channels)
        self._scale = float(vae.config.scaling_factor)

    @classmethod
    def load(cls, path: str) -> KLAutoencoder:
        """Load a diffusers AutoencoderKL directory (``config.json`` + safetensors)."""
        from diffusers import AutoencoderKL

        try:
            return cls(AutoencoderKL.from_pretrained(path, local_files_only=True, use_safetensors=True))
        except (OSError, ValueError) as error:
            raise DigSegError(
                f"model.autoencoder.path {path!r}: no AutoencoderKL with safetensors weights there ({error}); "
                "give the 'vae' folder of a diffusers checkpoint"
            ) from None

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        self._vae.to(images.device)
        mean: Tensor = self._vae.encode(images.to(self._vae.dtype)).latent_dist.mean
        return mean.to(images.dtype) * self._scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        self._vae.to(latents.device)
        image: Tensor = self._vae.decode((latents / self._scale).to(self._vae.dtype)).sample
        return image.to(latents.dtype)

    def compose(self, weights: Tensor, colours: Tensor) -> Tensor:
        # Each colour's latent is that of a flat image; a cell takes the area-weighted mean of its colours'.
        batch, num_classes, _ = colours.shape
        side = 8 * self.factor
        flat = colours.reshape(-1, 3, 1, 1).expand(-1, -1, side, side)
        cells = self.encode(flat.contiguous())[:, :, 4, 4].reshape(batch, num_classes, self.channels)
        area = F.avg_pool2d(weights, self.factor)
        return torch.einsum("bkhw,bkc->bchw", area, cells)
