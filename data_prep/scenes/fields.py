"""Field crops from above: rows of rosettes with broad leaves, weeds of other leaf shapes, soil with stones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data_prep.scenes.paint import Bool, Canvas, Float, Rng, UInt8, grid, hsv, noise, photograph, textured

# PhenoBench mask values; the partial ones are plants that the image border cuts
SOIL, CROP, WEED, PARTIAL_CROP, PARTIAL_WEED = range(5)


def paint_field(rng: Rng, size: int) -> tuple[UInt8, UInt8]:
    """A patch of field: image uint8 [H, W, 3], mask uint8 [H, W] of PhenoBench values."""
    canvas = Canvas.empty(size, size, SOIL)
    canvas.image[:] = _soil(rng, size)
    sun = (rng.uniform(-3.5, 3.5), rng.uniform(-3.5, 3.5), rng.uniform(0.5, 0.85))
    greens = _Greens(rng.uniform(0.2, 0.36), rng.uniform(0.35, 0.75), rng.uniform(0.4, 0.75))
    stage = rng.uniform(13.0, 30.0) * size / 192
    plants = [(y, x, stage, True) for y, x in _row_places(rng, size, stage)]
    stage_of_weeds = rng.uniform(7.5, 17.0) * size / 192
    for _ in range(rng.integers(6, 22)):
        y, x = rng.uniform(-6, size + 6, 2)
        plants.append((y, x, stage_of_weeds, False))
    for i in rng.permutation(len(plants)):
        y, x, radius, is_crop = plants[i]
        _plant(rng, canvas, y, x, radius * float(np.exp(rng.normal(0, 0.18))), is_crop, greens, sun)
    canvas.image *= (1 + 0.06 * noise(rng, size, size, 100, 2))[..., None]
    image = photograph(rng, canvas.image, (0.35, 0.95), (0.006, 0.035))
    return image, canvas.labels


@dataclass(frozen=True)
class _Greens:
    """One range of leaf colours for all plants of a picture: colour does not tell crop from weed."""

    hue: float
    saturation: float
    value: float

    def draw(self, rng: Rng) -> Float:
        return hsv(
            self.hue + rng.normal(0, 0.025),
            self.saturation * rng.uniform(0.75, 1.25),
            self.value * rng.uniform(0.75, 1.2),
        )


def _soil(rng: Rng, size: int) -> Float:
    """Clods, stones, straw, wet patches and at times a wheel track; some soils are greenish or mossy."""
    base = hsv(rng.uniform(0.03, 0.14), rng.uniform(0.12, 0.45), rng.uniform(0.25, 0.62))
    clods = 0.1 * noise(rng, size, size, 9, 4) + 0.06 * noise(rng, size, size, 2.5, 2)
    wet = -0.14 * (noise(rng, size, size, 70, 3) > rng.uniform(0.3, 2.0))
    soil = textured(base, (clods + wet).astype(np.float32), 1.0)
    if rng.random() < 0.35:
        moss = np.clip(noise(rng, size, size, 30, 4) - 0.8, 0, 1)[..., None] * 0.45
        soil = soil + moss * (hsv(rng.uniform(0.18, 0.3), 0.4, 0.4) - soil)
    rows, columns = grid(size, size)
    if rng.random() < 0.3:
        angle = rng.uniform(0, np.pi)
        across = columns * np.cos(angle) + rows * np.sin(angle)
        track = abs(across - rng.uniform(0.2, 0.8) * size) < rng.uniform(8, 16)
        tread = 0.85 + 0.12 * np.sin((columns * np.sin(angle) - rows * np.cos(angle)) * 0.9)
        soil = np.where(track[..., None], soil * tread[..., None], soil)
    canvas = Canvas(np.ascontiguousarray(soil, np.float32), np.zeros((size, size), np.uint8))
    for _ in range(rng.integers(5, 45)):
        _stone(rng, canvas)
    for _ in range(rng.integers(0, 14)):
        _straw(rng, canvas)
    return canvas.image


def _stone(rng: Rng, canvas: Canvas) -> None:
    radius = float(rng.uniform(1.0, 4.5))
    n = int(2 * radius + 3)
    rows, columns = grid(n, n)
    shape = np.hypot((rows - n / 2) * rng.uniform(0.9, 1.5), columns - n / 2) < radius
    y, x = rng.integers(0, canvas.height, 2)
    canvas.shade(int(y) + 1, int(x) + 1, np.where(shape, 0.55, 1.0).astype(np.float32))
    colour = hsv(rng.uniform(0, 0.7), rng.uniform(0.02, 0.2), rng.uniform(0.4, 0.9))
    light = (1.15 - 0.45 * (rows + columns) / (2 * n)).astype(np.float32)
    canvas.stamp(int(y), int(x), shape.astype(np.float32), colour * light[..., None], None)


def _straw(rng: Rng, canvas: Canvas) -> None:
    length, angle = rng.uniform(8, 30), rng.uniform(0, np.pi)
    along, across, top, left = _local(rng.uniform(0, canvas.height), rng.uniform(0, canvas.width), angle, length)
    alpha = ((abs(along) < length / 2) & (abs(across) < rng.uniform(0.6, 1.2))).astype(np.float32) * 0.85
    canvas.stamp(top, left, alpha, hsv(rng.uniform(0.08, 0.25), rng.uniform(0.2, 0.5), rng.uniform(0.5, 0.85)), None)


def _row_places(rng: Rng, size: int, stage: float) -> list[tuple[float, float]]:
    """Places of crop plants: parallel rows at any angle, even spacing with gaps where none came up."""
    angle, spacing = rng.uniform(0, np.pi), rng.uniform(1.5, 2.6) * stage
    row_distance = max(rng.uniform(48, 90) * size / 192, 2.2 * stage)
    start, reach = rng.uniform(-0.5, 0.5) * row_distance, size
    places = []
    for across in np.arange(start - row_distance * 3, start + row_distance * 4, row_distance):
        for along in np.arange(-reach, reach, spacing) + rng.uniform(0, spacing):
            if rng.random() < 0.12:
                continue
            u, v = along + rng.normal(0, 0.12) * spacing, across + rng.normal(0, 1.6)
            y, x = size / 2 + u * np.sin(angle) + v * np.cos(angle), size / 2 + u * np.cos(angle) - v * np.sin(angle)
            if -stage < y < size + stage and -stage < x < size + stage:
                places.append((float(y), float(x)))
    return places


Sun = tuple[float, float, float]


def _plant(
    rng: Rng, canvas: Canvas, y: float, x: float, radius: float, is_crop: bool, greens: _Greens, sun: Sun
) -> None:
    """A plant with the value of a whole or, where its leaves reach over the border, of a partial one."""
    cut = not (radius < y < canvas.height - radius and radius < x < canvas.width - radius)
    if is_crop:
        _rosette(rng, canvas, y, x, radius, greens, sun, PARTIAL_CROP if cut else CROP)
        return
    kinds: list[Callable[..., None]] = [_grass, _seedling, _lobed]
    kinds[rng.integers(3)](rng, canvas, y, x, radius, greens, sun, PARTIAL_WEED if cut else WEED)


def _rosette(
    rng: Rng, canvas: Canvas, y: float, x: float, radius: float, greens: _Greens, sun: Sun, label: int
) -> None:
    """Broad wavy leaves with a pale midrib on stalks, as a sugar beet's; the youngest lie on top."""
    number, turn = int(rng.integers(5, 10)), rng.uniform(0, 2 * np.pi)
    for k in range(number):
        length = radius * (1.0 - 0.45 * k / number) * rng.uniform(0.85, 1.1)
        angle = turn + k * 2.4 + rng.normal(0, 0.15)
        width, wave = rng.uniform(0.22, 0.3), rng.uniform(0, 6.28)

        def outline(along: Float, w: float = width, phase: float = wave) -> Float:
            t = np.clip((along - 0.25) / 0.75, 0, 1)
            blade = w * np.sqrt(np.clip(np.sin(np.pi * t**0.75), 0, 1)) * (1 + 0.09 * np.sin(22 * t + phase))
            return np.where(along < 0.25, 0.035, blade).astype(np.float32)

        _leaf(rng, canvas, y, x, angle, length, outline, greens.draw(rng), sun, label, rib=0.3)


def _grass(rng: Rng, canvas: Canvas, y: float, x: float, radius: float, greens: _Greens, sun: Sun, label: int) -> None:
    """Narrow blades that point and bend, as a grass weed's."""
    for _ in range(rng.integers(4, 10)):
        length = radius * rng.uniform(0.7, 1.4)
        slim = max(rng.uniform(0.05, 0.09), 1.0 / length)

        def outline(along: Float, w: float = slim) -> Float:
            return (w * np.sqrt(np.clip(1 - along, 0, 1))).astype(np.float32)

        angle = rng.uniform(0, 2 * np.pi)
        bend = float(rng.normal(0, 0.25))
        _leaf(rng, canvas, y, x, angle, length, outline, greens.draw(rng), sun, label, rib=0.1, bend=bend)


def _seedling(
    rng: Rng, canvas: Canvas, y: float, x: float, radius: float, greens: _Greens, sun: Sun, label: int
) -> None:
    """Pairs of small round leaves on thin stalks, crosswise, as a chickweed's."""
    turn, leaf = rng.uniform(0, np.pi), rng.uniform(0.3, 0.42)
    for k in range(int(rng.integers(2, 4)) * 2):
        pair, side = divmod(k, 2)
        reach = radius * (1.0 - 0.28 * pair)

        def outline(along: Float, w: float = leaf) -> Float:
            t = (along - 0.62) / 0.38
            return np.where(along < 0.3, 0.04, w * np.sqrt(np.clip(1 - t**2, 0, 1))).astype(np.float32)

        angle = turn + pair * np.pi / 2 + side * np.pi + rng.normal(0, 0.12)
        _leaf(rng, canvas, y, x, angle, reach, outline, greens.draw(rng), sun, label, rib=0.12)


def _lobed(rng: Rng, canvas: Canvas, y: float, x: float, radius: float, greens: _Greens, sun: Sun, label: int) -> None:
    """Long leaves with deep teeth in a flat rosette, as a dandelion's or thistle's."""
    number, turn, teeth = int(rng.integers(5, 9)), rng.uniform(0, 2 * np.pi), int(rng.integers(3, 6))
    for k in range(number):
        length = radius * rng.uniform(0.85, 1.35)

        def outline(along: Float, n: int = teeth) -> Float:
            saw = np.mod(along * n, 1.0)
            blade: Float = (0.06 + 0.2 * saw * (0.35 + along)) * np.clip(4 * (1.02 - along), 0, 1)
            return blade

        angle = turn + 2 * np.pi * k / number + rng.normal(0, 0.2)
        _leaf(rng, canvas, y, x, angle, length, outline, greens.draw(rng), sun, label, rib=0.22)


def _leaf(
    rng: Rng,
    canvas: Canvas,
    y: float,
    x: float,
    angle: float,
    length: float,
    outline: Callable[[Float], Float],
    colour: Float,
    sun: Sun,
    label: int,
    rib: float,
    bend: float = 0.0,
) -> None:
    """One leaf from its foot at (y, x) outwards; ``outline`` gives half its width at 0..1 of its length."""
    middle_y, middle_x = y + np.sin(angle) * length / 2, x + np.cos(angle) * length / 2
    u, v, top, left = _local(middle_y, middle_x, angle, length)
    along = (u / length + 0.5).astype(np.float32)
    across = v / length - bend * along**2
    half = outline(np.clip(along, 0, 1))
    shape: Bool = (along >= 0) & (along <= 1) & (abs(across) < half)
    down, right, depth = sun
    canvas.shade(top + round(down), left + round(right), np.where(shape, depth, 1.0).astype(np.float32))
    side = across / np.maximum(half, 1e-3)
    veins = 0.07 * np.sin((along * 9 - abs(side) * 1.6) * 6.28)
    tilt = rng.normal(0, 0.13) * np.sign(across) + rng.uniform(-0.25, 0.1) * side**2
    midrib = rib * (abs(across) * length < max(0.05 * length, 0.8) * 0.6)
    grain = 0.06 * rng.standard_normal(shape.shape, np.float32)
    light = np.clip(0.82 + 0.25 * along + veins + tilt + midrib + grain, 0.2, 1.7).astype(np.float32)
    canvas.stamp(top, left, shape.astype(np.float32), colour * light[..., None], label)


def _local(y: float, x: float, angle: float, length: float) -> tuple[Float, Float, int, int]:
    """Coordinates along and across a direction around (y, x), with the patch's top and left."""
    reach = int(length * 0.75) + 3
    top, left = int(y) - reach, int(x) - reach
    rows, columns = grid(2 * reach + 1, 2 * reach + 1)
    dy, dx = rows + np.float32(top - y), columns + np.float32(left - x)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return dx * cos + dy * sin, dy * cos - dx * sin, top, left
