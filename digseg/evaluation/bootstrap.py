"""Confidence intervals by resampling images: how much a figure owes to which images the dataset happens to hold.

Pixels of one image are anything but independent, so whole images are drawn. What is kept of an image are the class
totals of the classes that occur in it; a resample is a weighted sum of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from digseg.evaluation.metrics import Counts, Figures

RESAMPLES = 1000
LEVEL = 0.95
_BLOCK = 64  # resamples whose weights are in memory at once


@dataclass(frozen=True)
class ImageTotals:
    """Class totals of each image of a split, sparse: row r belongs to image `image[r]` and class `label[r]`."""

    num_images: int
    image: NDArray[np.int32]  # [R], ascending
    label: NDArray[np.int32]  # [R]
    totals: Counts  # [R, 3]

    @classmethod
    def of_image(cls, totals: Counts) -> ImageTotals:
        """Of one image, from its class totals [K, 3]."""
        labels = np.flatnonzero(totals.any(axis=1)).astype(np.int32)
        return cls(1, np.zeros(len(labels), np.int32), labels, totals[labels])

    @classmethod
    def joined(cls, parts: Sequence[ImageTotals]) -> ImageTotals:
        """The images of all parts, in their order."""
        first = np.cumsum([0, *(part.num_images for part in parts)])
        return cls(
            int(first[-1]),
            np.concatenate(
                [np.zeros(0, np.int32), *(part.image + start for part, start in zip(parts, first, strict=False))]
            ).astype(np.int32),
            np.concatenate([np.zeros(0, np.int32), *(part.label for part in parts)]),
            np.concatenate([np.zeros((0, 3), np.int64), *(part.totals for part in parts)]),
        )

    def summed(self, num_classes: int, weights: NDArray[np.integer] | None = None) -> Counts:
        """Class totals [..., K, 3] of all images together, each counted `weights [..., N]` times (default: once)."""
        rows = self._matrix(num_classes)
        chosen = np.ones(self.num_images, np.int64) if weights is None else weights
        summed = np.asarray(chosen @ rows)
        return summed.reshape(*chosen.shape[:-1], num_classes, 3)

    def per_image(self, num_classes: int, statistic: Callable[[Counts], Figures]) -> Figures:
        """The statistic of each image alone [N]."""
        figures = np.full(self.num_images, np.nan)
        bounds = np.searchsorted(self.image, np.arange(self.num_images + 1))
        for number in range(self.num_images):
            rows = slice(bounds[number], bounds[number + 1])
            totals = np.zeros((num_classes, 3), np.int64)
            totals[self.label[rows]] = self.totals[rows]
            figures[number] = statistic(totals)
        return figures

    def _matrix(self, num_classes: int) -> csr_array:
        columns = self.label[:, None] * 3 + np.arange(3)
        shape = (self.num_images, num_classes * 3)
        return csr_array((self.totals.ravel(), (np.repeat(self.image, 3), columns.ravel())), shape=shape)


def resampled(
    images: ImageTotals,
    num_classes: int,
    statistic: Callable[[Counts], Figures],
    *,
    seed: Sequence[int] = (0,),
    resamples: int = RESAMPLES,
) -> Figures:
    """The statistic of `resamples` datasets of as many images, drawn with replacement [resamples].

    The draws are a function of `seed` and the number of images alone: two models on the same images get the same
    ones, so the differences of their figures are paired.

    Args:
        statistic: class totals [..., K, 3] to a figure [...].
    """
    random = np.random.default_rng(list(seed))
    share = np.full(images.num_images, 1 / max(1, images.num_images))
    figures = [np.zeros(0)]
    for start in range(0, resamples, _BLOCK):
        weights = random.multinomial(images.num_images, share, size=min(_BLOCK, resamples - start))
        figures.append(statistic(images.summed(num_classes, weights)))
    return np.concatenate(figures)


def interval(samples: Figures, level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval of resampled figures (Efron 1979); resamples without a figure are left out, and if
    none has one both ends are nan."""
    known = samples[~np.isnan(samples)]
    if not known.size:
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
