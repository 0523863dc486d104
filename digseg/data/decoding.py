"""Bytes of a sample's members to arrays."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image


def decode_image(content: bytes, min_short_side: int | None = None) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3] RGB of a JPEG or PNG, reduced by a whole factor where ``min_short_side`` allows it."""
    image: Image.Image = Image.open(io.BytesIO(content))
    if min_short_side:
        factor = min(image.size) // min_short_side
        if factor > 1:
            # A JPEG decodes at 1/2, 1/4 or 1/8 for a fraction of the cost; draft() does nothing to a PNG.
            image.draft("RGB", (-(-image.width // factor), -(-image.height // factor)))
            factor = min(image.size) // min_short_side
        image = image if image.mode == "RGB" else image.convert("RGB")
        if factor > 1:
            image = image.reduce(factor)
    else:
        image = image if image.mode == "RGB" else image.convert("RGB")
    return np.array(image)


def decode_mask(content: bytes) -> npt.NDArray[Any]:
    """[H, W] ids, uint8 or uint16, as the PNG holds them."""
    mask = np.array(Image.open(io.BytesIO(content)))
    return mask if mask.dtype == np.uint8 else mask.astype(np.uint16)
