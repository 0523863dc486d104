"""Segmentation metrics from a dataset-level confusion matrix.

Everything is counted over the pixels of a whole dataset and divided once at the end, so the figures do not
depend on how the dataset was cut into images, chunks or workers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IGNORE_ID = 255


class ConfusionMatrix:
    """Pixel counts [num_classes, num_classes]; rows are the ground truth, columns the prediction.

    Matrices of disjoint parts of a dataset are added with `merge` (or `+`), in any order.
    """

    def __init__(
        self, num_classes: int, counts: NDArray[np.int64] | None = None, *, ignore_id: int = IGNORE_ID
    ) -> None:
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

    def iou(self) -> NDArray[np.float64]:
        """Intersection over union [num_classes]; nan for a class in neither ground truth nor prediction."""
        intersection = np.diag(self.counts).astype(np.float64)
        union = self.counts.sum(axis=0) + self.counts.sum(axis=1) - np.diag(self.counts)
        iou = np.full(self.num_classes, np.nan)
        np.divide(intersection, union, out=iou, where=union > 0)
        return iou

    def mean_iou(self) -> float:
        """Mean IoU over the classes that occur in ground truth or prediction; nan if nothing was counted."""
        iou = self.iou()
        present = ~np.isnan(iou)
        return float(iou[present].mean()) if present.any() else float("nan")

    def pixel_accuracy(self) -> float:
        """Share of the counted pixels that are right; nan if nothing was counted."""
        total = self.counts.sum()
        return float(np.trace(self.counts) / total) if total else float("nan")
