"""What all painters share: noise, colours, a canvas of pixels and labels, the camera's faults."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import gaussian_filter

Float = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
Rng = np.random.Generator


@dataclass
class Canvas:
    """A picture while it is painted: ``image`` float32 [H, W, 3] in 0..1, ``labels`` uint8 [H, W]."""

    image: Float
    labels: UInt8

    @classmethod
    def empty(cls, height: int, width: int, label: int) -> Canvas:
        image = np.zeros((height, width, 3), np.float32)
        return cls(image, np.full((height, width), label, np.uint8))

    @property
    def height(self) -> int:
        return int(self.labels.shape[0])

    @property
    def width(self) -> int:
        return int(self.labels.shape[1])

    def cover(self, where: Bool, colour: npt.ArrayLike, label: int | None) -> None:
        """Paint ``where`` [H, W] with one colour or with an image [H, W, 3] of colours."""
        paint = np.asarray(colour, np.float32)
        self.image[where] = paint[where] if paint.ndim == 3 else paint
        if label is not None:
            self.labels[where] = label

    def stamp(self, top: int, left: int, alpha: Float, colour: Float, label: int | None) -> None:
        """Lay a patch (alpha [h, w], colour [h, w, 3] or [3]) over the picture, cut at its borders.

        The label changes where the patch hides more than half of what is below it.
        """
        here, part = overlap(top, left, alpha.shape, self.labels.shape)
        cut = alpha[part][..., None]
        paint = colour[part] if colour.ndim == 3 else colour
        self.image[here] += cut * (paint - self.image[here])
        if label is not None:
            self.labels[here][cut[..., 0] > 0.5] = label

    def shade(self, top: int, left: int, factor: Float) -> None:
        """Multiply a patch [h, w] of light into the picture (shadows), cut at its borders."""
        here, part = overlap(top, left, factor.shape, self.labels.shape)
        self.image[here] *= factor[part][..., None]


Window = tuple[slice, slice]


def overlap(top: int, left: int, patch: tuple[int, ...], picture: tuple[int, ...]) -> tuple[Window, Window]:
    """Where a patch [h, w] laid at (top, left) covers a picture [H, W]: that part of the picture, that of the patch.

    Both are empty where they do not meet.
    """
    starts = max(top, 0), max(left, 0)
    stops = max(min(top + patch[0], picture[0]), starts[0]), max(min(left + patch[1], picture[1]), starts[1])
    here = slice(starts[0], stops[0]), slice(starts[1], stops[1])
    return here, (slice(starts[0] - top, stops[0] - top), slice(starts[1] - left, stops[1] - left))


def noise(rng: Rng, height: int, width: int, cell: float, octaves: int = 3, stretch: float = 1.0) -> Float:
    """Value noise float32 [H, W] of mean 0 and deviation 1; ``cell`` is the largest detail in pixels.

    ``stretch`` makes details that many times wider than high.
    """
    sizes = [max(cell / 2**octave, 1.0) for octave in range(octaves)]
    # details of many pixels are as smooth from half the resolution, at a quarter of the cost
    half = height // 2 + 1, width // 2 + 1
    coarse = [k for k, size in enumerate(sizes) if size >= 5 and min(height, width) >= 48]
    total = np.zeros((height, width), np.float32)
    if coarse:
        small = np.zeros(half, np.float32)
        for k in coarse:
            small += _octave(rng, half[0], half[1], sizes[k] / 2, stretch) * np.float32(0.55**k)
        total += _resized(small, height, width, (0.0, 0.0, width / 2, height / 2))
    for k in range(len(coarse), octaves):
        total += _octave(rng, height, width, sizes[k], stretch) * np.float32(0.55**k)
    total -= total.mean()
    total /= max(float(total.std()), 1e-6)
    return total


def _octave(rng: Rng, height: int, width: int, size: float, stretch: float) -> Float:
    rows, columns = int(height / size) + 3, int(width / (size * stretch)) + 3
    points = rng.standard_normal((rows, columns), np.float32)
    return _resized(points, height, width, (1.0, 1.0, 1.0 + width / (size * stretch), 1.0 + height / size))


def _resized(values: Float, height: int, width: int, box: tuple[float, float, float, float]) -> Float:
    smooth = Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.asarray(smooth, np.float32)


def hsv(hue: float, saturation: float, value: float) -> Float:
    """RGB float32 [3] of a hue (any real, 1 is a full turn), saturation and value in 0..1."""
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, min(saturation, 1.0), min(value, 1.0)), np.float32)


def textured(colour: Float, grain: Float, strength: float) -> Float:
    """A colour [3] under a texture [H, W]: [H, W, 3]."""
    return colour * (1.0 + strength * grain)[..., None]


def blend(first: Float, second: Float, amount: Float) -> Float:
    """Between two colours or images by ``amount`` [H, W] in 0..1."""
    mixed: Float = first + (second - first) * amount[..., None]
    return mixed


def grid(height: int, width: int) -> tuple[Float, Float]:
    """Row and column of each pixel, float32 [H, W] each, read-only."""
    rows, columns = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32)
    shape = (height, width)
    return np.broadcast_to(rows[:, None], shape), np.broadcast_to(columns[None], shape)


def photograph(rng: Rng, image: Float, blur: tuple[float, float], grain: tuple[float, float]) -> UInt8:
    """What a camera makes of the painted light: blur (pixels), vignette, exposure, white balance, noise.

    Returns uint8 [H, W, 3].
    """
    height, width = image.shape[:2]
    sigma = rng.uniform(*blur)
    image = gaussian_filter(image, (sigma, sigma, 0))
    rows, columns = grid(height, width)
    radius = ((rows / height - 0.5) ** 2 + (columns / width - 0.5) ** 2) * 2
    image = image * (1.0 - rng.uniform(0.0, 0.35) * radius)[..., None]
    image = image * (rng.uniform(0.82, 1.15) * (1.0 + rng.normal(0.0, 0.035, 3)).astype(np.float32))
    image = np.clip(image, 0.0, 1.0) ** rng.uniform(0.85, 1.2)
    strength = rng.uniform(*grain)
    shot = np.sqrt(0.3 + image) * rng.standard_normal(image.shape, np.float32)
    image = image + strength * shot
    return (np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
