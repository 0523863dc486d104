"""Cell nuclei under the microscope: fluorescence, stained tissue sections and grey transmitted light."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.ndimage import distance_transform_edt, gaussian_filter

from data_prep.scenes.paint import Bool, Float, Rng, UInt8, blend, grid, hsv, noise, overlap, photograph, textured


def paint_nuclei(rng: Rng, size: int) -> tuple[UInt8, list[Bool]]:
    """A micrograph: image uint8 [H, W, 3] and one mask bool [H, W] for each nucleus, disjoint."""
    nuclei = _nuclei(rng, size)
    owner = np.zeros((size, size), np.int32)
    for number, nucleus in enumerate(nuclei, 1):
        owner[nucleus & (owner == 0)] = number
    masks = [owner == number for number in range(1, len(nuclei) + 1)]
    masks = [mask for mask in masks if mask.sum() >= 12]
    stain = rng.choice(["fluorescence", "tissue", "transmitted"], p=[0.5, 0.33, 0.17])
    if stain == "fluorescence":
        image = _fluorescence(rng, size, masks)
    elif stain == "tissue":
        image = _tissue(rng, size, masks)
    else:
        image = _transmitted(rng, size, masks)
    return photograph(rng, image, (0.4, 1.1), (0.008, 0.04)), masks


def _nuclei(rng: Rng, size: int) -> list[Bool]:
    """Outlines in one scale a picture; some lie in clumps where they touch."""
    typical = rng.uniform(5.0, 13.0) * size / 192
    wanted = int(np.clip(rng.uniform(0.1, 0.34) * size * size / (np.pi * typical**2), 5, 55))
    closeness = rng.uniform(0.85, 1.5)
    placed: list[tuple[float, float, float]] = []
    nuclei: list[Bool] = []
    for _ in range(wanted * 8):
        if len(nuclei) == wanted:
            break
        radius = typical * float(np.exp(rng.normal(0, 0.22)))
        if placed and rng.random() < 0.45:
            y0, x0, r0 = placed[rng.integers(len(placed))]
            angle, gap = rng.uniform(0, 2 * np.pi), (r0 + radius) * rng.uniform(0.85, 1.05)
            y, x = y0 + gap * np.sin(angle), x0 + gap * np.cos(angle)
        else:
            y, x = rng.uniform(-0.03 * size, 1.03 * size, 2)
        if any((y - b) ** 2 + (x - a) ** 2 < (0.8 * closeness * (radius + r)) ** 2 * 0.9 for b, a, r in placed):
            continue
        placed.append((y, x, radius))
        nuclei.append(_outline(rng, size, y, x, radius))
    return [nucleus for nucleus in nuclei if nucleus.any()]


def _outline(rng: Rng, size: int, y: float, x: float, radius: float) -> Bool:
    reach = int(2 * radius) + 2
    top, left = int(y) - reach, int(x) - reach
    rows, columns = grid(2 * reach + 1, 2 * reach + 1)
    angle, stretch = rng.uniform(0, np.pi), rng.uniform(1.0, 1.7)
    dy, dx = rows + top - y, columns + left - x
    along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    along, across = along / np.sqrt(stretch), across * np.sqrt(stretch)
    theta = np.arctan2(across, along)
    edge = np.ones_like(theta)
    for k in (2, 3, 4, 5):
        edge += rng.normal(0, 0.09 / k) * np.cos(k * theta + rng.uniform(0, 2 * np.pi))
    inside = np.hypot(along, across) < radius * edge
    whole = np.zeros((size, size), bool)
    here, part = overlap(top, left, inside.shape, whole.shape)
    whole[here] = inside[part]
    return whole


def _inner_depth(masks: list[Bool], size: int) -> Float:
    """0 at a nucleus' border, about 1 in its middle: [H, W]."""
    depth = np.zeros((size, size), np.float32)
    for mask in masks:
        rows, columns = np.nonzero(mask)
        part = np.s_[max(rows.min() - 1, 0) : rows.max() + 2, max(columns.min() - 1, 0) : columns.max() + 2]
        inner = distance_transform_edt(np.pad(mask[part], 1))[1:-1, 1:-1]
        depth[part] = np.where(mask[part], inner / max(inner.max(), 1.0), depth[part])
    return depth


def _field(rng: Rng, masks: list[Bool], size: int, low: float, high: float) -> Float:
    """One random level for each nucleus, 0 outside: [H, W]."""
    levels = np.zeros((size, size), np.float32)
    for mask in masks:
        levels[mask] = rng.uniform(low, high)
    return levels


def _fluorescence(rng: Rng, size: int, masks: list[Bool]) -> Float:
    """Bright nuclei on black, with glow from other planes, faint cell bodies and debris that are no nuclei."""
    brightest = rng.uniform(0.3, 0.95)
    chromatin = 1 + rng.uniform(0.05, 0.3) * noise(rng, size, size, rng.uniform(4, 9), 3)
    depth = _inner_depth(masks, size)
    nuclei = _field(rng, masks, size, 0.3 * brightest, brightest) * chromatin * (0.6 + 0.4 * np.sqrt(depth))
    light: Float = gaussian_filter(nuclei, rng.uniform(0.4, 1.4)) + 0.25 * gaussian_filter(nuclei, rng.uniform(5, 14))
    rows, columns = grid(size, size)
    for _ in range(rng.integers(0, 7)):  # nuclei far out of focus: a glow without a border
        y, x, spread = *rng.uniform(0, size, 2), rng.uniform(7, 24)
        glow = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * spread**2))
        light += rng.uniform(0.08, 0.4) * brightest * glow
    if rng.random() < 0.5:
        bodies = np.clip(noise(rng, size, size, 36, 4), 0, 2)
        light += rng.uniform(0.03, 0.14) * bodies * brightest
    for _ in range(rng.integers(0, 14)):  # debris: bright and small
        y, x, spread = *rng.uniform(0, size, 2), rng.uniform(0.6, 1.8)
        light += rng.uniform(0.2, 0.8) * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * spread**2))
    light += np.float32(rng.uniform(0.01, 0.12)) * (1 + 0.3 * noise(rng, size, size, 120, 2))
    tint = hsv(rng.uniform(0.3, 0.72), rng.choice([0.0, 0.0, 0.75]), 1.0)
    image: Float = np.clip(light, 0, 1)[..., None] * tint
    return image.astype(np.float32)


def _tissue(rng: Rng, size: int, masks: list[Bool]) -> Float:
    """A stained section: pink fibres and cell bodies, white gaps, purple nuclei, red blood cells as decoys."""
    pink = hsv(rng.uniform(0.84, 0.96), rng.uniform(0.15, 0.5), rng.uniform(0.75, 0.97))
    pale = hsv(rng.uniform(0.8, 1.0), rng.uniform(0.02, 0.1), 0.96)
    fibres = noise(rng, size, size, 14, 4, rng.uniform(1.5, 4.0))
    if rng.random() < 0.5:
        fibres = np.ascontiguousarray(fibres.T)
    cover = 1 / (1 + np.exp(-3 * (noise(rng, size, size, 50, 4) + rng.uniform(-0.3, 1.8))))
    image = blend(np.broadcast_to(pale, (size, size, 3)), textured(pink, fibres, 0.08), cover.astype(np.float32))
    rows, columns = grid(size, size)
    for _ in range(rng.integers(0, 12)):  # red blood cells: round, of a nucleus' size, without a nucleus
        y, x, r = *rng.uniform(0, size, 2), rng.uniform(5, 9)
        disc = np.clip((r - np.hypot(rows - y, columns - x)) * 1.2, 0, 1) * rng.uniform(0.4, 0.85)
        image = blend(image, hsv(rng.uniform(0.95, 1.03), 0.6, 0.85), disc.astype(np.float32))
    for _ in range(rng.integers(0, 6)):  # purple smears out of focus
        y, x, spread = *rng.uniform(0, size, 2), rng.uniform(6, 16)
        smear = 0.5 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * spread**2))
        image = blend(image, hsv(0.77, 0.35, 0.7), smear.astype(np.float32))
    hue, dark = rng.uniform(0.68, 0.82), rng.uniform(0.3, 0.6)
    depth = _inner_depth(masks, size)
    chromatin = noise(rng, size, size, rng.uniform(3, 7), 3)
    levels = _field(rng, masks, size, 0.7, 1.4)
    body = textured(hsv(hue, rng.uniform(0.3, 0.65), dark), chromatin, 0.2) * levels[..., None]
    rim = np.where(depth < 0.3, 0.8, 1.0 + 0.25 * rng.random())
    union = gaussian_filter((levels > 0).astype(np.float32), 0.6) * rng.uniform(0.7, 0.97)
    return blend(image, np.clip(body * rim[..., None], 0, 1).astype(np.float32), union)


def _transmitted(rng: Rng, size: int, masks: list[Bool]) -> Float:
    """Unstained or lightly stained cells on a bright grey field: nuclei a little darker, with a rim."""
    grey: npt.NDArray[np.floating] = np.full((size, size), rng.uniform(0.55, 0.85))
    grey *= 1 + 0.05 * noise(rng, size, size, 110, 2) + 0.04 * noise(rng, size, size, 8, 3)
    bodies = np.clip(noise(rng, size, size, 40, 4), -0.5, 1.5)
    grey -= rng.uniform(0.02, 0.09) * bodies
    rows, columns = grid(size, size)
    for _ in range(rng.integers(1, 7)):  # bubbles and dust: rings and dark specks
        y, x, r = *rng.uniform(0, size, 2), rng.uniform(2, 11)
        ring = np.exp(-((np.hypot(rows - y, columns - x) - r) ** 2) / 1.5)
        grey += rng.uniform(-0.35, 0.2) * ring
    depth = _inner_depth(masks, size)
    levels = _field(rng, masks, size, 0.35, 1.0)
    contrast = rng.uniform(0.2, 0.45)
    chromatin = 1 + 0.35 * noise(rng, size, size, 5, 3)
    grey -= contrast * gaussian_filter(levels * chromatin * np.where(depth < 0.25, 1.35, 0.85), 0.7)
    tint = np.array([1.0, 1.0, 1.0] if rng.random() < 0.5 else rng.uniform(0.85, 1.0, 3), np.float32)
    image: Float = np.clip(grey, 0, 1)[..., None] * tint
    return image.astype(np.float32)
