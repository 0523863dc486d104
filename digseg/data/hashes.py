"""What tells that two images are the same, or nearly so: a digest of the pixels and a perceptual hash."""

from __future__ import annotations

import hashlib

import imagehash
import numpy as np
import numpy.typing as npt
from PIL import Image

from digseg.data.format import ImageHashes

HASHED_PX = 32
FLAT_LEVELS = 8
"""An image whose 32 x 32 grey version spans fewer levels (of 256) is flat: a blank tile, or nearly black."""


def hash_image(key: str, image: npt.NDArray[np.uint8]) -> ImageHashes:
    """The hashes of a sample's image, uint8 [H, W, 3] RGB.

    The perceptual hash is ImageHash's ``phash``: the signs, against their median, of the 64 lowest frequencies of a
    cosine transform of the 32 x 32 grey image. A flat image has none: those signs would be those of its noise.
    """
    height, width, _ = image.shape
    digest = hashlib.sha256(f"{width}x{height}:".encode())
    digest.update(np.ascontiguousarray(image).data)
    # reducing_gap averages whole blocks before it filters: the same picture for a third of the time.
    small = (
        Image.fromarray(image).convert("L").resize((HASHED_PX, HASHED_PX), Image.Resampling.LANCZOS, reducing_gap=2.0)
    )
    levels = np.asarray(small)
    flat = int(levels.max()) - int(levels.min()) < FLAT_LEVELS
    return ImageHashes(key=key, pixels_sha256=digest.hexdigest(), phash=None if flat else str(imagehash.phash(small)))
