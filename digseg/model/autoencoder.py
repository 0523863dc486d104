"""Image and mask to latent space and back: one interface, two implementations."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from digseg.config import AutoencoderConfig
from digseg.model.palette import palette
from digseg.model.pretrained import load_vae
from digseg.model.weights import sha256_of


class Autoencoder(Protocol):
    """Frozen map between pixels ``[B, 3, H, W]`` in [-1, 1] and latents ``[B, channels, H/factor, W/factor]``."""

    factor: int
    channels: int

    @property
    def identity(self) -> dict[str, str]:
        """What :meth:`encode` depends on, part by part: autoencoders that agree in all of it give the same latents."""

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def compose(self, weights: Tensor, colours: Tensor) -> Tensor:
        """Latents of a soft mask: ``weights [B, K, H, W]`` sum to 1 over K, ``colours [B, K, 3]`` are the palette's."""


def build_autoencoder(config: AutoencoderConfig, pickled: bool = False) -> Autoencoder:
    """The autoencoder that ``model.autoencoder`` describes.

    Args:
        pickled: take weights that only come pickled.

    Raises:
        DigSegError: there is none at ``path`` (see :func:`digseg.model.pretrained.load_model`).
    """
    if config.type == "shuffle":
        return ShuffleAutoencoder(config.factor)
    assert config.path is not None  # the schema requires it
    vae = load_vae(config.path, "model.autoencoder.path", pickled)
    return KLAutoencoder(vae, config.slicing, config.tiling)


class ShuffleAutoencoder:
    """Pixel (un)shuffle: lossless, weights-free; ``3 factor^2`` channels."""

    def __init__(self, factor: int) -> None:
        self.factor = factor
        self.channels = 3 * factor * factor
        self.identity = {"type": "shuffle", "factor": str(factor)}

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

    def __init__(self, vae: Any, slicing: bool = False, tiling: bool = False) -> None:
        self.vae = vae.requires_grad_(False).eval()
        if slicing:
            vae.enable_slicing()
        if tiling:
            vae.enable_tiling()
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.channels = int(vae.config.latent_channels)
        self._scale = float(vae.config.scaling_factor)
        self._palette_cells: Tensor | None = None

    @cached_property
    def identity(self) -> dict[str, str]:
        config = {name: self.vae.config.get(name) for name in _ENCODER_CONFIG}
        tiles = {"tiles": f"{self.vae.tile_sample_min_size} px"} if self.vae.use_tiling else {}
        return {
            "type": "kl",
            "factor": str(self.factor),
            "scaling factor": str(self._scale),
            "architecture": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
            "weights": sha256_of({k: v for k, v in self.vae.state_dict().items() if k.startswith(_ENCODER_WEIGHTS)}),
            **tiles,
        }

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        mean: Tensor = self._vae_on(images.device).encode(images.to(self.vae.dtype)).latent_dist.mean
        return mean.to(images.dtype) * self._scale

    def decode(self, latents: Tensor) -> Tensor:
        image: Tensor = self._vae_on(latents.device).decode((latents / self._scale).to(self.vae.dtype)).sample
        return image.to(latents.dtype)

    def compose(self, weights: Tensor, colours: Tensor) -> Tensor:
        # Each colour's latent is that of a flat image; a cell takes the area-weighted mean of its colours'.
        places = torch.cdist(colours.float(), palette().to(colours.device)).argmin(-1)
        cells = self._encoded_palette(colours.device)[places]
        area = F.avg_pool2d(weights, self.factor)
        return torch.einsum("bkhw,bkc->bchw", area, cells)

    def _vae_on(self, device: torch.device) -> Any:
        # Left alone where it is in place: while a program is traced, weights cannot be exchanged.
        return self.vae if self.vae.device == device else self.vae.to(device)

    def _encoded_palette(self, device: torch.device) -> Tensor:
        """The latents of flat images of all palette colours, float32 ``[64, channels]``, encoded once a device."""
        if self._palette_cells is None or self._palette_cells.device != device:
            side = 8 * self.factor
            flat = palette().to(device)[:, :, None, None].expand(-1, -1, side, side)
            # The cells serve training too, and at full precision, whatever first asked for them.
            with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
                self._palette_cells = self.encode(flat.contiguous())[:, :, 4, 4].contiguous()
        return self._palette_cells


# What of an AutoencoderKL the latents depend on: fine-tuned decoders share their encoder's latents.
_ENCODER_WEIGHTS = ("encoder.", "quant_conv.")
_ENCODER_CONFIG = ("act_fn", "block_out_channels", "down_block_types", "latent_channels", "layers_per_block",
                   "mid_block_add_attention", "norm_num_groups", "use_quant_conv")  # fmt: skip
