"""How well outlines fit: boundary IoU and boundary F1, as pixel counts that add up over images.

Boundary IoU (Cheng et al. 2021, "Boundary IoU", equation 1) compares only the pixels within d of a region's outline,
d being 2 % of the image's diagonal; the edge of the image is an outline too. Boundary F1 (Csurka et al. 2013, "What
is a good evaluation measure for semantic segmentation?") matches the outlines themselves, one pixel wide and inside
each region, within 0.75 % of the diagonal; there the edge of the image is none.

Pixels that the ground truth ignores belong to no region, and a border with them is no outline: nobody knows whether
a region ends there.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter, minimum_filter
from scipy.spatial import cKDTree

from digseg.evaluation.metrics import Counts, Figures

BAND_RATIO = 0.02
TOLERANCE_RATIO = 0.0075

_NOWHERE = -1  # of the label maps below: a pixel that is ignored


def band_totals(
    labels: NDArray[np.integer], predictions: NDArray[np.integer], num_classes: int, ignore_id: int
) -> Counts:
    """Class totals [K, 3] of the pixels near outlines: their IoU (`metrics.class_iou`) is the boundary IoU.

    Args:
        labels, predictions: class ids [H, W]; pixels labelled `ignore_id` are left out.
    """
    truth, predicted = _label_maps(labels, predictions, ignore_id)
    distance = _pixels(BAND_RATIO, labels.shape)
    in_truth, in_predicted = (_near_other(ids, distance, edge_counts=True) for ids in (truth, predicted))
    return np.stack(
        [
            _count(truth, in_truth & in_predicted & (truth == predicted), num_classes),
            _count(truth, in_truth, num_classes),
            _count(predicted, in_predicted, num_classes),
        ],
        axis=1,
    )


def contour_counts(
    labels: NDArray[np.integer], predictions: NDArray[np.integer], num_classes: int, ignore_id: int
) -> Counts:
    """Pixels of outlines [K, 4]: of the ground truth's how many are near the prediction's, and all; then of the
    prediction's how many are near the ground truth's, and all. See `contour_f1`."""
    truth, predicted = _label_maps(labels, predictions, ignore_id)
    tolerance = _pixels(TOLERANCE_RATIO, labels.shape)
    outlines = [np.where(_near_other(ids, 1, edge_counts=False), ids, _NOWHERE) for ids in (truth, predicted)]
    counts = np.zeros((num_classes, 4), np.int64)
    for number in np.unique(np.concatenate([ids[ids != _NOWHERE] for ids in outlines])):
        of_truth, of_prediction = (np.argwhere(ids == number) for ids in outlines)
        counts[number] = (
            _num_near(of_truth, of_prediction, tolerance),
            len(of_truth),
            _num_near(of_prediction, of_truth, tolerance),
            len(of_prediction),
        )
    return counts


def contour_f1(counts: Counts) -> Figures:
    """Boundary F1 [..., K] from `contour_counts` [..., K, 4]: the harmonic mean of the shares of both outlines that
    are near each other; 0 where only one of them exists, nan where neither does."""
    near_truth, truth, near_prediction, prediction = np.moveaxis(counts.astype(np.float64), -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall, precision = near_truth / truth, near_prediction / prediction
        f1 = np.nan_to_num(2 * precision * recall / (precision + recall))
    return np.where(truth + prediction > 0, f1, np.nan)


def _label_maps(
    labels: NDArray[np.integer], predictions: NDArray[np.integer], ignore_id: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    valid = labels != ignore_id
    return (
        np.where(valid, labels.astype(np.int32), np.int32(_NOWHERE)),
        np.where(valid, predictions.astype(np.int32), np.int32(_NOWHERE)),
    )


def _pixels(ratio: float, shape: tuple[int, ...]) -> int:
    """A share of the diagonal in whole pixels, at least 1."""
    return max(1, round(ratio * math.hypot(*shape)))


def _near_other(ids: NDArray[np.int32], distance: int, *, edge_counts: bool) -> NDArray[np.bool_]:
    """Whether a pixel of another region (or the image's edge) is within `distance` in rows and columns, which is what
    `distance` erosions with a 3 x 3 square remove; False where `ids` is `_NOWHERE`.

    A window holds another id exactly if its largest or smallest one differs from the centre's, so the cost does not
    depend on the number of classes.
    """
    window = 2 * distance + 1
    beyond = np.iinfo(np.int32).max  # larger than any id: ignored pixels never are the smallest
    largest = maximum_filter(ids, window, mode="constant", cval=beyond if edge_counts else _NOWHERE)
    smallest = minimum_filter(np.where(ids == _NOWHERE, beyond, ids), window, mode="constant", cval=beyond)
    near: NDArray[np.bool_] = ((largest != ids) | (smallest != ids)) & (ids != _NOWHERE)
    return near


def _count(ids: NDArray[np.int32], where: NDArray[np.bool_], num_classes: int) -> Counts:
    return np.bincount(ids[where], minlength=num_classes).astype(np.int64)


def _num_near(points: NDArray[np.int64], others: NDArray[np.int64], distance: int) -> int:
    """How many of the points [N, 2] have one of the others within the (Euclidean) distance."""
    if not len(points) or not len(others):
        return 0
    nearest, _ = cKDTree(others).query(points, distance_upper_bound=distance + 1)
    return int((nearest <= distance).sum())
