"""Bytes of a sample's members to arrays, by the fastest decoder that is right for them.

JPEGs go to libjpeg-turbo (simplejpeg), RGB images and grey masks that are 8-bit PNGs to libspng (pyspng); whatever is
left (CMYK, palettes, grey PNGs as images, 16 bits, files with slight damage) goes to PIL. Which decoder it is follows
from the bytes alone, and at full size all of them give the same pixels.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pyspng
import simplejpeg
from PIL import Image

_JPEG = b"\xff\xd8\xff"
# A PNG's signature and the length and name of its first chunk, of which bytes 8 and 9 are bit depth and colour type.
_PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
_GREY_8BIT, _RGB_8BIT = bytes((8, 0)), bytes((8, 2))


def decode_image(content: bytes, min_short_side: int | None = None) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3] RGB of a JPEG or PNG.

    With ``min_short_side`` the image comes at a reduced size, its shorter side at least that long, where that saves
    half the pixels or more of a side: a JPEG is then decoded at k/8 of its size, k <= 4 (inverse transforms of fewer
    coefficients: sharper than averaged pixels), anything else is averaged over whole blocks of pixels.
    """
    image = _decode_jpeg(content, min_short_side) if content.startswith(_JPEG) else _decode_png(content, _RGB_8BIT)
    if image is not None and not min_short_side:
        return image
    if image is None:
        with Image.open(io.BytesIO(content)) as opened:
            image = np.array(opened.convert("RGB"))
    factor = min(image.shape[:2]) // min_short_side if min_short_side else 1
    return np.array(Image.fromarray(image).reduce(factor)) if factor > 1 else image


def decode_mask(content: bytes) -> npt.NDArray[Any]:
    """[H, W] ids, uint8 or uint16, as the PNG holds them."""
    mask = _decode_png(content, _GREY_8BIT)
    if mask is not None:
        return mask
    with Image.open(io.BytesIO(content)) as opened:
        mask = np.array(opened)
    return mask if mask.dtype == np.uint8 else mask.astype(np.uint16)


def _decode_jpeg(content: bytes, min_short_side: int | None) -> npt.NDArray[np.uint8] | None:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if colours not in ("YCbCr", "Gray", "RGB"):
            return None
        # Scales between 1/2 and 1 cost more than the whole size.
        reduced = min_short_side is not None and min(height, width) >= 2 * min_short_side
        bound = min_short_side if reduced else 0
        image: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(
            content, min_height=bound, min_width=bound, min_factor=2 if reduced else 1
        )
        return image
    except ValueError:
        return None


def _decode_png(content: bytes, kind: bytes) -> npt.NDArray[np.uint8] | None:
    """The pixels of a PNG of the given bit depth and colour type, None for any other and for a damaged one."""
    if not (content.startswith(_PNG) and content[24:26] == kind):
        return None
    try:
        pixels: npt.NDArray[np.uint8] = pyspng.load(content)
        return pixels
    except (RuntimeError, ValueError):
        return None
