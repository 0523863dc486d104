"""Sliding windows over images of any size: where they lie, and how their answers are blended in little memory.

A pixel's answer is the weighted mean of those of the windows over it. The weight falls linearly from the middle of a
window to its border, along rows and columns alike, so that the weights of both directions can be normalised each by
itself: what the windows say is then merely added up, and what no further window touches is handed on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Slab(NamedTuple):
    """The finished probabilities ``[K, h, w]`` of a rectangle of the image."""

    top: int
    left: int
    probabilities: Tensor


class Cut(NamedTuple):
    """A window along one direction: where it starts, the part of it that is final after it, the weights ``[window]``
    of its answers, which add up to 1 over all windows at a place."""

    start: int
    final: int
    weights: Tensor


def cuts(length: int, window: int, overlap: float) -> list[Cut]:
    """As few windows as cover ``length`` evenly, neighbours sharing ``overlap`` of a window or more."""
    window = min(window, length)
    count = 1 + math.ceil((length - window) / (window * (1 - overlap)))
    starts = [round(number * (length - window) / max(1, count - 1)) for number in range(count)]
    places = torch.arange(window) + 0.5
    weights = torch.minimum(places, window - places)
    total = torch.zeros(length)
    for start in starts:
        total[start : start + window] += weights
    ends = [*starts[1:], length]
    return [
        Cut(start, end - start, weights / total[start : start + window])
        for start, end in zip(starts, ends, strict=True)
    ]


def blended(
    height: int,
    width: int,
    window: int,
    overlap: float,
    answer: Callable[[int, int, int, int], Tensor],
) -> Iterator[Slab]:
    """The image's probabilities, rectangle by rectangle: rows of windows from top to bottom, each from left to right.

    Beside a window, only what overlaps the next row of windows is held.

    Args:
        window: side of a window in pixels; one that covers the image answers alone.
        answer: (top, left, height, width) of a window -> its probabilities ``[K, height, width]``.
    """
    rows, columns = cuts(height, window, overlap), cuts(width, window, overlap)
    high, wide = len(rows[0].weights), len(columns[0].weights)
    if len(rows) == len(columns) == 1:
        yield Slab(0, 0, answer(0, 0, high, wide))
        return
    waiting: Tensor | None = None  # sums of the rows that the next row of windows begins with
    for row in rows:
        beside: Tensor | None = None
        for column in columns:
            said = answer(row.start, column.start, high, wide)
            said = said * (row.weights[:, None] * column.weights).to(said.device)
            if beside is not None:
                said[:, :, : beside.shape[2]] += beside
            said, beside = said[:, :, : column.final], said[:, :, column.final :]
            if waiting is None:
                held = max((high - row.final for row in rows[:-1]), default=0)
                waiting = torch.zeros(len(said), held, width, device=said.device)
            below = waiting[:, :, column.start : column.start + column.final]
            said[:, : below.shape[1]] += below
            yield Slab(row.start, column.start, said[:, : row.final])
            rest = said[:, row.final :]
            below.zero_()
            below[:, : rest.shape[1]] = rest[:, : below.shape[1]]
