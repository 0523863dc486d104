"""The fixed palette of class colours: deterministic and well separated."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

MAX_COLOURS = 64
_LEVELS = 5  # candidates per channel: 5^3 = 125 colours


@functools.cache
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
    # The result is cached: made during inference, it could not be used in training afterwards.
    with torch.inference_mode(False):
        axis = torch.linspace(-1.0, 1.0, _LEVELS)
        candidates = torch.cartesian_prod(axis, axis, axis)
        chosen = [0]
        distance = (candidates - candidates[0]).square().sum(1)
        while len(chosen) < num_colours:
            chosen.append(int(distance.argmax()))
            distance = torch.minimum(distance, (candidates - candidates[chosen[-1]]).square().sum(1))
        return candidates[chosen].clone()
