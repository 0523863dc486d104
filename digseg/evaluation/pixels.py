"""An image of which only parts need be in memory: an array, or a file that libvips reads piece by piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from digseg.errors import DigSegError
from digseg.evaluation.images import NOT_FINITE


class Pixels(Protocol):
    """RGB pixels by rectangle."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    def read(self, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        """The rectangle, uint8 ``[height, width, 3]``."""

    def thumbnail(self, side: int) -> NDArray[np.uint8]:
        """The whole image, no side longer than ``side``."""


class ArrayPixels:
    """An image in memory, uint8 ``[H, W, 3]``."""

    def __init__(self, image: NDArray[np.uint8]) -> None:
        """Raises:
        DigSegError: an array that is no such image.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise DigSegError(f"expected an RGB image, uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
        self._image = image
        self.height, self.width = image.shape[:2]

    def read(self, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        """See :class:`Pixels`."""
        return self._image[top : top + height, left : left + width]

    def thumbnail(self, side: int) -> NDArray[np.uint8]:
        """See :class:`Pixels`."""
        picture = Image.fromarray(self._image)
        picture.thumbnail((side, side))
        return np.asarray(picture)


class FilePixels:
    """An image file of any size. Of a tiled TIFF only the tiles that are asked for are decoded; what has no tiles
    (PNG, JPEG) and is large is decoded once, into a temporary file.

    Gives what :func:`digseg.evaluation.images.read_image` gives: upright, without transparency, grey as RGB, 16-bit
    grey (without transparency) and floats scaled so that the brightest pixel is white.
    """

    def __init__(self, path: Path) -> None:
        """Raises:
        DigSegError: no such file, not an image, or one that is neither grey nor colour.
        """
        vips = _vips()
        if not path.is_file():
            raise DigSegError(f"cannot read image {path}: no such file")
        self._path = path
        try:
            image = vips.Image.new_from_file(str(path), access="random", fail_on="truncated").autorot()
        except vips.Error as error:
            raise DigSegError(f"{path}: not an image that can be read in parts ({_reason(error)})") from None
        if image.bands > 4 or image.interpretation in ("lab", "xyz", "yxy", "hsv", "lch", "labs"):
            raise DigSegError(
                f"{path}: {image.bands} bands of {image.interpretation}; give an image of grey, RGB or CMYK pixels"
            )
        self.height, self.width = image.height, image.width
        self._cmyk = image.interpretation == "cmyk"
        self._image = self._eight_bit(image)

    def read(self, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        """See :class:`Pixels`.

        Raises:
            DigSegError: the file is damaged there.
        """
        vips = _vips()
        try:
            content = vips.Region.new(self._image).fetch(left, top, width, height)
        except vips.Error as error:
            raise self._damaged(error) from None
        return self._rgb(np.frombuffer(content, np.uint8).reshape(height, width, self._image.bands))

    def thumbnail(self, side: int) -> NDArray[np.uint8]:
        """See :class:`Pixels`.

        Raises:
            DigSegError: the file is damaged.
        """
        vips = _vips()
        small = self._image
        factor = max(self.height, self.width) / side
        try:
            if factor > 1:
                # A whole factor first, as a plain mean: this one runs through the file once, a strip at a time.
                small = small.shrink(max(1, int(factor)), max(1, int(factor)))
                small = small.resize(min(1.0, side / max(small.width, small.height)))
            content = np.asarray(small.numpy(), np.uint8)
        except vips.Error as error:
            raise self._damaged(error) from None
        return self._rgb(content.reshape(small.height, small.width, small.bands))

    def _damaged(self, error: Exception) -> DigSegError:
        return DigSegError(f"{self._path}: damaged image ({_reason(error)}); it cannot be decoded")

    def _eight_bit(self, image: Any) -> Any:
        if image.format == "uchar":
            return image
        if image.bands >= 2:  # Pillow treats grey with transparency as colours too
            if image.format != "ushort":
                raise DigSegError(f"{self._path}: colours of type {image.format}; give 8 or 16 bits a channel")
            return (image >> 8).cast("uchar")
        grey = image[0].cast("double")
        # What is not finite is no 0 when taken from itself; libvips' own least, largest and mean pass over it.
        if image.format in ("float", "double") and (grey - grey == 0).min() == 0:
            raise DigSegError(f"{self._path}: damaged image ({NOT_FINITE})")
        return (grey * (255 / max(grey.max(), 1.0))).rint().cast("uchar")

    def _rgb(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if self._cmyk:
            return np.asarray(Image.frombytes("CMYK", pixels.shape[1::-1], pixels.tobytes()).convert("RGB"))
        return pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, axis=2)


def write_mask(mask: NDArray[np.uint8 | np.uint16], path: Path) -> None:
    """A mask [H, W] of ids as a greyscale PNG of as many bits, without a copy of it in memory."""
    vips = _vips()
    height, width = mask.shape
    kind, grey = ("uchar", "b-w") if mask.dtype == np.uint8 else ("ushort", "grey16")
    image = vips.Image.new_from_memory(mask.data, width, height, 1, kind).copy(interpretation=grey)
    image.pngsave(str(path))


def _vips() -> Any:
    import pyvips

    return pyvips


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "unknown format"
