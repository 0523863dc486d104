"""Where the tiles of a large image lie."""

from __future__ import annotations

from data_prep.corpora.spec import Tiles

Box = tuple[int, int, int, int]
"""Left, upper, right and lower edge of a tile in pixels, as PIL has them."""


def tile_boxes(width: int, height: int, tiles: Tiles) -> list[Box | None]:
    """The tiles of an image in order of their number; None where the edge cuts a tile that has to be whole."""
    boxes: list[Box | None] = []
    for upper, lower in _intervals(height, tiles):
        for left, right in _intervals(width, tiles):
            whole = lower - upper == right - left == tiles.size
            boxes.append((left, upper, right, lower) if whole or tiles.grid == "even" else None)
    return boxes


def _intervals(length: int, tiles: Tiles) -> list[tuple[int, int]]:
    count = -(-length // tiles.size)
    if tiles.grid == "even":
        return [(i * length // count, (i + 1) * length // count) for i in range(count)]
    return [(start, min(start + tiles.size, length)) for start in range(0, length, tiles.size)]
