"""Views of a sample: draws of the training transform (scale, crop, flip, colour), seeded by (seed, sample, view).

A view is kept as pixels, class ids and the latents of exactly those pixels, and is a sample of a shard like any other:
of a sample KEY the shard holds KEY-v0, KEY-v1 and so on, side by side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from digseg.data.latents import LatentRecipe
from digseg.data.transforms import training_crop


@dataclass(frozen=True)
class View:
    """``image`` uint8 [R, R, 3] RGB and ``mask`` [R, R] ids, R the resolution; padding is grey, and ignored."""

    key: str
    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[Any]


def draw_views(
    name: str, image: npt.NDArray[np.uint8], mask: npt.NDArray[Any], ignore_id: int, recipe: LatentRecipe
) -> Iterator[View]:
    """All views of the sample ``name`` (corpus/split/key); a view depends on name, seed and its own number alone."""
    ids = np.arange(ignore_id + 1, dtype=mask.dtype)
    sample = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    for number in range(recipe.views):
        rng = np.random.default_rng([recipe.seed, sample, number])
        pixels, labels = training_crop(image, mask, ids, recipe.transform, rng)
        yield View(view_key(name.rpartition("/")[2], number), np.ascontiguousarray(pixels.transpose(1, 2, 0)), labels)


def view_key(key: str, number: int) -> str:
    """The key of a view among the samples of its shard."""
    return f"{key}-v{number}"
