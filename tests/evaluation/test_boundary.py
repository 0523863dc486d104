"""Boundary figures against the definition of Cheng et al. done with erosions, and outlines matched by distance maps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import find_boundaries

from digseg.evaluation.boundary import band_totals, contour_counts, contour_f1
from digseg.evaluation.metrics import class_iou

IGNORE = 255


def blobs(seed: int, num_classes: int, shape: tuple[int, int], ignored: bool) -> tuple[NDArray, NDArray]:
    """Smooth random regions, and a prediction of them with other outlines."""
    random = np.random.default_rng(seed)
    fields = ndimage.gaussian_filter(random.normal(size=(num_classes, *shape)), (0, 4, 4))
    other = fields + 0.6 * ndimage.gaussian_filter(random.normal(size=fields.shape), (0, 3, 3))
    labels = fields.argmax(0).astype(np.uint8)
    if ignored:
        labels[ndimage.gaussian_filter(random.normal(size=shape), 4) > 0.1] = IGNORE
    return labels, other.argmax(0).astype(np.uint8)


def cheng_band(mask: NDArray, distance: int) -> NDArray:
    """`mask_to_boundary` of the authors' code, with SciPy's erosion for OpenCV's."""
    padded = np.pad(mask, 1)
    eroded = ndimage.binary_erosion(padded, np.ones((3, 3)), iterations=distance)
    return mask & ~eroded[1:-1, 1:-1]


@pytest.mark.parametrize("shape", [(48, 64), (90, 41), (7, 9)])
@pytest.mark.parametrize("num_classes", [2, 5])
def test_boundary_iou_is_that_of_eroded_masks(shape: tuple[int, int], num_classes: int) -> None:
    labels, predictions = blobs(num_classes, num_classes, shape, ignored=False)
    distance = max(1, round(0.02 * np.hypot(*shape)))
    expected = []
    for number in range(num_classes):
        truth, predicted = (cheng_band(ids == number, distance) for ids in (labels, predictions))
        union = (truth | predicted).sum()
        expected.append((truth & predicted).sum() / union if union else np.nan)
    np.testing.assert_allclose(class_iou(band_totals(labels, predictions, num_classes, IGNORE)), expected)


def distance_map_counts(labels: NDArray, predictions: NDArray, num_classes: int, tolerance: int) -> NDArray:
    outlines = [find_boundaries(ids, connectivity=2, mode="thick") for ids in (labels, predictions)]
    counts = []
    for number in range(num_classes):
        truth, predicted = ((ids == number) & o for ids, o in zip((labels, predictions), outlines, strict=True))
        row = []
        for points, others in ((truth, predicted), (predicted, truth)):
            near = ndimage.distance_transform_edt(~others) <= tolerance if others.any() else np.zeros_like(others)
            row += [(points & near).sum(), points.sum()]
        counts.append(row)
    return np.array(counts)


@pytest.mark.parametrize("shape", [(48, 64), (300, 260)])
def test_outlines_are_matched_as_by_distance_maps(shape: tuple[int, int]) -> None:
    labels, predictions = blobs(3, 4, shape, ignored=False)
    tolerance = max(1, round(0.0075 * np.hypot(*shape)))
    counts = contour_counts(labels, predictions, 4, IGNORE)
    np.testing.assert_array_equal(counts, distance_map_counts(labels, predictions, 4, tolerance))
    assert (counts[:, 0] < counts[:, 1]).all()
    near_truth, truth, near_prediction, prediction = counts.T
    recall, precision = near_truth / truth, near_prediction / prediction
    np.testing.assert_allclose(contour_f1(counts), 2 * precision * recall / (precision + recall))


def test_hand_computed_counts_beside_ignored_pixels() -> None:
    labels = np.zeros((5, 8), np.uint8)
    labels[:, 4:] = 1
    labels[:, 6:] = IGNORE
    predictions = np.zeros((5, 8), np.uint8)
    predictions[:, 5:] = 1
    # d = 1: columns 0 (edge of the image) and 3 of class 0, 4 of class 1, and rows 0 and 4; column 5 borders on what
    # is ignored, so only its ends are near an outline.
    np.testing.assert_array_equal(
        band_totals(labels, predictions, 2, IGNORE), [[2 + 5 + 2 + 2, 14, 5 + 5 + 2 * 3], [2, 5 + 2, 5]]
    )
    # Outlines: column 3 and 4 in the ground truth, 4 and 5 in the prediction; the tolerance is 1 pixel.
    np.testing.assert_array_equal(contour_counts(labels, predictions, 2, IGNORE), [[5, 5, 5, 5], [5, 5, 5, 5]])


@given(seed=st.integers(0, 10_000), num_classes=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_what_is_predicted_under_ignored_pixels_does_not_matter(seed: int, num_classes: int) -> None:
    labels, predictions = blobs(seed, num_classes, (30, 37), ignored=True)
    changed = np.where(labels == IGNORE, (predictions + 1) % num_classes, predictions)
    for counted in (band_totals, contour_counts):
        np.testing.assert_array_equal(
            counted(labels, predictions, num_classes, IGNORE), counted(labels, changed, num_classes, IGNORE)
        )


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_a_perfect_prediction_has_full_marks_and_an_absent_class_none(seed: int) -> None:
    labels, _ = blobs(seed, 3, (40, 33), ignored=True)
    perfect = np.where(labels == IGNORE, 0, labels)
    present = np.isin(np.arange(4), labels)
    iou = class_iou(band_totals(labels, perfect, 4, IGNORE))
    f1 = contour_f1(contour_counts(labels, perfect, 4, IGNORE))
    assert (iou[present & ~np.isnan(iou)] == 1).all()
    assert (f1[present & ~np.isnan(f1)] == 1).all()
    assert np.isnan(iou[~present]).all()
    assert np.isnan(f1[~present]).all()


def test_an_image_without_labels_counts_nothing() -> None:
    nothing = np.full((6, 6), IGNORE, np.uint8)
    assert not band_totals(nothing, np.zeros_like(nothing), 2, IGNORE).any()
    assert not contour_counts(nothing, np.zeros_like(nothing), 2, IGNORE).any()


def test_an_outline_that_is_only_predicted_scores_zero() -> None:
    labels = np.zeros((20, 20), np.uint8)
    predictions = labels.copy()
    predictions[5:10, 5:10] = 1
    f1 = contour_f1(contour_counts(labels, predictions, 3, IGNORE))
    np.testing.assert_array_equal(f1, [0.0, 0.0, np.nan])
