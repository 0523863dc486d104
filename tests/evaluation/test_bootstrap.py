"""Resampling images, against datasets that are really drawn and SciPy's own bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from digseg.evaluation.bootstrap import ImageTotals, interval, resampled
from digseg.evaluation.metrics import Counts, mean_iou, pixel_accuracy


def totals_of(num_images: int, num_classes: int, seed: int = 0) -> Counts:
    """Class totals [N, K, 3] of images in which about half of the classes occur."""
    random = np.random.default_rng(seed)
    truth, predicted = random.integers(1, 500, (2, num_images, num_classes))
    hits = (random.random((num_images, num_classes)) * np.minimum(truth, predicted)).astype(np.int64)
    totals = np.stack([hits, truth, predicted], axis=-1)
    return totals * (random.random((num_images, num_classes, 1)) < 0.5)


def sparse(totals: Counts) -> ImageTotals:
    return ImageTotals.joined([ImageTotals.of_image(image) for image in totals])


def test_sums_and_single_images_are_those_of_dense_arrays() -> None:
    totals = totals_of(13, 6)
    totals[4] = 0  # an image without a labelled pixel
    images = sparse(totals)
    assert images.num_images == 13
    np.testing.assert_array_equal(images.summed(6), totals.sum(0))
    weights = np.random.default_rng(1).integers(0, 4, (5, 13))
    np.testing.assert_array_equal(images.summed(6, weights), np.einsum("bn,nkc->bkc", weights, totals))
    np.testing.assert_array_equal(images.per_image(6, mean_iou), mean_iou(totals))
    assert math.isnan(images.per_image(6, mean_iou)[4])


def test_a_resample_is_a_dataset_drawn_with_replacement() -> None:
    totals = totals_of(9, 4)
    drawn = resampled(sparse(totals), 4, mean_iou, resamples=130, seed=(3, 7))
    random = np.random.default_rng([3, 7])
    weights = np.concatenate([random.multinomial(9, np.full(9, 1 / 9), size=size) for size in (64, 64, 2)])
    expected = []
    for counts in weights:
        dataset = np.repeat(totals, counts, axis=0)
        assert len(dataset) == 9
        expected.append(mean_iou(dataset.sum(0)))
    np.testing.assert_allclose(drawn, expected)


def test_the_interval_is_that_of_scipy() -> None:
    totals = totals_of(60, 3, seed=5)
    ours = interval(resampled(sparse(totals), 3, pixel_accuracy, resamples=4000))

    def accuracy(indexes: np.ndarray) -> float:
        return float(pixel_accuracy(totals[indexes].sum(0)))

    theirs = scipy.stats.bootstrap(
        (np.arange(60),), accuracy, vectorized=False, method="percentile", n_resamples=4000, rng=0
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.06 * width)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        hits = random.binomial(100, random.beta(8, 2, size=40))
        totals = np.stack([hits, np.full(40, 100), hits], axis=-1)[:, None, :]
        low, high = interval(resampled(sparse(totals), 1, pixel_accuracy, resamples=300, seed=(trial,)))
        covered += low <= 0.8 <= high
    assert 0.89 <= covered / 200 <= 0.985


def test_two_models_get_the_same_draws() -> None:
    totals = totals_of(20, 3)
    better = totals.copy()
    better[..., 0] = np.minimum(totals[..., 1], totals[..., 2])
    first, second = (resampled(sparse(part), 3, mean_iou, resamples=200) for part in (totals, better))
    assert (second > first).all()


def test_a_single_image_has_no_spread_and_none_has_no_interval() -> None:
    one = sparse(totals_of(1, 3, seed=2))
    low, high = interval(resampled(one, 3, mean_iou, resamples=50))
    assert low == high == mean_iou(one.summed(3))
    assert all(math.isnan(end) for end in interval(np.full(5, np.nan)))
