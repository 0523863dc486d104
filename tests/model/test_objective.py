"""The losses against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from digseg.model.objective import area_score_loss, class_score_loss, dice_loss, one_hot, reconstruction_loss

LOG3 = math.log(3.0)


def test_class_score_loss_weighs_classes_and_skips_ignored_pixels() -> None:
    # Two pixels count: class 0 with p = 3/4 and class 1 with p = 1/4; the third is ignored.
    logits = torch.tensor([[[[LOG3, LOG3, -50.0]], [[0.0, 0.0, 50.0]]]])
    labels = torch.tensor([[[0, 1, 255]]])
    weights = torch.tensor([[1.0, 5.0]])
    expected = (1.0 * -math.log(3 / 4) + 5.0 * -math.log(1 / 4)) / 2
    assert class_score_loss(logits, labels, weights).item() == pytest.approx(expected)


def test_a_batch_without_a_label_costs_nothing_and_has_finite_gradients() -> None:
    logits = torch.zeros(1, 2, 4, 4, requires_grad=True)
    labels = torch.full((1, 4, 4), 255)
    loss = (
        class_score_loss(logits, labels, torch.ones(1, 2))
        + area_score_loss(logits, labels, torch.ones(1, 2))
        + reconstruction_loss(logits, torch.ones(1, 2, 4, 4), labels)
        + dice_loss(logits, labels)
    )
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0


def test_area_loss_takes_each_class_by_its_share_of_the_cell() -> None:
    # A cell of 2 x 2 pixels: three of class 0, one ignored -> cross-entropy of class 0 alone.
    logits = torch.tensor([[[[LOG3]], [[0.0]]]])
    labels = torch.tensor([[[0, 0], [0, 255]]])
    # share 3/4 of the cell; normalised by at least one whole cell
    assert area_score_loss(logits, labels, torch.ones(1, 2)).item() == pytest.approx(0.75 * -math.log(3 / 4))


def test_reconstruction_leaves_out_cells_with_an_ignored_pixel() -> None:
    estimate = torch.tensor([[[[1.0, 100.0]]]])
    target = torch.tensor([[[[3.0, 0.0]]]])
    labels = torch.tensor([[[0, 0, 0, 255], [0, 0, 0, 0]]])
    assert reconstruction_loss(estimate, target, labels).item() == pytest.approx(4.0)


def test_a_samples_weight_multiplies_its_error() -> None:
    estimate = torch.tensor([[[[1.0]]], [[[1.0]]]])
    target = torch.tensor([[[[3.0]]], [[[2.0]]]])
    labels = torch.zeros(2, 2, 2, dtype=torch.int64)
    weights = torch.tensor([0.5, 10.0])
    assert reconstruction_loss(estimate, target, labels, weights).item() == pytest.approx((0.5 * 4 + 10 * 1) / 2)


def test_dice_is_of_the_classes_shown_over_the_valid_pixels() -> None:
    # Class 0 has p = 3/4 and class 1 p = 1/4 everywhere; the third class is not shown, the third pixel is ignored.
    logits = torch.tensor([[[[LOG3, LOG3, -50.0]], [[0.0, 0.0, 50.0]], [[-60.0, -60.0, 0.0]]]])
    labels = torch.tensor([[[0, 1, 255]]])
    first, second = 2 * 0.75 / (1.5 + 1), 2 * 0.25 / (0.5 + 1)
    assert dice_loss(logits, labels).item() == pytest.approx(1 - (first + second) / 2)
    certain = torch.tensor([[[[50.0, -50.0, 0.0]], [[-50.0, 50.0, 0.0]], [[-60.0, -60.0, 0.0]]]])
    assert dice_loss(certain, labels).item() == pytest.approx(0, abs=1e-6)


def test_one_hot_is_empty_where_ignored() -> None:
    encoded = one_hot(torch.tensor([[[1, 255]]]), 3)
    assert encoded.tolist() == [[[[0.0, 0.0]], [[1.0, 0.0]], [[0.0, 0.0]]]]
