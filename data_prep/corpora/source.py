"""Opening the files of a sample: decoding, EXIF orientation, tiles."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from data_prep.corpora.spec import CorpusSpec, MatlabLabel
from data_prep.corpora.tiles import Box

UInt8Array = npt.NDArray[np.uint8]

_ORIENTATION = 0x0112
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError)
"""What PIL raises on damaged files: truncated data, broken chunks."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings pixels of an EXIF orientation upright."""


class BadSample(Exception):  # noqa: N818 - the name says what it is about, not what went wrong
    """A sample that cannot be used; its text is the reason that ``rejected.jsonl`` shows."""


@dataclass(frozen=True)
class Source:
    """Decoded files of a sample, orientation applied; ``image_bytes`` where a shard may hold the file as it is."""

    image: Image.Image
    image_bytes: bytes | None
    masks: tuple[Image.Image, ...]
    mask_paths: tuple[Path, ...]

    def cropped(self, box: Box) -> Source:
        """One tile of it."""
        masks = tuple(mask.crop(box) for mask in self.masks)
        return Source(self.image.crop(box), None, masks, self.mask_paths)


def open_source(image: Path, masks: tuple[Path, ...], spec: CorpusSpec) -> Source:
    """Decode an image and its masks.

    Bytes are kept (not None) of an 8-bit grey or RGB PNG or JPEG that any reader decodes to the same pixels.

    Raises:
        BadSample: a file cannot be read or decoded, the EXIF data that tell how to turn it are damaged, or a mask is
            not of the image's size.
    """
    picture, data = _open(image, "image")
    orientation = _orientation(picture)
    keep = orientation == 1 and spec.channel_order == "rgb" and _plain(picture, data)
    if spec.exif.image == "apply":
        picture = _turned(picture, orientation, f"image {image.name}")
    opened = tuple(_mask_image(path, spec, orientation) for path in masks)
    for path, mask in zip(masks, opened, strict=True):
        if mask.size != picture.size:
            raise BadSample(
                f"mask {path.name} is {mask.width} x {mask.height} pixels, the image {picture.width} x {picture.height}"
            )
    return Source(picture, data if keep else None, opened, masks)


def image_pixels(image: Image.Image, spec: CorpusSpec) -> UInt8Array:
    """The image as uint8 [H, W, 3] RGB: 16-bit levels are scaled to 8 bits, alpha is dropped."""
    if image.mode.startswith("I"):
        levels = np.clip(np.asarray(image, dtype=np.int64) // 257, 0, 255).astype(np.uint8)
        pixels = np.repeat(levels[:, :, None], 3, axis=2)
    else:
        pixels = np.asarray(image.convert("RGB"))
    return np.ascontiguousarray(pixels[:, :, ::-1]) if spec.channel_order == "bgr" else pixels


def _open(path: Path, what: str) -> tuple[Image.Image, bytes]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadSample(f"{what} {path.name} cannot be read: {error.strerror or error}") from error
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except UnidentifiedImageError as error:
        raise BadSample(f"{what} {path.name} is no image file that can be identified") from error
    except Image.DecompressionBombError as error:
        raise BadSample(f"{what} {path.name} is too large to decode: {error}") from error
    except _DECODING_ERRORS as error:
        raise BadSample(f"{what} {path.name} is damaged or truncated: {error}") from error
    return image, data


def _orientation(image: Image.Image) -> int | None:
    """1..8; None where the EXIF data are damaged."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except (*_DECODING_ERRORS, struct.error):
        return None
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turned(image: Image.Image, orientation: int | None, what: str) -> Image.Image:
    if orientation is None:
        raise BadSample(f"{what} has damaged EXIF data: mend or remove them, or set `exif` to ignore for the corpus")
    return image if orientation == 1 else image.transpose(_TURNS[orientation])


def _plain(image: Image.Image, data: bytes) -> bool:
    if image.mode not in ("L", "RGB") or "transparency" in image.info:
        return False
    bits_per_channel = data[24] if image.format == "PNG" else 8
    return image.format in ("PNG", "JPEG") and bits_per_channel == 8


def _mask_image(path: Path, spec: CorpusSpec, image_orientation: int | None) -> Image.Image:
    if isinstance(spec.label, MatlabLabel):
        return _matrix_image(path, spec.label.variable)
    image, _ = _open(path, "mask")
    if spec.exif.mask == "as_image":
        return _turned(image, image_orientation, f"the image of mask {path.name}")
    if spec.exif.mask == "own":
        return _turned(image, _orientation(image), f"mask {path.name}")
    return image


def _matrix_image(path: Path, variable: str) -> Image.Image:
    """A matrix of ids in a MATLAB file as a 16-bit grey image."""
    try:
        contents = loadmat(io.BytesIO(path.read_bytes()))
    except OSError as error:
        raise BadSample(f"mask {path.name} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, NotImplementedError, MatReadError, zlib.error) as error:
        raise BadSample(f"mask {path.name} is no MATLAB file that can be read: {error}") from error
    if variable not in contents:
        named = sorted(name for name in contents if not name.startswith("__"))
        raise BadSample(f"mask {path.name} has no variable {variable!r}, but {', '.join(named) or 'none at all'}")
    ids = np.asarray(contents[variable])
    if ids.ndim != 2 or ids.dtype.kind not in "buif" or not ((ids >= 0) & (ids == ids // 1) & (ids <= 65535)).all():
        raise BadSample(f"mask {path.name}: the variable {variable!r} is no matrix of ids 0..65535")
    return Image.fromarray(ids.astype(np.uint16))
