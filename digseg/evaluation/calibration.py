"""Whether a model is as sure as it is right: pixels counted in bins of confidence.

All counts are whole numbers, confidences included (in units of 2^-24, the resolution of float32 below 1), so that
sums over images do not depend on their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from digseg.evaluation.metrics import Counts, Figures

NUM_BINS = 15
PIXELS, RIGHT, CONFIDENCE = range(3)  # columns of reliability counts
_UNIT = 2.0**24


def reliability_counts(
    labels: NDArray[np.integer], predictions: NDArray[np.integer], confidence: NDArray[np.float32], ignore_id: int
) -> Counts:
    """Counts [NUM_BINS, 3] of the pixels not ignored: how many have a confidence in (b / NUM_BINS,
    (b + 1) / NUM_BINS], how many of these are right, and the sum of their confidences in 2^-24.

    Args:
        labels, predictions: class ids [H, W].
        confidence: probability of the predicted class [H, W].
    """
    valid = labels != ignore_id
    sure = np.clip(confidence[valid].astype(np.float64), 0.0, 1.0)
    right = labels[valid] == predictions[valid]
    number = np.clip(np.ceil(sure * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
    counts = np.zeros((NUM_BINS, 3), np.int64)
    counts[:, PIXELS] = np.bincount(number, minlength=NUM_BINS)
    counts[:, RIGHT] = np.bincount(number[right], minlength=NUM_BINS)
    # Sums of whole numbers below 2^53 are exact in float64.
    counts[:, CONFIDENCE] = np.bincount(number, np.rint(sure * _UNIT), minlength=NUM_BINS).astype(np.int64)
    return counts


@dataclass(frozen=True)
class Reliability:
    """The reliability diagram: of each bin its share of the pixels, accuracy and mean confidence (nan if empty)."""

    share: Figures
    accuracy: Figures
    confidence: Figures

    @classmethod
    def of(cls, counts: Counts) -> Reliability:
        """From `reliability_counts`."""
        pixels = counts[:, PIXELS]
        filled = pixels > 0
        parts = [np.full(len(counts), np.nan) for _ in range(2)]
        np.divide(counts[:, RIGHT], pixels, out=parts[0], where=filled)
        np.divide(counts[:, CONFIDENCE] / _UNIT, pixels, out=parts[1], where=filled)
        return cls(pixels / max(1, int(pixels.sum())), *parts)

    def expected_error(self) -> float:
        """Expected calibration error (Guo et al. 2017, equation 5); nan if nothing was counted."""
        if not self.share.any():
            return float("nan")
        return float(np.nansum(self.share * np.abs(self.accuracy - self.confidence)))
