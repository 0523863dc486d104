"""Land cover from above at about 0.3 to 1 m a pixel: parcels, woods, water, bare ground, roads, buildings."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import distance_transform_edt

from data_prep.scenes.paint import Bool, Canvas, Float, Rng, UInt8, grid, hsv, noise, overlap, photograph, textured

# LoveDA mask values
NO_DATA, BACKGROUND, BUILDING, ROAD, WATER, BARREN, FOREST, AGRICULTURAL = range(8)


def paint_landcover(rng: Rng, size: int, urban: bool) -> tuple[UInt8, UInt8]:
    """A tile: image uint8 [H, W, 3], mask uint8 [H, W] of LoveDA values."""
    canvas = Canvas.empty(size, size, BACKGROUND)
    zones, turn = _zones(rng, size, urban), rng.uniform(0, np.pi)
    canvas.image[:] = _meadow(rng, size)
    for zone, label in zones:
        _fill(rng, canvas, zone, label, turn)
    _scattered_trees(rng, canvas)
    if rng.random() < 0.55:
        canvas.cover(_water(rng, size), _water_surface(rng, size), WATER)
    roads = _roads(rng, canvas, urban, turn)
    _buildings(rng, canvas, roads, urban, turn)
    canvas.image *= (1 + 0.05 * noise(rng, size, size, 90, 2))[..., None] * rng.uniform(0.85, 1.25)
    image = photograph(rng, canvas.image, (0.3, 0.9), (0.006, 0.03))
    if rng.random() < 0.15:
        _cut_off(rng, image, canvas.labels)
    return image, canvas.labels


def _turned(size: int, angle: float) -> tuple[Float, Float]:
    rows, columns = grid(size, size)
    along = columns * np.cos(angle) + rows * np.sin(angle)
    return along.astype(np.float32), (rows * np.cos(angle) - columns * np.sin(angle)).astype(np.float32)


def _zones(rng: Rng, size: int, urban: bool) -> list[tuple[Bool, int]]:
    """A division of the tile around random seeds with ragged borders, each with a class."""
    count = int(rng.integers(7, 14))
    seeds = rng.uniform(0, size, (count, 2)).astype(np.float32)
    rows, columns = grid(size, size)
    rows = rows + 5 * noise(rng, size, size, 40, 3)
    columns = columns + 5 * noise(rng, size, size, 40, 3)
    nearest_seed = np.argmin([(rows - y) ** 2 + (columns - x) ** 2 for y, x in seeds], axis=0)
    shares = [0.44, 0.2, 0.16, 0.2] if urban else [0.18, 0.18, 0.26, 0.38]
    labels = rng.choice([BACKGROUND, BARREN, FOREST, AGRICULTURAL], count, p=shares)
    return [(nearest_seed == i, int(label)) for i, label in enumerate(labels) if label != BACKGROUND]


def _fill(rng: Rng, canvas: Canvas, zone: Bool, label: int, turn: float) -> None:
    size = canvas.height
    if label == FOREST:
        _wood(rng, canvas, zone)
    elif label == BARREN:
        canvas.cover(zone, _bare(rng, size), BARREN)
    else:
        canvas.cover(zone, _crops(rng, size, turn), AGRICULTURAL)


def _meadow(rng: Rng, size: int) -> Float:
    """Grass, yards and waste ground: mottled, without order."""
    base = hsv(rng.uniform(0.1, 0.32), rng.uniform(0.12, 0.42), rng.uniform(0.35, 0.6))
    return textured(base, 0.7 * noise(rng, size, size, 30, 5) + 0.5 * noise(rng, size, size, 3, 2), 0.13)


def _crops(rng: Rng, size: int, turn: float) -> Float:
    """A ploughed, growing or ripe field: fine parallel rows, tram lines, an even tone."""
    angle = turn + rng.choice([0.0, np.pi / 2]) + rng.normal(0, 0.06)
    _, across = _turned(size, angle)
    pitch = rng.uniform(3.0, 7.5)
    across = across + 0.8 * noise(rng, size, size, 60, 2)
    rows = np.sin(across * 2 * np.pi / pitch) * (1 + 0.3 * noise(rng, size, size, 20, 2))
    tram = np.mod(across, pitch * rng.uniform(4, 8)) < 1.4
    hue = rng.choice([0.08, 0.11, 0.14, 0.2, 0.25, 0.3, 0.35]) + rng.normal(0, 0.015)
    base = hsv(hue, rng.uniform(0.2, 0.5), rng.uniform(0.32, 0.72))
    uneven = noise(rng, size, size, 50, 3) * 0.06 + noise(rng, size, size, 2, 1) * 0.04
    texture = rows * rng.uniform(0.08, 0.2) + uneven - 0.18 * tram
    return textured(base, texture.astype(np.float32), 1.0)


def _bare(rng: Rng, size: int) -> Float:
    """Sand, rubble, earth works: smooth drifts with stones and wheel ruts."""
    base = hsv(rng.uniform(0.03, 0.15), rng.uniform(0.08, 0.38), rng.uniform(0.42, 0.8))
    drifts = noise(rng, size, size, 60, 2) * 0.12 + noise(rng, size, size, 9, 4) * 0.05
    stones = np.where(noise(rng, size, size, 2.5, 2) > 2.0, rng.choice([-0.3, 0.25]), 0.0)
    _, across = _turned(size, rng.uniform(0, np.pi))
    across = across + 12 * noise(rng, size, size, 70, 2)
    ruts = np.where(np.mod(across, rng.uniform(30, 80)) < 2.0, -0.12, 0.0)
    return textured(base, (drifts + stones + ruts).astype(np.float32), 1.0)


def _wood(rng: Rng, canvas: Canvas, zone: Bool) -> None:
    """Crowns side by side, each lit from one side, with dark gaps between."""
    size = canvas.height
    spacing = rng.uniform(4.5, 10.0)
    number = int(size * size / spacing**2 * 1.2)
    tops = np.ones((size, size), bool)
    ys, xs = rng.integers(0, size, (2, number))
    tops[ys, xs] = False
    distance, (ty, tx) = distance_transform_edt(tops, return_indices=True)
    rows, columns = grid(size, size)
    dome = np.sqrt(np.clip(1 - (distance / (spacing * 0.85)) ** 2, 0, 1))
    lit = ((tx - columns) + (ty - rows)) / spacing
    tone = rng.normal(0, 0.16, (size, size)).astype(np.float32)[ty, tx]
    base = hsv(rng.uniform(0.16, 0.4), rng.uniform(0.25, 0.55), rng.uniform(0.3, 0.52))
    light = 0.35 + 0.75 * dome + 0.35 * lit * dome + tone + 0.1 * noise(rng, size, size, 2.5, 2)
    canvas.cover(zone, base * np.clip(light, 0.12, 1.8)[..., None], FOREST)


def _scattered_trees(rng: Rng, canvas: Canvas) -> None:
    """Single trees in yards: too small to be a wood, so they keep the label below them."""
    for _ in range(rng.integers(0, 14)):
        r = rng.uniform(2.5, 5.0)
        y, x = rng.uniform(0, canvas.height, 2)
        n = int(2 * r + 3)
        rows, columns = grid(n, n)
        radius = np.hypot(rows - n / 2, columns - n / 2)
        canvas.shade(int(y) + 2, int(x) + 2, (1 - 0.45 * (radius < r)).astype(np.float32))
        base = hsv(rng.uniform(0.18, 0.38), 0.45, rng.uniform(0.25, 0.5))
        light = 1.2 - 0.5 * (rows + columns) / (2 * n) + 0.2 * noise(rng, n, n, 3, 2)
        canvas.stamp(int(y), int(x), (radius < r).astype(np.float32), base * light[..., None], None)


def _water(rng: Rng, size: int) -> Bool:
    if rng.random() < 0.6:  # a river
        along, across = _turned(size, rng.uniform(0, np.pi))
        middle = (across.min() + across.max()) / 2 + rng.uniform(-0.3, 0.3) * size
        bends = rng.uniform(8, 26) * np.sin(along / rng.uniform(20, 50) + rng.uniform(0, 6))
        edge = rng.uniform(9, 24) + 2.0 * noise(rng, size, size, 18, 3)
        river: Bool = abs(across - middle - bends) < edge
        return river
    rows, columns = grid(size, size)
    y, x = rng.uniform(0.15, 0.85, 2) * size
    pond: Bool = np.hypot(rows - y, columns - x) + 9 * noise(rng, size, size, 45, 3) < rng.uniform(22, 55)
    return pond


def _water_surface(rng: Rng, size: int) -> Float:
    """Smooth and even, from black over green and muddy to blue, at times with sun glint."""
    base = hsv(
        rng.choice([0.1, 0.25, 0.4, 0.52, 0.6]) + rng.normal(0, 0.03), rng.uniform(0.1, 0.5), rng.uniform(0.12, 0.6)
    )
    depth = 0.1 * noise(rng, size, size, 80, 2) + 0.03 * noise(rng, size, size, 5, 2, 2.5)
    glint = np.clip(noise(rng, size, size, 60, 2) - 1.0, 0, 1) * rng.choice([0.0, 0.35])
    surface: Float = textured(base, depth, 1.0) + glint[..., None]
    return surface


def _roads(rng: Rng, canvas: Canvas, urban: bool, turn: float) -> Bool:
    """Straight streets in a grid, or country roads that wind; lanes, worn tone, a few cars without a class."""
    size = canvas.height
    where = np.zeros((size, size), bool)
    tone = hsv(rng.uniform(0.05, 0.65), rng.uniform(0.02, 0.2), rng.uniform(0.35, 0.78))
    for i in range(rng.integers(2, 5) if urban else rng.integers(1, 3)):
        along, across = _turned(size, turn + (np.pi / 2) * (i % 2) + rng.normal(0, 0.04))
        middle = rng.uniform(0.1, 0.9) * (across.max() - across.min()) + across.min()
        winding = 0.0 if urban else rng.uniform(4, 20) * np.sin(along / rng.uniform(30, 60) + rng.uniform(0, 6))
        half = rng.uniform(3.2, 6.5) if urban else rng.uniform(2.2, 4.2)
        offset = across - middle - winding
        road = abs(offset) < half
        canvas.image[(abs(offset) < half + 1.2) & ~road] *= rng.uniform(0.8, 1.25)
        wear = noise(rng, size, size, 12, 3) * 0.06 + 0.08 * np.cos(offset / half * 3)
        canvas.cover(road, textured(tone, wear, 1.0), ROAD)
        if half > 4.0 and rng.random() < 0.7:
            marks = (abs(offset) < 0.5) & (np.mod(along, 9) < 5)
            canvas.image[marks] = canvas.image[marks] * 0.4 + 0.5
        cars = road & (abs(abs(offset) - half * 0.5) < 1.1) & (np.mod(along + 37 * np.sign(offset), 43) < 4.0)
        if rng.random() < 0.6:
            canvas.image[cars] = hsv(rng.random(), rng.random() * 0.7, rng.uniform(0.2, 1.0))
        where |= road
    return where


def _buildings(rng: Rng, canvas: Canvas, roads: Bool, urban: bool, turn: float) -> None:
    """Blocks along the grid's directions, off roads and water, each with a shadow and a roof of its own."""
    size = canvas.height
    taken = roads | (canvas.labels == WATER)
    clearance = distance_transform_edt(~taken)
    sun = rng.uniform(0, 2 * np.pi)
    tones = [(0.02, 0.5), (0.05, 0.35), (0.1, 0.15), (0.6, 0.12), (0.58, 0.45), (0.3, 0.08)]
    for _ in range(rng.integers(28, 60) if urban else rng.integers(6, 20)):
        y, x = rng.uniform(0, size, 2)
        half_long, half_wide = rng.uniform(5, 17) if urban else rng.uniform(4, 11), rng.uniform(3.5, 8.0)
        reach = int(np.hypot(half_long, half_wide)) + 2
        top, left = int(y) - reach, int(x) - reach
        if clearance[min(int(y), size - 1), min(int(x), size - 1)] < half_wide + 1.5:
            continue
        angle = turn + rng.choice([0.0, np.pi / 2]) + rng.normal(0, 0.03)
        rows, columns = grid(2 * reach + 1, 2 * reach + 1)
        dy, dx = rows - reach, columns - reach
        u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
        block = (abs(u) < half_long) & (abs(v) < half_wide)
        if rng.random() < 0.25:
            block &= ~((u > 0) & (v > 0))
        here, part = overlap(top, left, block.shape, taken.shape)
        if (taken[here] & block[part]).any():
            continue
        taken[here] |= block[part]
        high = rng.uniform(1.5, 7.0)
        for step in np.linspace(0.3, 1.0, 4):
            down, right = round(high * step * np.sin(sun)), round(high * step * np.cos(sun))
            canvas.shade(top + down, left + right, np.where(block, 0.8, 1.0).astype(np.float32))
        hue, saturation = tones[rng.integers(len(tones))]
        roof = hsv(hue + rng.normal(0, 0.02), saturation * rng.uniform(0.4, 1.2), rng.uniform(0.35, 0.95))
        colour = textured(roof, _roof(rng, u, v, half_wide, sun - angle), 1.0)
        canvas.stamp(top, left, block.astype(np.float32), colour, BUILDING)


def _roof(rng: Rng, u: Float, v: Float, half_wide: float, sun: float) -> Float:
    """Light on a roof: two slopes and a ridge, or flat with a parapet and boxes."""
    grain = noise(rng, u.shape[0], u.shape[1], 4, 2) * 0.05
    if rng.random() < 0.6:
        slopes = 0.22 * np.sign(v) * np.sign(np.sin(sun) + 1e-6) - 0.25 * (abs(v) < 0.6)
        light = slopes + 0.05 * np.sin(u * 2.2)
    else:
        boxes = (abs(np.mod(u, 7) - 3.5) < 1.2) & (abs(v) < 1.5)
        light = np.where(abs(v) > half_wide - 1.0, 0.18, 0.0) - 0.3 * boxes * (rng.random() < 0.6)
    return np.asarray(light + grain, np.float32)


def _cut_off(rng: Rng, image: UInt8, labels: UInt8) -> None:
    """A corner outside the survey: black, without data."""
    _, across = _turned(labels.shape[0], rng.uniform(0.2, 1.3) + rng.choice([0.0, np.pi / 2, np.pi]))
    low, high = float(across.min()), float(across.max())
    outside = across < low + (high - low) * rng.uniform(0.08, 0.25)
    image[outside] = 0
    labels[outside] = NO_DATA
