"""The fixed palette of class colours: deterministic and well separated."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from torch import Tensor

MAX_COLOURS = 64
_LEVELS = 5  # candidates per channel: 5^3 = 125 colours


def palette(num_colours: int = MAX_COLOURS) -> Tensor:
    """The first ``num_colours`` colours of the palette, float32 ``[num_colours, 3]`` in [-1, 1].

    Farthest-point ordering of a regular RGB grid starting at black and white, so every prefix of the
    palette is as separated as a greedy choice can make it (Gonzalez, 1985: within a factor 2 of the best).
    With all 64 colours any two differ by at least 0.5 in some channel.

    Raises:
        ValueError: outside 2..64.
    """
    if not 2 <= num_colours <= MAX_COLOURS:
        raise ValueError(f"num_colours must be between 2 and {MAX_COLOURS}, got {num_colours}")
    # What is made during inference could not be used in training afterwards.
    with torch.inference_mode(False):
        return torch.tensor(_colours()[:num_colours])


@functools.cache
def _colours() -> list[list[float]]:
    axis = np.linspace(-1.0, 1.0, _LEVELS)
    candidates = np.array(list(itertools.product(axis, axis, axis)))
    chosen = [0]
    distance = np.square(candidates - candidates[0]).sum(1)
    while len(chosen) < MAX_COLOURS:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.square(candidates - candidates[chosen[-1]]).sum(1))
    colours: list[list[float]] = candidates[chosen].tolist()
    return colours


def colour_logits(painted: Tensor, colours: Tensor, mask: Tensor) -> Tensor:
    """Class scores of a painted mask: minus the squared distance to each class's colour, over 2 sigma^2.

    sigma is 1/8, a quarter of the least distance of two colours, so that a pixel half way between two is undecided
    and one at a colour is certain.

    Args:
        painted: ``[B, 3, H, W]``; ``colours``: ``[B, K, 3]``; ``mask``: bool ``[B, K]``, True where a slot has a class.

    Returns:
        float32 logits ``[B, K, H, W]``; slots outside the mask get a large negative score.
    """
    difference = painted.float().unsqueeze(1) - colours.float()[..., None, None]
    scores = -32.0 * difference.square().sum(2)
    masked: Tensor = scores.masked_fill(~mask[:, :, None, None], -1e4)
    return masked
