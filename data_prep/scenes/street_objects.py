"""What stands and moves in a street: trees, lamp posts, signs, cars, people. Painted from far to near."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from data_prep.scenes.paint import Canvas, Float, Rng, grid, hsv, noise, textured

# Cityscapes labelIds
STATIC, DYNAMIC, POLE, TRAFFIC_LIGHT, TRAFFIC_SIGN = 4, 5, 17, 19, 20
VEGETATION, PERSON, CAR = 21, 24, 26

SPRITE = 160
"""Sprites are drawn this large, then scaled down to the size that their distance gives them."""


@dataclass(frozen=True)
class Place:
    """The camera and the street's cross-section; metres, except ``focal``, ``horizon``, ``centre`` in pixels."""

    focal: float
    horizon: float
    centre: float
    eye: float
    light: float
    haze: Float
    haze_density: float
    left: float
    right: float
    wall_left: float
    wall_right: float

    def pixels(self, metres: float, distance: float) -> float:
        return metres * self.focal / distance

    def foot(self, lateral: float, distance: float) -> tuple[float, float]:
        """Row and column where a thing at this lateral place and distance touches the ground."""
        return (
            self.horizon + self.pixels(self.eye, distance),
            self.centre + self.pixels(lateral, distance),
        )


Painter = Callable[[], None]


def paint_objects(rng: Rng, canvas: Canvas, place: Place, leaf_hues: Sequence[float], leaf_saturation: float) -> None:
    """Fill the street. Nearer things hide farther ones."""
    things: list[tuple[float, Painter]] = []

    def add(distance: float, painter: Callable[..., None], *arguments: object) -> None:
        things.append((distance, lambda: painter(rng, canvas, place, distance, *arguments)))

    for _ in range(rng.integers(0, 6)):
        add(rng.uniform(7, 45), _tree, _kerb_place(rng, place, 0.7), leaf_hues, leaf_saturation)
    for _ in range(rng.integers(3, 7)):
        add(4 * rng.uniform(1, 4.5), _post, _kerb_place(rng, place, 0.35))
    for _ in range(rng.integers(2, 8)):
        crossing = rng.random() < 0.15
        lateral = rng.uniform(place.left, place.right) if crossing else _kerb_place(rng, place, 1.6)
        add(3.5 * rng.uniform(1, 3.5), _person, lateral)
    for _ in range(rng.integers(1, 4)):
        lane = rng.uniform(place.left + 1.2, place.right - 1.2)
        add(rng.uniform(5, 28), _car, lane, bool(rng.random() < 0.12))
    if rng.random() < 0.75:
        side = place.left + 1.0 if rng.random() < 0.5 else place.right - 1.0
        start = rng.uniform(5, 14)
        for i in range(rng.integers(1, 5)):
            add(start + 5.6 * i, _car, side + rng.normal(0, 0.1), False)
    for _ in range(rng.integers(0, 2)):
        add(rng.uniform(5, 16), _clutter, _kerb_place(rng, place, 1.2))
    for _, painter in sorted(things, key=lambda thing: -thing[0]):
        painter()


def _kerb_place(rng: Rng, place: Place, inset: float) -> float:
    if rng.random() < 0.5:
        return place.left - rng.uniform(0.2, max(inset, 0.3))
    return place.right + rng.uniform(0.2, max(inset, 0.3))


def _hazed(place: Place, colour: Float, distance: float) -> Float:
    return colour + (place.haze - colour) * np.float32(1 - np.exp(-place.haze_density * distance))


def _ground_shadow(canvas: Canvas, row: float, column: float, width: float, depth: float = 0.18) -> None:
    w, h = max(int(width), 3), max(int(width * depth), 2)
    rows, columns = grid(2 * h + 1, 2 * w + 1)
    radius = ((rows - h) / (h + 0.5)) ** 2 + ((columns - w) / (w + 0.5)) ** 2
    canvas.shade(int(row) - h, int(column) - w, (1 - 0.6 * np.clip(1.6 - 1.6 * radius, 0, 1)).astype(np.float32))


def _tree(
    rng: Rng,
    canvas: Canvas,
    place: Place,
    distance: float,
    lateral: float,
    hues: Sequence[float],
    saturation: float,
) -> None:
    row, column = place.foot(lateral, distance)
    tall, trunk = rng.uniform(4.5, 9.0), rng.uniform(0.2, 0.45)
    crown = place.pixels(tall * rng.uniform(0.28, 0.45), distance)
    top = row - place.pixels(tall, distance)
    size = max(int(2 * crown), 6)
    bark = hsv(rng.uniform(0.04, 0.12), rng.uniform(0.1, 0.45), rng.uniform(0.2, 0.45)) * place.light
    width = max(int(place.pixels(trunk, distance)), 2)
    stem = np.ones((max(int(row - top - crown), 2), width), np.float32)
    ramp = np.linspace(1.25, 0.65, width, dtype=np.float32)
    _ground_shadow(canvas, row, column, crown * 0.8)
    bark_paint = _hazed(place, bark * ramp[None, :, None] * np.ones((*stem.shape, 3), np.float32), distance)
    canvas.stamp(int(row) - stem.shape[0], int(column - width / 2), stem, bark_paint, VEGETATION)
    rows, columns = grid(size, size)
    radius = ((rows / size - 0.5) ** 2 + (columns / size - 0.5) ** 2) * 4
    clumps = noise(rng, size, size, max(size / 4, 3), 4)
    alpha = np.clip((1.05 - radius + 0.28 * clumps) * 5, 0, 1).astype(np.float32)
    alpha *= (clumps > rng.uniform(-2.6, -1.0)) | (radius < 0.1)
    base = hsv(rng.choice(hues) + rng.normal(0, 0.02), saturation * rng.uniform(0.5, 1.25), rng.uniform(0.3, 0.65))
    lit = ((1.25 - 0.6 * rows / size) * place.light).astype(np.float32)
    leaves = textured(base, 0.5 * clumps + noise(rng, size, size, 3, 2), 0.25) * lit[..., None]
    canvas.stamp(int(top), int(column - size / 2), alpha, _hazed(place, leaves, distance), VEGETATION)


def _post(rng: Rng, canvas: Canvas, place: Place, distance: float, lateral: float) -> None:
    """A lamp post, a post with one or two signs, or a traffic light."""
    row, column = place.foot(lateral, distance)
    kind = rng.choice(["lamp", "sign", "light"], p=[0.36, 0.54, 0.1])
    tall = rng.uniform(5.0, 8.0) if kind == "lamp" else rng.uniform(2.4, 3.4)
    width = max(round(place.pixels(rng.uniform(0.14, 0.28), distance)), 2)
    height = max(int(place.pixels(tall, distance)), 4)
    metal = hsv(rng.random(), rng.uniform(0.0, 0.3), rng.uniform(0.12, 0.75)) * place.light
    ramp = np.linspace(1.3, 0.6, width, dtype=np.float32)[None, :, None]
    shaft = _hazed(place, metal * ramp * np.ones((height, width, 3), np.float32), distance)
    _ground_shadow(canvas, row, column, width)
    canvas.stamp(int(row) - height, int(column - width / 2), np.ones((height, width), np.float32), shaft, POLE)
    if kind == "lamp":
        reach = max(int(place.pixels(rng.uniform(0.8, 1.8), distance)), 3)
        arm = np.ones((max(width // 2, 2), reach), np.float32)
        left = int(column) if lateral < 0 else int(column) - reach
        canvas.stamp(int(row) - height, left, arm, _hazed(place, metal, distance), POLE)
        return
    size = place.pixels(rng.uniform(0.8, 1.25), distance)
    image, label = (_sign(rng), TRAFFIC_SIGN) if kind == "sign" else (_traffic_light(), TRAFFIC_LIGHT)
    size *= 1.0 if kind == "sign" else 0.5
    at = row - height
    for _ in range(2 if kind == "sign" and rng.random() < 0.35 else 1):
        at = _paste(canvas, place, distance, image, at, column, size, label)
        image = _sign(rng)


def _sign(rng: Rng) -> Image.Image:
    image = Image.new("RGBA", (SPRITE, SPRITE))
    draw = ImageDraw.Draw(image)
    edge = tuple(int(c) for c in rng.choice([[200, 30, 35], [30, 70, 170], [235, 190, 40], [235, 235, 235]]))
    fill = tuple(int(c) for c in rng.choice([[240, 240, 240], [30, 80, 180], [240, 200, 60], [205, 35, 40]]))
    ink = (20, 20, 25) if sum(fill) > 420 else (245, 245, 245)
    shape = rng.choice(["disc", "triangle", "square", "octagon"])
    for inset, colour in ((2, edge), (18, fill)):
        a, b, m = inset, SPRITE - inset, SPRITE / 2
        if shape == "disc":
            draw.ellipse((a, a, b, b), fill=colour)
        elif shape == "triangle":
            draw.polygon([(m, a * 1.6), (b - a * 0.5, b - a * 0.4), (a * 1.5, b - a * 0.4)], fill=colour)
        elif shape == "square":
            draw.rectangle((a, a, b, b), fill=colour)
        else:
            draw.regular_polygon((m, m, m - a), 8, rotation=22, fill=colour)
    for _ in range(rng.integers(1, 4)):
        x, y = rng.uniform(48, 90, 2)
        if rng.random() < 0.5:
            draw.rectangle((x, y, x + rng.uniform(14, 40), y + rng.uniform(10, 30)), fill=ink)
        else:
            draw.line((x, y, x + rng.uniform(-20, 30), y + rng.uniform(10, 40)), fill=ink, width=12)
    return image


def _traffic_light() -> Image.Image:
    image = Image.new("RGBA", (SPRITE, SPRITE * 2))
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((30, 4, 130, 316), 20, fill=(25, 28, 28))
    for y, colour in ((20, (220, 40, 40)), (116, (90, 70, 20)), (212, (20, 70, 40))):
        draw.ellipse((44, y, 116, y + 80), fill=colour)
    return image


def _car(rng: Rng, canvas: Canvas, place: Place, distance: float, lateral: float, across: bool) -> None:
    row, column = place.foot(lateral, distance)
    wide = rng.uniform(3.9, 4.7) if across else rng.uniform(1.7, 2.0)
    width = place.pixels(wide, distance)
    _ground_shadow(canvas, row, column, width * 0.58, 0.12)
    image = _car_side(rng) if across else _car_end(rng, rng.uniform(-0.35, 0.35))
    tall = width * image.height / image.width
    _paste(canvas, place, distance, image, row - tall + 1, column, width, CAR)


def _lacquer(rng: Rng) -> tuple[int, int, int]:
    colour = hsv(rng.random(), rng.choice([0.05, 0.15, 0.6, 0.85]), rng.uniform(0.15, 0.95)) * 255
    return int(colour[0]), int(colour[1]), int(colour[2])


def _dim(colour: tuple[int, int, int], by: float) -> tuple[int, int, int]:
    return tuple(min(int(c * by), 255) for c in colour)  # type: ignore[return-value]


def _car_end(rng: Rng, lean: float) -> Image.Image:
    """A car from behind or in front; ``lean`` shifts the cabin as a view from the side does."""
    high = int(SPRITE * rng.uniform(0.78, 1.0))
    image = Image.new("RGBA", (SPRITE, high))
    draw = ImageDraw.Draw(image)
    paint, shift = _lacquer(rng), lean * 24
    belt, bumper = high * rng.uniform(0.42, 0.5), high * 0.88
    for x in (14, SPRITE - 42):
        draw.rounded_rectangle((x, high * 0.72, x + 28, high - 1), 8, fill=(18, 18, 20))
    cabin = [
        (26 + shift, belt + 6),
        (42 + shift, 4),
        (SPRITE - 42 + shift, 4),
        (SPRITE - 26 + shift, belt + 6),
    ]
    draw.polygon(cabin, fill=_dim(paint, 0.9))
    pane = [(36 + shift, belt), (48 + shift, 14), (SPRITE - 48 + shift, 14), (SPRITE - 36 + shift, belt)]
    draw.polygon(pane, fill=_dim((120, 140, 155), rng.uniform(0.25, 1.2)))
    draw.line([(52 + shift, belt - 4), (76 + shift, 18)], fill=(190, 200, 205), width=5)
    draw.rounded_rectangle((4, belt, SPRITE - 4, bumper), 18, fill=paint)
    draw.rectangle((4, high * 0.7, SPRITE - 4, high * 0.74), fill=_dim(paint, 0.6))
    draw.rounded_rectangle((6, high * 0.76, SPRITE - 6, bumper + 2), 8, fill=_dim(paint, 0.75))
    lamp = (225, 40, 35) if rng.random() < 0.6 else (250, 245, 215)
    for x in (10, SPRITE - 38):
        draw.rounded_rectangle((x, belt + 10, x + 28, belt + 26), 6, fill=lamp)
    draw.rectangle((60, high * 0.77, 100, high * 0.84), fill=(225, 225, 215))
    return image


def _car_side(rng: Rng) -> Image.Image:
    width, high = SPRITE * 2, int(SPRITE * rng.uniform(0.62, 0.78))
    image = Image.new("RGBA", (width, high))
    draw = ImageDraw.Draw(image)
    paint = _lacquer(rng)
    belt, sill = high * 0.45, high * 0.84
    front, back = rng.uniform(0.26, 0.36) * width, rng.uniform(0.72, 0.92) * width
    roof = [(front - 30, belt + 4), (front + 20, 4), (back - 28, 4), (min(back + 26, width - 8), belt + 4)]
    draw.polygon(roof, fill=paint)
    glass = _dim((120, 140, 155), rng.uniform(0.25, 1.1))
    draw.polygon([(front - 16, belt), (front + 26, 12), (back - 34, 12), (back + 8, belt)], fill=glass)
    draw.rectangle(((front + back) / 2 - 5, 4, (front + back) / 2 + 5, belt), fill=paint)
    draw.rounded_rectangle((3, belt, width - 3, sill), 20, fill=paint)
    draw.rectangle((12, sill - 14, width - 12, sill), fill=_dim(paint, 0.6))
    for x in (0.2 * width, 0.8 * width):
        r = high * 0.2
        draw.ellipse((x - r, high - 2 * r, x + r, high - 1), fill=(20, 20, 22))
        draw.ellipse((x - r * 0.5, high - 1.5 * r, x + r * 0.5, high - 0.5 * r), fill=(150, 150, 155))
    draw.rectangle((4, belt + 12, 20, belt + 26), fill=(245, 235, 190))
    draw.rectangle((width - 20, belt + 12, width - 4, belt + 28), fill=(210, 40, 40))
    return image if rng.random() < 0.5 else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _person(rng: Rng, canvas: Canvas, place: Place, distance: float, lateral: float) -> None:
    row, column = place.foot(lateral, distance)
    tall = place.pixels(rng.uniform(1.55, 1.9), distance)
    image = _figure(rng)
    width = tall * image.width / image.height
    _ground_shadow(canvas, row, column, width * 0.6, 0.25)
    _paste(canvas, place, distance, image, row - tall + 1, column, width, PERSON)


def _figure(rng: Rng) -> Image.Image:
    width, high = SPRITE * 3 // 4, SPRITE * 2
    image = Image.new("RGBA", (width, high))
    draw = ImageDraw.Draw(image)
    coat, trousers, shoe = _lacquer(rng), _dim(_lacquer(rng), 0.7), (25, 22, 20)
    skin = _dim((225, 175, 145), rng.uniform(0.4, 1.05))
    m, hip = width / 2, high * rng.uniform(0.5, 0.58)
    stride, swing, stout = rng.uniform(2, 26), rng.uniform(0, 22), rng.uniform(0.8, 1.25)
    for sign in (-1, 1):
        knee, foot = (m + sign * stride * 0.7, high * 0.76), (m + sign * stride, high - 9)
        draw.line([(m + sign * 9, hip), knee, foot], fill=_dim(trousers, 1 + 0.2 * sign), width=21, joint="curve")
        draw.ellipse((foot[0] - 14, high - 17, foot[0] + 14, high - 1), fill=shoe)
    body = (m - 24 * stout, high * 0.17, m + 24 * stout, hip + 22 * rng.random() + 8)
    draw.rounded_rectangle(body, 18, fill=coat)
    for sign in (-1, 1):
        shoulder, hand = (m + sign * 23 * stout, high * 0.21), (m + sign * (28 * stout + swing), high * 0.5)
        draw.line([shoulder, hand], fill=_dim(coat, 0.85), width=15)
        draw.ellipse((hand[0] - 7, hand[1] - 4, hand[0] + 7, hand[1] + 10), fill=skin)
    draw.ellipse((m - 19, high * 0.02, m + 19, high * 0.16), fill=skin)
    hair = _dim((120, 80, 45), rng.uniform(0.2, 1.8))
    draw.chord((m - 20, high * 0.012, m + 20, high * 0.15), 175, 365, fill=hair)
    if rng.random() < 0.3:
        draw.rounded_rectangle((m + 14, high * 0.24, m + 44, high * 0.42), 8, fill=_lacquer(rng))
    return image


def _clutter(rng: Rng, canvas: Canvas, place: Place, distance: float, lateral: float) -> None:
    """A bin, box or dog-sized thing that has no class of its own."""
    row, column = place.foot(lateral, distance)
    high, wide = (max(int(place.pixels(rng.uniform(0.4, 1.1), distance)), 3) for _ in range(2))
    rows, columns = grid(high, wide)
    round_off = (abs(columns / wide - 0.5) * 2) ** 4 + (abs(rows / high - 0.5) * 2) ** 6
    colour = textured(hsv(rng.random(), rng.random() * 0.6, rng.uniform(0.15, 0.7)), noise(rng, high, wide, 5), 0.12)
    _ground_shadow(canvas, row, column, wide * 0.6)
    label = STATIC if rng.random() < 0.7 else DYNAMIC
    alpha = (round_off < 1.0).astype(np.float32)
    canvas.stamp(int(row) - high, int(column - wide / 2), alpha, _hazed(place, colour * place.light, distance), label)


def _paste(
    canvas: Canvas,
    place: Place,
    distance: float,
    sprite: Image.Image,
    top: float,
    column: float,
    width: float,
    label: int,
) -> float:
    """Scale a sprite to ``width`` pixels and lay it down; gives the row below it."""
    w = max(round(width), 3)
    h = max(round(width * sprite.height / sprite.width), 3)
    pixels = np.asarray(sprite.resize((w, h), Image.Resampling.BOX), np.float32) / 255.0
    alpha = pixels[..., 3]
    colour = pixels[..., :3]
    lit = np.linspace(1.12, 0.82, h, dtype=np.float32)[:, None, None]
    soft: Float = gaussian_filter(colour * lit, (0.3, 0.3, 0)) * np.float32(place.light)
    canvas.stamp(round(top), round(column - w / 2), alpha, _hazed(place, soft, distance), label)
    return top + h
