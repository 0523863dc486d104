"""Segmentation metrics from dataset-level pixel counts.

Everything is counted over the pixels of a whole dataset and divided once at the end, so the figures do not
depend on how the dataset was cut into images, chunks or workers. What most figures need of a confusion matrix are
its *class totals* [K, 3]: of each class the pixels that are right, that the ground truth has, and that were
predicted. The functions here take totals with any leading dimensions [..., K, 3] (resamples of a bootstrap).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IGNORE_ID = 255
HITS, TRUTH, PREDICTED = range(3)  # columns of class totals

Counts = NDArray[np.int64]
Figures = NDArray[np.float64]


class ConfusionMatrix:
    """Pixel counts [num_classes, num_classes]; rows are the ground truth, columns the prediction.

    Matrices of disjoint parts of a dataset are added with `merge` (or `+`), in any order.
    """

    def __init__(self, num_classes: int, counts: Counts | None = None, *, ignore_id: int = IGNORE_ID) -> None:
        if num_classes < 1:
            raise ValueError(f"a confusion matrix needs at least one class, got {num_classes}")
        if counts is None:
            counts = np.zeros((num_classes, num_classes), dtype=np.int64)
        if counts.shape != (num_classes, num_classes):
            raise ValueError(f"counts have shape {counts.shape}, expected {(num_classes, num_classes)}")
        self.num_classes = num_classes
        self.ignore_id = ignore_id
        self.counts = counts.astype(np.int64)

    def update(self, labels: NDArray[np.integer], predictions: NDArray[np.integer]) -> None:
        """Count one image (or any array): class ids of equal shape. Pixels labelled `ignore_id` are left out.

        Raises:
            ValueError: for arrays of different shapes, or an id outside [0, num_classes) where it counts.
        """
        if labels.shape != predictions.shape:
            raise ValueError(f"labels {labels.shape} and predictions {predictions.shape} differ in shape")
        valid = labels != self.ignore_id
        truth = labels[valid].astype(np.int64)
        predicted = predictions[valid].astype(np.int64)
        for name, ids in (("label", truth), ("prediction", predicted)):
            if ids.size and (ids.min() < 0 or ids.max() >= self.num_classes):
                raise ValueError(
                    f"{name} ids reach from {ids.min()} to {ids.max()}, allowed are 0..{self.num_classes - 1}"
                )
        pairs = np.bincount(truth * self.num_classes + predicted, minlength=self.num_classes**2)
        self.counts += pairs.reshape(self.num_classes, self.num_classes)

    def merge(self, other: ConfusionMatrix) -> None:
        """Add the counts of another part of the same dataset."""
        if other.num_classes != self.num_classes:
            raise ValueError(f"cannot merge matrices of {self.num_classes} and {other.num_classes} classes")
        self.counts += other.counts

    def __add__(self, other: ConfusionMatrix) -> ConfusionMatrix:
        total = ConfusionMatrix(self.num_classes, self.counts, ignore_id=self.ignore_id)
        total.merge(other)
        return total

    def totals(self) -> Counts:
        """Class totals [num_classes, 3]."""
        return np.stack([np.diag(self.counts), self.counts.sum(axis=1), self.counts.sum(axis=0)], axis=1)

    def iou(self) -> Figures:
        """Intersection over union [num_classes]; nan for a class in neither ground truth nor prediction."""
        return class_iou(self.totals())

    def mean_iou(self) -> float:
        """Mean IoU over the classes that occur in ground truth or prediction; nan if nothing was counted."""
        return float(mean_iou(self.totals()))

    def pixel_accuracy(self) -> float:
        """Share of the counted pixels that are right; nan if nothing was counted."""
        return float(pixel_accuracy(self.totals()))


def class_iou(totals: Counts) -> Figures:
    """Intersection over union [..., K]; nan for a class in neither ground truth nor prediction."""
    return _ratio(totals[..., HITS], totals[..., TRUTH] + totals[..., PREDICTED] - totals[..., HITS])


def class_dice(totals: Counts) -> Figures:
    """Dice coefficient (the F1 score of a class' pixels) [..., K]; nan as for the IoU."""
    return _ratio(2 * totals[..., HITS], totals[..., TRUTH] + totals[..., PREDICTED])


def class_accuracy(totals: Counts) -> Figures:
    """Share of a class' pixels that were found (recall) [..., K]; nan for a class not in the ground truth."""
    return _ratio(totals[..., HITS], totals[..., TRUTH])


def mean_iou(totals: Counts) -> Figures:
    """Mean IoU [...] over the classes that occur in ground truth or prediction; nan if nothing was counted."""
    return mean_of_known(class_iou(totals))


def mean_dice(totals: Counts) -> Figures:
    """Mean Dice [...] over the classes that occur in ground truth or prediction; nan if nothing was counted."""
    return mean_of_known(class_dice(totals))


def mean_accuracy(totals: Counts) -> Figures:
    """Mean accuracy [...] over the classes of the ground truth; nan if nothing was counted."""
    return mean_of_known(class_accuracy(totals))


def pixel_accuracy(totals: Counts) -> Figures:
    """Share of the counted pixels that are right [...]; nan if nothing was counted."""
    return _ratio(totals[..., HITS].sum(-1), totals[..., TRUTH].sum(-1))


def frequency_weighted_iou(totals: Counts) -> Figures:
    """IoU weighted with each class' share of the ground truth [...] (Long et al. 2015, section 5); nan if nothing
    was counted."""
    weights = _ratio(totals[..., TRUTH], totals[..., TRUTH].sum(-1, keepdims=True))
    weighted = np.nansum(weights * class_iou(totals), axis=-1)
    return np.where(totals[..., TRUTH].sum(-1) > 0, weighted, np.nan)


def mean_of_known(values: Figures) -> Figures:
    """Mean over the last axis, nan left out; nan where all are."""
    return _ratio(np.nansum(values, axis=-1), (~np.isnan(values)).sum(-1))


def harmonic_mean(first: float, second: float) -> float:
    """Harmonic mean of two figures that are not negative; 0 if one is 0, nan if one is nan."""
    return 2 * first * second / (first + second) if first + second != 0 else 0.0


def _ratio(numerator: NDArray[np.number], denominator: NDArray[np.number]) -> Figures:
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    ratio = np.full(denominator.shape, np.nan)
    np.divide(numerator, denominator, out=ratio, where=denominator > 0)
    return ratio
