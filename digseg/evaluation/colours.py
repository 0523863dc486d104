"""Display colours of classes: the same name gets the same colour in every picture, and no two classes of one
vocabulary look alike.

These colours are for people. The model's own colours (the palette of class queries) are re-drawn per sample
and have nothing to do with them.
"""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]

IGNORE_COLOURS: tuple[Colour, Colour] = ((205, 205, 208), (238, 238, 240))
_HATCH_PERIOD = 8

# CIELAB distance under which two areas are easily taken for the same class.
_MIN_DISTANCE = 22.0
# Number of vivid candidate colours that a name's hash chooses from.
_PREFERRED = 60

_KNOWN: dict[str, Colour] = {
    "background": (36, 40, 48),
    "other": (60, 66, 77),
    "sky": (134, 199, 238),
    "road": (128, 64, 128),
    "sidewalk": (240, 98, 220),
    "building": (199, 150, 106),
    "wall": (102, 102, 156),
    "fence": (222, 184, 178),
    "pole": (253, 224, 136),
    "traffic light": (250, 160, 20),
    "traffic sign": (232, 226, 20),
    "vegetation": (49, 140, 60),
    "terrain": (168, 226, 130),
    "person": (224, 30, 62),
    "rider": (255, 128, 102),
    "car": (32, 86, 224),
    "truck": (20, 32, 120),
    "bus": (0, 158, 150),
    "water": (30, 144, 255),
    "barren": (236, 216, 196),
    "forest": (20, 106, 54),
    "agricultural": (244, 214, 76),
    "soil": (122, 86, 62),
    "crop": (110, 204, 84),
    "weed": (232, 74, 60),
    "nucleus": (250, 192, 60),
    "lesion": (236, 94, 100),
    "cell membrane": (82, 200, 220),
    "cell interior": (32, 58, 104),
}

# Other wordings take the colour of the class they mean.
_SYNONYMS: dict[str, str] = {
    "street": "road",
    "walkway": "sidewalk",
    "pavement": "sidewalk",
    "house": "building",
    "column pole": "pole",
    "sign": "traffic sign",
    "sign symbol": "traffic sign",
    "tree": "vegetation",
    "trees": "vegetation",
    "shrubs": "vegetation",
    "clouds": "sky",
    "pedestrian": "person",
    "bicyclist": "rider",
    "automobile": "car",
    "vehicle": "car",
    "agriculture": "agricultural",
    "cell nucleus": "nucleus",
    "nuclei": "nucleus",
    "skin lesion": "lesion",
}


def class_colours(vocabulary: Sequence[str]) -> list[Colour]:
    """One RGB colour for each name of `vocabulary`, in its order.

    A name keeps its own colour (a fixed one for common classes, one chosen by the hash of the name for the
    rest) unless another class of the same vocabulary already has one that looks like it.
    """
    colours = _assigned(tuple(sorted(set(vocabulary), key=_precedence)))
    return [colours[name] for name in vocabulary]


def paint(mask: NDArray[np.integer], vocabulary: Sequence[str], ignore_id: int = 255) -> NDArray[np.uint8]:
    """The colour picture [H, W, 3] of a mask of class ids [H, W]; ignored pixels are hatched in grey."""
    table = np.array(class_colours(vocabulary), dtype=np.uint8)
    ignored = mask == ignore_id
    picture = table[np.where(ignored, 0, mask)]
    height, width = mask.shape
    diagonal = np.arange(height)[:, None] + np.arange(width)
    hatch = np.array(IGNORE_COLOURS, dtype=np.uint8)[(diagonal % _HATCH_PERIOD >= _HATCH_PERIOD // 3).astype(int)]
    return np.where(ignored[..., None], hatch, picture)


def colour_distance(first: Colour, second: Colour) -> float:
    """Perceived difference of two colours: Euclidean distance in CIELAB (CIE76), 0 to about 258."""
    return float(np.linalg.norm(_lab(np.array(first)) - _lab(np.array(second))))


@lru_cache(maxsize=256)
def _assigned(names: tuple[str, ...]) -> dict[str, Colour]:
    """Colours of the names, in order of precedence: who comes first keeps its own."""
    palette = _palette()
    palette_lab = _lab(palette)
    clearance = np.full(len(palette), np.inf)  # of each palette colour: distance to the nearest taken one
    taken: dict[str, Colour] = {}
    for name in names:
        key = _key(name)
        start = zlib.crc32(key.encode()) % _PREFERRED
        own = _KNOWN.get(key)
        if own is None or any(colour_distance(own, other) < _MIN_DISTANCE for other in taken.values()):
            order = np.roll(np.arange(len(palette)), -start)
            distinct = order[clearance[order] >= _MIN_DISTANCE]
            choice = distinct[0] if distinct.size else clearance.argmax()
            red, green, blue = palette[choice].tolist()
            own = (red, green, blue)
        taken[name] = own
        clearance = np.minimum(clearance, np.linalg.norm(palette_lab - _lab(np.array(own)), axis=1))
    return taken


def _precedence(name: str) -> tuple[bool, bool, str]:
    """Known classes come before their other wordings, those before names that have no colour of their own."""
    return _plain(name) not in _KNOWN, _key(name) not in _KNOWN, name


def _key(name: str) -> str:
    return _SYNONYMS.get(_plain(name), _plain(name))


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())


@cache
def _palette() -> NDArray[np.uint8]:
    """Candidate colours [N, 3]: golden-angle steps round the hue circle at alternating lightness, so that
    neighbours in the list differ clearly. The first `_PREFERRED` are vivid; the rest serve big vocabularies.
    """
    tones = ((0.55, 0.72), (0.38, 0.62), (0.72, 0.80), (0.27, 0.45), (0.84, 0.60), (0.50, 0.25))
    colours = []
    for step in range(4 * _PREFERRED):
        lightness, saturation = tones[step % 3 if step < _PREFERRED else step % len(tones)]
        channels = colorsys.hls_to_rgb((step * 0.618034) % 1.0, lightness, saturation)
        colours.append([round(channel * 255) for channel in channels])
    return np.array(colours, dtype=np.uint8)


def _lab(colours: NDArray[np.integer]) -> NDArray[np.float64]:
    """CIELAB (D65) of sRGB colours [..., 3]; IEC 61966-2-1 and CIE 15."""
    srgb = colours / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    xyz = linear @ to_xyz.T / np.array([0.95047, 1.0, 1.08883])
    scaled = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(scaled, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)
