"""Reliability counts against torchmetrics and hand-computed values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from digseg.evaluation.calibration import NUM_BINS, Reliability, reliability_counts

IGNORE = 255


@pytest.mark.parametrize("num_classes", [2, 6])
def test_expected_error_is_that_of_torchmetrics(num_classes: int) -> None:
    random = np.random.default_rng(num_classes)
    reference = MulticlassCalibrationError(num_classes, n_bins=NUM_BINS, norm="l1", ignore_index=IGNORE)
    counts = np.zeros((NUM_BINS, 3), np.int64)
    for _ in range(4):
        scores = random.dirichlet(np.full(num_classes, 0.6), size=(19, 23)).astype(np.float32)
        labels = random.integers(0, num_classes, (19, 23)).astype(np.uint8)
        labels = np.where(random.random(labels.shape) < 0.4, scores.argmax(-1), labels).astype(np.uint8)
        labels[random.random(labels.shape) < 0.1] = IGNORE
        counts += reliability_counts(labels, scores.argmax(-1), scores.max(-1), IGNORE)
        reference.update(
            torch.from_numpy(scores).reshape(-1, num_classes), torch.from_numpy(labels.astype(np.int64)).flatten()
        )
    assert Reliability.of(counts).expected_error() == pytest.approx(float(reference.compute()), abs=1e-6)


def test_hand_computed_bins() -> None:
    labels = np.array([[0, 1, 1, IGNORE]], np.uint8)
    predictions = np.array([[0, 1, 0, 0]], np.uint8)
    confidence = np.array([[1.0, 0.75, 0.75, 0.1]], np.float32)
    counts = reliability_counts(labels, predictions, confidence, IGNORE)
    assert counts[:, 0].sum() == 3
    assert counts[14].tolist() == [1, 1, 1 << 24]
    assert counts[11].tolist() == [2, 1, 3 << 23]  # 0.75 is in (11 / 15, 12 / 15]
    diagram = Reliability.of(counts)
    assert diagram.share[11] == pytest.approx(2 / 3)
    assert (diagram.accuracy[11], diagram.confidence[11]) == (0.5, 0.75)
    assert math.isnan(diagram.accuracy[0])
    assert diagram.expected_error() == pytest.approx(2 / 3 * 0.25)


def test_sums_do_not_depend_on_the_order_of_images() -> None:
    random = np.random.default_rng(0)
    images = [
        (random.integers(0, 3, (8, 8)), random.integers(0, 3, (8, 8)), random.random((8, 8), np.float32))
        for _ in range(50)
    ]
    forward, backward = (sum(reliability_counts(*image, IGNORE) for image in order) for order in (images, images[::-1]))
    np.testing.assert_array_equal(forward, backward)


def test_nothing_counted_gives_nan() -> None:
    nothing = np.full((2, 2), IGNORE, np.uint8)
    counts = reliability_counts(nothing, nothing * 0, np.ones((2, 2), np.float32), IGNORE)
    assert math.isnan(Reliability.of(counts).expected_error())
