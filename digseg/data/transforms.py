"""Image and mask of a sample to a training crop: resize, crop, flip, jitter; only the crop is touched."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from digseg.config.schema import DataConfig, MixtureEntry

LabelT = TypeVar("LabelT", np.uint8, np.uint16)


@dataclass(frozen=True)
class TransformSettings:
    """Lengths in pixels. ``upright`` views (a street) are only mirrored, others also turned by quarters."""

    crop_size: int
    short_side: int
    scale: tuple[float, float]
    flip: bool
    upright: bool
    colour_jitter: float

    @classmethod
    def of(cls, config: DataConfig, entry: MixtureEntry, domain: str) -> TransformSettings:
        """The settings of a run for a corpus of a domain; only natural scenes have an up and a down."""
        return cls(
            config.crop_size,
            entry.short_side or config.short_side,
            config.scale,
            config.flip,
            domain == "natural",
            config.colour_jitter,
        )

    @property
    def longest_short_side(self) -> int:
        """The shorter side that the largest scale asks for: no finer image is ever needed."""
        return math.ceil(self.short_side * self.scale[1])


def training_crop(
    image: npt.NDArray[np.uint8],
    mask: npt.NDArray[Any],
    label_map: npt.NDArray[LabelT],
    settings: TransformSettings,
    rng: np.random.Generator,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[LabelT]]:
    """A random crop of an image [h, w, 3] and its mask [H, W]; the two may differ in size by a common factor.

    The image is resampled bilinearly with antialiasing, the mask by nearest neighbour, its values turned into
    labels by ``label_map`` [mask values], uint8 or uint16. Where the resized image is smaller than the crop, the
    image is padded with 0 (grey) and labels with the largest value of their type, which is ignored.

    Returns:
        float32 [3, C, C] in [-1, 1] and [C, C] of the label map's type, C = crop_size.
    """
    crop = settings.crop_size
    height, width = mask.shape
    ratio = settings.short_side * rng.uniform(*settings.scale) / min(height, width)
    down = _place(max(1, round(height * ratio)), crop, rng)
    right = _place(max(1, round(width * ratio)), crop, rng)

    window = np.s_[down.start : down.start + down.length, right.start : right.start + right.length]
    pixels = np.zeros((crop, crop, 3), dtype=np.float32)
    pixels[window] = _jitter(_resized(image, down, right), settings.colour_jitter, rng)
    target = np.full((crop, crop), np.iinfo(label_map.dtype).max, dtype=label_map.dtype)
    target[window] = label_map[mask[np.ix_(_nearest(down, height), _nearest(right, width))]]

    if settings.flip:
        pixels, target = _turn(pixels, target, settings.upright, rng)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), np.ascontiguousarray(target)


@dataclass(frozen=True)
class _Placement:
    """One axis: [begin, end) of the source as fractions of its length, and where that lands in the crop."""

    begin: float
    end: float
    start: int
    length: int


def _place(resized: int, crop: int, rng: np.random.Generator) -> _Placement:
    if resized <= crop:
        return _Placement(0.0, 1.0, int(rng.integers(0, crop - resized + 1)), resized)
    begin = int(rng.integers(0, resized - crop + 1))
    return _Placement(begin / resized, (begin + crop) / resized, 0, crop)


def _resized(image: npt.NDArray[np.uint8], down: _Placement, right: _Placement) -> npt.NDArray[np.uint8]:
    """The placed part of an image [h, w, 3], resized to where it lands; the rest of the image is not touched."""
    (top, bottom, y), (left, end, x) = _neighbourhood(down, image.shape[0]), _neighbourhood(right, image.shape[1])
    box = (x[0], y[0], x[1], y[1])
    part = Image.fromarray(image[top:bottom, left:end])
    return np.asarray(part.resize((right.length, down.length), Image.Resampling.BILINEAR, box=box))


def _neighbourhood(place: _Placement, length: int) -> tuple[int, int, tuple[float, float]]:
    """[first, last) source pixels that the filter reads, and the placed interval counted from the first."""
    begin, end = place.begin * length, place.end * length
    # The triangle filter reaches one target pixel beyond the interval; one more for rounding.
    reach = max((end - begin) / place.length, 1.0) + 1
    first, last = max(0, math.floor(begin - reach)), min(length, math.ceil(end + reach))
    return first, last, (begin - first, min(end - first, last - first))


def _nearest(place: _Placement, length: int) -> npt.NDArray[np.int64]:
    """For every target pixel the source pixel that holds its centre."""
    step = (place.end - place.begin) * length / place.length
    centres = place.begin * length + (np.arange(place.length) + 0.5) * step
    return np.minimum(centres.astype(np.int64), length - 1)


def _jitter(image: npt.NDArray[np.uint8], strength: float, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """[-1, 1] pixels with brightness, contrast and saturation each scaled by a factor in 1 -+ strength."""
    pixels = image.astype(np.float32)
    pixels *= 1 / 255
    if strength > 0:
        brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, size=3).astype(np.float32)
        grey = pixels @ _LUMA
        pixels -= grey[..., None]
        pixels *= saturation * contrast * brightness
        grey = (grey - grey.mean()) * contrast + grey.mean()
        pixels += grey[..., None] * brightness
        np.clip(pixels, 0, 1, out=pixels)
    pixels *= 2
    pixels -= 1
    return pixels


_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601


def _turn(
    pixels: npt.NDArray[Any], target: npt.NDArray[Any], upright: bool, rng: np.random.Generator
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Mirror at random; a view without an up also takes one of the four quarter turns."""
    mirror, quarter_turns = rng.random() < 0.5, int(rng.integers(0, 4))
    if mirror:
        pixels, target = pixels[:, ::-1], target[:, ::-1]
    if not upright:
        pixels, target = np.rot90(pixels, quarter_turns), np.rot90(target, quarter_turns)
    return pixels, target
