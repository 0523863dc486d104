"""ConfusionMatrix against torchmetrics, hand-computed values and its own algebra."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassJaccardIndex,
)

from digseg.evaluation.metrics import (
    ConfusionMatrix,
    class_accuracy,
    class_dice,
    frequency_weighted_iou,
    harmonic_mean,
    mean_accuracy,
    mean_dice,
    mean_iou,
    pixel_accuracy,
)


def _random_maps(seed: int, num_classes: int, images: int = 6) -> list[tuple[NDArray, NDArray]]:
    random = np.random.default_rng(seed)
    maps = []
    for _ in range(images):
        shape = tuple(random.integers(5, 40, size=2))
        labels = random.integers(0, num_classes, size=shape).astype(np.uint8)
        predictions = np.where(random.random(shape) < 0.6, labels, random.integers(0, num_classes, size=shape)).astype(
            np.uint8
        )
        labels[random.random(shape) < 0.1] = 255
        maps.append((labels, predictions))
    return maps


@pytest.mark.parametrize("num_classes", [2, 7, 19])
def test_all_figures_agree_with_torchmetrics(num_classes: int) -> None:
    maps = _random_maps(seed=num_classes, num_classes=num_classes)
    matrix = ConfusionMatrix(num_classes)
    reference = MulticlassConfusionMatrix(num_classes, ignore_index=255)
    jaccard = MulticlassJaccardIndex(num_classes, average="none", ignore_index=255)
    mean_jaccard = MulticlassJaccardIndex(num_classes, average="macro", ignore_index=255)
    accuracy = MulticlassAccuracy(num_classes, average="micro", ignore_index=255)
    for labels, predictions in maps:
        matrix.update(labels, predictions)
        target = torch.from_numpy(labels.astype(np.int64)).flatten()
        for metric in (reference, jaccard, mean_jaccard, accuracy):
            metric.update(torch.from_numpy(predictions.astype(np.int64)).flatten(), target)
    np.testing.assert_array_equal(matrix.counts, reference.compute().numpy())
    np.testing.assert_allclose(matrix.iou(), jaccard.compute().numpy(), rtol=1e-6)
    assert matrix.mean_iou() == pytest.approx(float(mean_jaccard.compute()), rel=1e-6)
    assert matrix.pixel_accuracy() == pytest.approx(float(accuracy.compute()), rel=1e-6)


def test_hand_computed_values_with_ignore_and_an_absent_class() -> None:
    matrix = ConfusionMatrix(4)
    matrix.update(np.array([[0, 0, 1], [1, 255, 255]], np.uint8), np.array([[0, 1, 1], [2, 3, 0]], np.uint8))
    # class 0: 1 / 2; class 1: 1 / 3; class 2 is only predicted: 0 / 1; class 3 only under ignored pixels.
    np.testing.assert_allclose(matrix.iou(), [1 / 2, 1 / 3, 0.0, np.nan])
    assert matrix.mean_iou() == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert matrix.pixel_accuracy() == pytest.approx(2 / 4)


def test_nothing_counted_gives_nan_and_no_warning() -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(np.full((4, 4), 255, np.uint8), np.zeros((4, 4), np.uint8))
    assert math.isnan(matrix.mean_iou())
    assert math.isnan(matrix.pixel_accuracy())
    assert np.isnan(matrix.iou()).all()


@given(seed=st.integers(0, 2**32 - 1), num_classes=st.integers(1, 9), cut=st.integers(0, 6))
@settings(max_examples=30, deadline=None)
def test_merging_parts_equals_counting_all_at_once(seed: int, num_classes: int, cut: int) -> None:
    maps = _random_maps(seed, num_classes)
    whole, first, second = (ConfusionMatrix(num_classes) for _ in range(3))
    for number, (labels, predictions) in enumerate(maps):
        whole.update(labels, predictions)
        (first if number < cut else second).update(labels, predictions)
    np.testing.assert_array_equal((second + first).counts, whole.counts)
    first.merge(second)
    np.testing.assert_array_equal(first.counts, whole.counts)


def test_sixteen_bit_masks_with_their_own_ignore_id() -> None:
    matrix = ConfusionMatrix(300, ignore_id=65535)
    matrix.update(np.array([255, 299, 65535], np.uint16), np.array([255, 255, 0], np.uint16))
    assert matrix.counts.sum() == 2
    assert matrix.iou()[255] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        (np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8), "differ in shape"),
        (np.full((2, 2), 3, np.uint8), np.zeros((2, 2), np.uint8), "label ids reach from 3 to 3"),
        (np.zeros((2, 2), np.uint8), np.full((2, 2), 7, np.uint8), "prediction ids reach from 7 to 7"),
    ],
)
def test_unusable_arrays_are_refused(labels: NDArray, predictions: NDArray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConfusionMatrix(3).update(labels, predictions)


def test_matrices_of_different_vocabularies_do_not_merge() -> None:
    with pytest.raises(ValueError, match="3 and 4 classes"):
        ConfusionMatrix(3).merge(ConfusionMatrix(4))


@pytest.mark.parametrize("num_classes", [2, 7, 19])
def test_accuracies_and_dice_agree_with_torchmetrics(num_classes: int) -> None:
    matrix = ConfusionMatrix(num_classes)
    dice, accuracy = (
        kind(num_classes, average="none", ignore_index=255) for kind in (MulticlassF1Score, MulticlassAccuracy)
    )
    mean = MulticlassAccuracy(num_classes, average="macro", ignore_index=255)
    weighted = MulticlassJaccardIndex(num_classes, average="weighted", ignore_index=255)
    for labels, predictions in _random_maps(seed=num_classes, num_classes=num_classes):
        matrix.update(labels, predictions)
        for metric in (dice, accuracy, mean, weighted):
            metric.update(*(torch.from_numpy(ids.astype(np.int64)).flatten() for ids in (predictions, labels)))
    totals = matrix.totals()
    np.testing.assert_allclose(class_dice(totals), dice.compute().numpy(), rtol=1e-6)
    np.testing.assert_allclose(class_accuracy(totals), accuracy.compute().numpy(), rtol=1e-6)
    assert mean_accuracy(totals) == pytest.approx(float(mean.compute()), rel=1e-6)
    assert frequency_weighted_iou(totals) == pytest.approx(float(weighted.compute()), rel=1e-6)


def test_hand_computed_dice_and_accuracies_with_an_absent_class() -> None:
    matrix = ConfusionMatrix(4)
    matrix.update(np.array([[0, 0, 1], [1, 255, 255]], np.uint8), np.array([[0, 1, 1], [2, 3, 0]], np.uint8))
    totals = matrix.totals()
    np.testing.assert_array_equal(totals, [[1, 2, 1], [1, 2, 2], [0, 0, 1], [0, 0, 0]])
    np.testing.assert_allclose(class_dice(totals), [2 / 3, 2 / 4, 0.0, np.nan])
    np.testing.assert_allclose(class_accuracy(totals), [1 / 2, 1 / 2, np.nan, np.nan])
    assert mean_dice(totals) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert mean_accuracy(totals) == pytest.approx(1 / 2)
    assert frequency_weighted_iou(totals) == pytest.approx(0.5 * 1 / 2 + 0.5 * 1 / 3)


def test_figures_of_many_resamples_are_those_of_each() -> None:
    totals = np.stack([_matrix_of(seed).totals() for seed in range(5)]).reshape(5, 1, 7, 3)
    for figure in (mean_iou, mean_dice, mean_accuracy, pixel_accuracy, frequency_weighted_iou):
        assert figure(totals).shape == (5, 1)
        np.testing.assert_array_equal(figure(totals)[:, 0], [figure(one[0]) for one in totals])


def test_no_pixels_give_nan_for_every_figure() -> None:
    nothing = np.zeros((3, 3), np.int64)
    for figure in (mean_iou, mean_dice, mean_accuracy, pixel_accuracy, frequency_weighted_iou):
        assert np.isnan(figure(nothing))


def test_harmonic_mean_is_that_of_the_standard_library() -> None:
    for first, second in ((0.5, 0.25), (0.0, 0.7), (0.3, 0.3)):
        assert harmonic_mean(first, second) == pytest.approx(statistics.harmonic_mean([first, second]))
    assert harmonic_mean(0.0, 0.0) == 0.0
    assert math.isnan(harmonic_mean(0.5, math.nan))


def _matrix_of(seed: int) -> ConfusionMatrix:
    matrix = ConfusionMatrix(7)
    for labels, predictions in _random_maps(seed, 7, images=2):
        matrix.update(labels, predictions)
    return matrix
