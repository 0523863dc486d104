"""Images as users hand them in, and masks as they get them back."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from digseg.errors import DigSegError

NOT_FINITE = "some of its pixels are no finite numbers"


def read_image(path: Path) -> NDArray[np.uint8]:
    """The image of a file, uint8 [H, W, 3] RGB, turned upright as its EXIF orientation says.

    Raises:
        DigSegError: no such file, not an image, or a damaged one.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DigSegError(f"cannot read image {path}: {error.strerror or error}") from None
    return decode_image(content, str(path))


def decode_image(content: bytes, where: str) -> NDArray[np.uint8]:
    """The image of a file's bytes, uint8 [H, W, 3] RGB; `where` names it in errors.

    Raises:
        DigSegError: not an image, a damaged one, or one of more pixels than Pillow decodes.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            return rgb_pixels(image)
    except UnidentifiedImageError:
        raise DigSegError(f"{where}: not an image (expected PNG, JPEG or another format that Pillow reads)") from None
    except Image.DecompressionBombError as error:
        raise DigSegError(f"{where}: too large to be decoded whole ({error}); use digseg predict --window") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise DigSegError(f"{where}: damaged image ({error}); it cannot be decoded to its end") from None


def rgb_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """A picture of any mode as uint8 [H, W, 3], upright; transparency is dropped, and what has more than 8 bits is
    scaled so that its brightest pixel is white."""
    return np.array(_eight_bit(ImageOps.exif_transpose(image)).convert("RGB"))


def png_bytes(mask: NDArray[np.uint8 | np.uint16]) -> bytes:
    """A mask [H, W] as a greyscale PNG of its ids, with as many bits as it has."""
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, format="PNG")
    return buffer.getvalue()


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit and float greyscale scaled so that its brightest pixel is white; Pillow's own conversion
    clips.

    Raises:
        ValueError: floats that are not finite, which have no brightness.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(NOT_FINITE)
    return Image.fromarray((values / max(values.max(), 1.0) * 255).round().clip(0, 255).astype(np.uint8))
