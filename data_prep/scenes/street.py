"""Street scenes in perspective: walls, road and pavements by ray casting, objects pasted from far to near."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.scenes.paint import (
    Bool,
    Canvas,
    Float,
    Rng,
    UInt8,
    blend,
    grid,
    hsv,
    noise,
    photograph,
    textured,
)
from data_prep.scenes.street_objects import Place, paint_objects

# Cityscapes labelIds
UNLABELED, EGO_VEHICLE = 0, 1
ROAD, SIDEWALK, BUILDING, VEGETATION, TERRAIN, SKY = 7, 8, 11, 21, 22, 23

FAR_M = 75.0


@dataclass(frozen=True)
class Season:
    """What sets one corpus of streets apart from another."""

    leaf_hues: tuple[float, ...]
    leaf_saturation: float
    wall_hues: tuple[float, ...]
    wall_saturation: float
    ground_hue: float
    ground_saturation: float
    light: tuple[float, float, float]
    snow: float
    """Share of the ground's texture that lies under snow."""


SUMMER = Season((0.2, 0.25, 0.3, 0.36, 0.12), 0.55, (0.02, 0.06, 0.1, 0.14, 0.55, 0.62), 0.35, 0.6, 0.06,
                (1.0, 1.0, 1.0), 0.0)  # fmt: skip
LATE_AUTUMN = Season((0.04, 0.08, 0.11, 0.16, 0.22), 0.6, (0.0, 0.08, 0.12, 0.45, 0.58), 0.45, 0.1, 0.12,
                     (1.05, 0.95, 0.86), 0.25)  # fmt: skip


def paint_street(rng: Rng, height: int, width: int, season: Season) -> tuple[UInt8, UInt8]:
    """A street scene: image uint8 [H, W, 3], mask uint8 [H, W] of Cityscapes labelIds."""
    view = _View.draw(rng, height, width)
    canvas = Canvas.empty(height, width, UNLABELED)
    depth = np.full((height, width), FAR_M * 2, np.float32)
    _sky(rng, canvas, view)
    _skyline(rng, canvas, view, depth, season)
    for side in (-1, 1):
        _side(rng, canvas, view, depth, season, side)
    _ground(rng, canvas, view, depth, season)
    haze = hsv(rng.uniform(0.05, 0.65), rng.uniform(0.0, 0.15), rng.uniform(0.6, 0.9) * view.light)
    density = rng.choice([0.002, 0.005, 0.014])
    fog = np.where(canvas.labels == SKY, 0.0, 1.0 - np.exp(-density * depth)).astype(np.float32)
    canvas.image = blend(canvas.image, haze, fog)
    place = Place(view.focal, view.horizon, view.centre, view.eye, view.light, haze, density, view.left, view.right,
                  view.wall_left, view.wall_right)  # fmt: skip
    paint_objects(rng, canvas, place, season.leaf_hues, season.leaf_saturation)
    if rng.random() < 0.15:
        _bonnet(rng, canvas)
    canvas.image *= np.array(season.light, np.float32) * view.tint
    return photograph(rng, canvas.image, (0.3, 0.75), (0.006, 0.035)), canvas.labels


@dataclass(frozen=True)
class _View:
    """Camera and street. Lengths in metres, ``focal``, ``horizon`` and ``centre`` in pixels."""

    rows: Float
    columns: Float
    focal: float
    horizon: float
    centre: float
    eye: float
    left: float
    right: float
    wall_left: float
    wall_right: float
    light: float
    tint: Float
    sun_side: int

    @classmethod
    def draw(cls, rng: Rng, height: int, width: int) -> _View:
        rows, columns = grid(height, width)
        aside = rng.uniform(-2.0, 2.0)
        left, right = aside - rng.uniform(2.3, 5.0), aside + rng.uniform(2.3, 5.0)
        evening = rng.random() < 0.2
        tint = np.array([1.12, 0.96, 0.82] if evening else [1.0, 1.0, 1.0], np.float32)
        return cls(
            rows,
            columns,
            focal=width * rng.uniform(0.75, 1.25),
            horizon=height * rng.uniform(0.42, 0.6),
            centre=width * rng.uniform(0.32, 0.68),
            eye=rng.uniform(1.3, 2.1),
            left=left,
            right=right,
            wall_left=left - rng.uniform(2.2, 5.0),
            wall_right=right + rng.uniform(2.2, 5.0),
            light=rng.uniform(0.75, 1.1),
            tint=tint,
            sun_side=int(rng.choice([-1, 1])),
        )


def _sky(rng: Rng, canvas: Canvas, view: _View) -> None:
    height, width = canvas.labels.shape
    mood = rng.random()
    if mood < 0.5:  # clear to cloudy
        top, low = hsv(rng.uniform(0.54, 0.64), rng.uniform(0.3, 0.7), 0.8), hsv(0.57, 0.12, 1.0)
    elif mood < 0.8:  # overcast
        top, low = hsv(0.6, 0.08, rng.uniform(0.6, 0.9)), hsv(0.1, 0.04, 0.92)
    else:  # evening
        top, low = hsv(rng.uniform(0.58, 0.72), 0.4, 0.55), hsv(rng.uniform(0.03, 0.12), 0.5, 1.0)
    ramp = np.clip(view.rows / view.horizon, 0.0, 1.0) ** 1.3
    sky = blend(top, low, ramp)
    clouds = 1 / (1 + np.exp(-3.0 * (noise(rng, height, width, 40, 5, 2.5) - rng.uniform(-0.3, 1.6))))
    cloud_colour = hsv(rng.uniform(0, 1), 0.05, rng.uniform(0.6, 1.0))
    canvas.image[:] = blend(sky, cloud_colour, (clouds * 0.85).astype(np.float32)) * (0.25 + 0.75 * view.light)
    canvas.labels[:] = SKY


def _skyline(rng: Rng, canvas: Canvas, view: _View, depth: Float, season: Season) -> None:
    """What closes the street at its end: trees, or a row of houses across."""
    height, width = canvas.labels.shape
    if rng.random() < 0.5:
        line = noise(rng, 1, width, 30, 4)[0] * 3.0 + rng.uniform(6, 18)
        where = (view.rows > view.horizon - line[None]) & (view.rows < view.horizon + 3)
        canvas.cover(where, _foliage(rng, height, width, season, 5.0) * view.light, VEGETATION)
    else:
        block = np.floor((view.columns + rng.uniform(0, 60)) / rng.uniform(22, 60)).astype(int)
        tops = rng.uniform(8, 34, block.max() + 1).astype(np.float32)
        where = (view.rows > view.horizon - tops[block]) & (view.rows < view.horizon + 3)
        hues = rng.choice(season.wall_hues, block.max() + 1)
        colours = np.stack([hsv(h, season.wall_saturation * rng.random(), rng.uniform(0.35, 0.8)) for h in hues])
        walls = colours[block] * view.light
        window = (np.mod(view.columns, 7) < 3) & (np.mod(view.rows - view.horizon, 8) < 4)
        canvas.cover(where, walls * np.where(window, 0.6, 1.0)[..., None], BUILDING)
    depth[where] = FAR_M


def _side(rng: Rng, canvas: Canvas, view: _View, depth: Float, season: Season, side: int) -> None:
    """The row of house fronts and hedges along one side, on the plane at the wall's lateral distance."""
    distance = abs(view.wall_left if side < 0 else view.wall_right)
    middle = int(view.centre)
    half = np.s_[:, :middle] if side < 0 else np.s_[:, middle:]
    offset = np.maximum((view.columns[half] - view.centre) * side, 0.5)
    along = (view.focal * distance / offset).astype(np.float32)
    up = (view.eye - (view.rows[half] - view.horizon) * along / view.focal).astype(np.float32)
    bounds = np.cumsum(rng.uniform(7.0, 18.0, 14)).astype(np.float32)
    plot = np.minimum(np.searchsorted(bounds, along), 13)
    is_house = rng.random(14) < rng.choice([0.5, 0.9])
    tops = np.where(is_house, rng.uniform(4.5, 13.0, 14), rng.uniform(1.0, 4.5, 14)).astype(np.float32)
    ragged = noise(rng, along.shape[0], along.shape[1], 12, 3) * np.where(is_house, 0.0, 0.35).astype(np.float32)[plot]
    visible = (along < FAR_M) & (up >= 0) & (up <= tops[plot] * (1 + ragged))
    facing = np.float32((1.05 if side != view.sun_side else rng.uniform(0.5, 0.75)) * view.light)
    walls = _facades(rng, season, plot, along, up, tops, bounds)
    leaves = _foliage(rng, along.shape[0], along.shape[1], season, 7.0)
    sight = Canvas(canvas.image[half], canvas.labels[half])
    for k in range(int(plot[along < FAR_M].max()), -1, -1):
        start = float(bounds[k - 1]) if k else 0.0
        here = plot == k
        if is_house[k] and start > 3.0:
            _gable(rng, canvas, view, depth, side * distance, start, float(tops[k]), walls[here])
        where = visible & here
        paint = (walls if is_house[k] else leaves)[where] * facing
        sight.image[where] = paint
        sight.labels[where] = BUILDING if is_house[k] else VEGETATION
        depth[half][where] = along[where]


def _gable(
    rng: Rng, canvas: Canvas, view: _View, depth: Float, lateral: float, start: float, top: float, wall: Float
) -> None:
    """The end wall of a house, which faces the camera where the plot before it is lower."""
    edge = view.centre + view.focal * lateral / start
    outer = edge + np.sign(lateral) * view.focal * rng.uniform(6.0, 12.0) / start
    left, right = (int(np.clip(c, 0, canvas.width)) for c in sorted((edge, outer)))
    scale = view.focal / start
    upper = int(np.clip(view.horizon + (view.eye - top) * scale, 0, canvas.height))
    lower = int(np.clip(view.horizon + view.eye * scale, 0, canvas.height))
    if left >= right or upper >= lower or not len(wall):
        return
    size = (lower - upper, right - left)
    plaster = np.median(wall[:: max(len(wall) // 200, 1)], axis=0).astype(np.float32)
    light = np.float32(view.light * rng.uniform(0.65, 1.0))
    canvas.image[upper:lower, left:right] = textured(plaster * light, noise(rng, size[0], size[1], 14, 4), 0.06)
    canvas.labels[upper:lower, left:right] = BUILDING
    depth[upper:lower, left:right] = start


def _facades(
    rng: Rng,
    season: Season,
    plot: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    along: Float,
    up: Float,
    tops: Float,
    bounds: Float,
) -> Float:
    """Plaster or brick with rows of windows, a ground floor, a cornice: [H, W, 3]."""
    height, width = along.shape
    walls = np.stack(
        [
            hsv(
                rng.choice(season.wall_hues) + rng.normal(0, 0.02),
                season.wall_saturation * rng.uniform(0.1, 1.3),
                rng.uniform(0.3, 0.95),
            )
            for _ in tops
        ]
    )
    pitch, floor = _each(rng, tops, 1.8, 3.6), _each(rng, tops, 2.5, 3.4)
    across, storey = (bounds[plot] - along) / pitch[plot], up / floor[plot]
    in_column, in_row = np.mod(across, 1.0), np.mod(storey, 1.0)
    wide, high = _each(rng, tops, 0.3, 0.7)[plot], _each(rng, tops, 0.4, 0.65)[plot]
    glass = (np.abs(in_column - 0.5) < wide / 2) & (np.abs(in_row - 0.52) < high / 2) & (up < tops[plot] - 0.5)
    frame = (np.abs(in_column - 0.5) < wide / 2 + 0.06) & (np.abs(in_row - 0.52) < high / 2 + 0.05)
    cell = (plot * 131 + across.astype(int) * 17 + storey.astype(int) * 57) % 97
    pane = rng.uniform(0.08, 0.6, 97).astype(np.float32)[cell]
    brick = 1.0 - np.float32(0.12) * ((np.mod(up * 3.0, 1.0) < 0.22) & (along < 14))
    colour = walls[plot] * (brick * (1 + 0.07 * noise(rng, height, width, 24, 4)))[..., None]
    clear = np.clip(28.0 / along - 0.15, 0.0, 1.0).astype(np.float32)
    relief = np.where(frame & ~glass, 1.25, 1.0) * np.where((up > tops[plot] - 0.4) | (up < 0.5), 0.72, 1.0)
    trim = colour * relief.astype(np.float32)[..., None]
    panes = pane[..., None] * np.array([0.85, 0.95, 1.1], np.float32)
    return blend(trim, panes, (glass * clear).astype(np.float32))


def _each(rng: Rng, plots: Float, low: float, high: float) -> Float:
    return rng.uniform(low, high, len(plots)).astype(np.float32)


def _foliage(rng: Rng, height: int, width: int, season: Season, cell: float) -> Float:
    hue = rng.choice(season.leaf_hues) + rng.normal(0, 0.015)
    base = hsv(hue, season.leaf_saturation * rng.uniform(0.5, 1.2), rng.uniform(0.3, 0.6))
    return np.clip(textured(base, noise(rng, height, width, cell, 3), 0.33), 0.02, 1.0)


def _ground(rng: Rng, canvas: Canvas, view: _View, depth: Float, season: Season) -> None:
    """Road with marks, kerbs, paved or grassy sides, and the shadow of the houses on the sunny side."""
    below = view.rows - view.horizon
    along = (view.focal * view.eye / np.maximum(below, 0.4)).astype(np.float32)
    lateral = ((view.columns - view.centre) * along / view.focal).astype(np.float32)
    ground = (below > 0) & (lateral > view.wall_left) & (lateral < view.wall_right)
    road = ground & (lateral > view.left) & (lateral < view.right)
    coarse, fine = _laid_out(rng, lateral, along, 3.0), _laid_out(rng, lateral, along, 24.0)
    tone = rng.uniform(0.22, 0.55)
    asphalt = hsv(season.ground_hue + rng.normal(0, 0.08), season.ground_saturation * rng.uniform(0.2, 1.6), tone)
    road_light = 1.0 + 0.1 * coarse + 0.09 * fine - np.float32(0.25) * (coarse > 1.5)
    canvas.cover(road, asphalt * np.float32(view.light) * road_light[..., None], ROAD)
    _marks(rng, canvas, view, road, lateral, along, fine)
    side = ground & ~road
    flag = rng.uniform(0.5, 1.2)
    joints = (np.mod(lateral / flag, 1.0) < 0.09) | (np.mod(along / flag, 1.0) < 0.09)
    stone = hsv(rng.uniform(0.03, 0.65), rng.uniform(0.0, 0.2), tone * rng.uniform(0.85, 1.7))
    paved_light = (1.0 + 0.07 * coarse + 0.07 * fine) * (1 - np.float32(0.2) * (joints & (along < 14)))
    canvas.cover(side, stone * np.float32(view.light) * paved_light[..., None], SIDEWALK)
    kerb = ground & (np.minimum(abs(lateral - view.left), abs(lateral - view.right)) < 0.12)
    canvas.image[kerb] *= 1.25
    if rng.random() < 0.3:
        edge = view.right + rng.uniform(0.8, 1.6)
        verge = ground & (lateral > view.right + 0.15) & (lateral < edge + 0.2 * coarse)
        canvas.cover(verge, _foliage(rng, canvas.height, canvas.width, season, 3.0) * view.light, TERRAIN)
    if season.snow and rng.random() < 0.6:
        drift = ground & (coarse + 0.6 * fine > 1.9 - 2.5 * season.snow) & ~(road & (abs(lateral) < 1.5))
        canvas.image[drift] = canvas.image[drift] * 0.35 + 0.62 * view.light
    _shadow(rng, canvas, view, ground, lateral, along)
    depth[ground] = along[ground]


def _laid_out(rng: Rng, lateral: Float, along: Float, per_m: float) -> Float:
    """Noise that lies on the ground: it shrinks with distance."""
    size = 256
    texture = noise(rng, size, size, 8, 3)
    u, v = (lateral * per_m).astype(int) % size, (along * per_m).astype(int) % size
    near: Float = texture[v, u] * np.clip(200.0 / (along * per_m), 0.15, 1.0).astype(np.float32)
    return near


def _marks(rng: Rng, canvas: Canvas, view: _View, road: Bool, lateral: Float, along: Float, fine: Float) -> None:
    middle = (view.left + view.right) / 2
    dash = np.mod(along + rng.uniform(0, 6), 6.0) < rng.uniform(2.0, 6.5)
    marks = (abs(lateral - middle) < 0.1) & dash
    if rng.random() < 0.6:
        marks |= np.minimum(abs(lateral - view.left - 0.5), abs(lateral - view.right + 0.5)) < 0.08
    if rng.random() < 0.25:
        start = rng.uniform(5.0, 11.0)
        marks |= (along > start) & (along < start + 3.0) & (np.mod(lateral, 1.0) < 0.5)
    marks &= road & (fine < 1.2)
    if rng.random() < 0.85:
        canvas.image[marks] = canvas.image[marks] * 0.25 + rng.uniform(0.5, 0.75) * view.light


def _shadow(rng: Rng, canvas: Canvas, view: _View, ground: Bool, lateral: Float, along: Float) -> None:
    if rng.random() < 0.35:
        return
    reach = rng.uniform(1.5, 8.0)
    steps = np.floor(along / rng.uniform(6, 14)).astype(int) % 8
    edge = reach * rng.uniform(0.5, 1.2, 8).astype(np.float32)[steps]
    if view.sun_side > 0:
        shaded = ground & (lateral > view.wall_right - edge)
    else:
        shaded = ground & (lateral < view.wall_left + edge)
    canvas.image[shaded] *= rng.uniform(0.5, 0.75)


def _bonnet(rng: Rng, canvas: Canvas) -> None:
    """The camera's own car at the lower border, as in Cityscapes without a class."""
    rows, columns = grid(canvas.height, canvas.width)
    rise = canvas.height * rng.uniform(0.04, 0.09)
    where = rows > canvas.height - rise * (1 - ((columns / canvas.width - 0.5) * 1.7) ** 2)
    colour = hsv(rng.random(), rng.uniform(0, 0.5), rng.uniform(0.1, 0.7))
    sheen = (rows - canvas.height + rise) / rise
    canvas.cover(where, colour * (1.2 - 0.5 * sheen)[..., None], EGO_VEHICLE)
