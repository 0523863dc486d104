"""Image and mask of a sample to a training crop: crop, resize, turn, jitter; only the crop is touched."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import interpolate

from digseg.data.transform_settings import TransformSettings

PADDING = 128  # of an image
LabelT = TypeVar("LabelT", np.uint8, np.uint16)


def training_crop(
    image: npt.NDArray[np.uint8],
    mask: npt.NDArray[Any],
    label_map: npt.NDArray[LabelT],
    settings: TransformSettings,
    rng: np.random.Generator,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[LabelT]]:
    """A random crop of an image [h, w, 3] and its mask [H, W]; the two may differ in size by a common factor.

    A part that begins at a whole pixel of the image is cut out and then resized: the image bilinearly with
    antialiasing, the mask by nearest neighbour, its values turned into labels by ``label_map`` [mask values], uint8 or
    uint16. Where the resized image is smaller than the crop, the image is padded with 128 (grey) and labels with the
    largest value of their type, which is ignored.

    Returns:
        uint8 [3, C, C] and [C, C] of the label map's type, C = crop_size.
    """
    crop = settings.crop_size
    height, width = mask.shape
    ratio = settings.short_side * rng.uniform(*settings.scale) / min(height, width)
    down = _place(image.shape[0], max(1, round(height * ratio)), crop, rng)
    right = _place(image.shape[1], max(1, round(width * ratio)), crop, rng)

    levels = _resized(image, down, right)
    labels = label_map.take(mask.take(_nearest(down, height), axis=0).take(_nearest(right, width), axis=1))
    if labels.shape != (crop, crop):
        window = np.s_[down.start : down.start + down.length, right.start : right.start + right.length]
        levels, labels = _padded(levels, window, crop, 0), _padded(labels, window, crop, np.iinfo(labels.dtype).max)
        outside = _padded(np.zeros((down.length, right.length), dtype=bool), window, crop, True)
    else:
        outside = None
    if settings.flip:
        turn = _draw_turn(settings.upright, rng)
        levels, labels = turn(levels), np.ascontiguousarray(turn(labels))
        outside = None if outside is None else turn(outside)
    pixels = _coloured(levels, down.length * right.length, settings.colour_jitter, rng)
    if outside is not None:
        np.copyto(pixels, np.uint8(PADDING), where=outside)
    return pixels, labels


def as_pixels(levels: torch.Tensor) -> torch.Tensor:
    """uint8 images of any shape as float32 in [-1, 1], as an autoencoder and the segmenter take them.

    In one place, so that stored latents and training round the same bytes alike.
    """
    return levels.float().mul_(1 / 255).mul_(2).sub_(1)


@dataclass(frozen=True)
class _Placement:
    """One axis: ``span`` pixels of the image's ``size`` from ``begin`` on, resized to ``length`` pixels of the crop
    from ``start`` on."""

    size: int
    begin: int
    span: float
    start: int
    length: int


def _place(size: int, resized: int, crop: int, rng: np.random.Generator) -> _Placement:
    """Where an axis of ``size`` pixels, which ``resized`` pixels would show, goes in the crop."""
    if resized <= crop:
        return _Placement(size, 0, size, int(rng.integers(0, crop - resized + 1)), resized)
    span = size * crop / resized
    if math.ceil(span) == crop:
        # A part as long as the crop is never resized: `interpolate` copies such an axis, whatever the scale.
        span = crop
    return _Placement(size, int(rng.integers(0, math.floor(size - span) + 1)), span, 0, crop)


def _resized(image: npt.NDArray[np.uint8], down: _Placement, right: _Placement) -> npt.NDArray[np.uint8]:
    """The placed part of an image [h, w, 3], resized to where it lands; the rest of the image is not touched."""
    part = image[down.begin : down.begin + math.ceil(down.span), right.begin : right.begin + math.ceil(right.span)]
    # The last pixel is there in part only. Rounding must not cost the result its last row or column.
    scale = [place.length / place.span * (1 + 1e-7) for place in (down, right)]
    tensor = torch.from_numpy(np.require(part, requirements="W")).permute(2, 0, 1)[None]
    resized = interpolate(tensor, scale_factor=scale, mode="bilinear", antialias=True)
    return resized[0, :, : down.length, : right.length].permute(1, 2, 0).numpy()


def _nearest(place: _Placement, size: int) -> npt.NDArray[np.int64]:
    """For every target pixel the one of ``size`` source pixels that holds its centre."""
    step = place.span / place.size * size / place.length
    centres = place.begin / place.size * size + (np.arange(place.length) + 0.5) * step
    return np.minimum(centres.astype(np.int64), size - 1)


def _padded(array: npt.NDArray[Any], window: tuple[slice, slice], crop: int, value: int) -> npt.NDArray[Any]:
    """[C, C, ...] of ``value`` with the array in a window of it."""
    padded = np.full((crop, crop, *array.shape[2:]), value, dtype=array.dtype)
    padded[window] = array
    return padded


def _draw_turn(upright: bool, rng: np.random.Generator) -> Callable[[npt.NDArray[Any]], npt.NDArray[Any]]:
    """Mirror at random; a view without an up also takes one of the four quarter turns."""
    mirror, quarter_turns = rng.random() < 0.5, int(rng.integers(0, 4))

    def turn(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        mirrored = array[:, ::-1] if mirror else array
        return mirrored if upright else np.rot90(mirrored, quarter_turns)

    return turn


def _coloured(
    levels: npt.NDArray[np.uint8], num_pixels: int, strength: float, rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """uint8 [3, H, W] of [H, W, 3], with brightness, contrast and saturation each scaled by a factor in 1 -+ strength;
    ``num_pixels`` are not padding (which is 0 here).

    All three are one affine map of a pixel p, with g its grey level and m the mean of g:
    brightness * (contrast * (saturation * (p - g) + g - m) + m).
    """
    planes = levels.transpose(2, 0, 1)
    if strength == 0:
        return np.ascontiguousarray(planes)
    flat = planes.astype(np.float32, order="C").reshape(3, -1)
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, size=3).astype(np.float32)
    mean = _LUMA @ flat.sum(axis=1) / np.float32(num_pixels)
    matrix = brightness * contrast * (saturation * np.eye(3, dtype=np.float32) + (1 - saturation) * _LUMA)
    coloured: npt.NDArray[np.float32] = matrix @ flat
    coloured += brightness * (1 - contrast) * mean + np.float32(0.5)
    np.clip(coloured, 0, 255, out=coloured)
    return coloured.astype(np.uint8).reshape(planes.shape)


_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
