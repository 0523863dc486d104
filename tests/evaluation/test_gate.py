"""Verdicts on pairs of models whose differences are known."""

from __future__ import annotations

import numpy as np
import pytest

from digseg.config import Gate
from digseg.evaluation.gate import judge
from digseg.evaluation.tally import Tally

DOMAINS = {"street": "natural", "town": "natural", "cells": "medical"}


def tally(accuracy: float, images: int = 60) -> Tally:
    """A model that gets this share of each image's pixels right."""
    labels = np.zeros((20, 50), np.uint8)
    labels[:, 25:] = 1
    predictions = labels.copy()
    wrong = round((1 - accuracy) * labels.size)
    predictions.flat[:wrong] = 1 - predictions.flat[:wrong]
    image = Tally.of_image(labels, predictions, np.ones(labels.shape, np.float32), 2, 255)
    return Tally.joined([image] * images, 2)


def model(street: float, town: float, cells: float) -> dict[str, Tally]:
    return {name: tally(figure) for name, figure in (("street", street), ("town", town), ("cells", cells))}


CHAMPION = model(0.7, 0.7, 0.7)


@pytest.mark.parametrize(
    ("challenger", "failing"),
    [
        (model(0.75, 0.72, 0.8), set()),
        (model(0.7, 0.7, 0.7), {"mean"}),  # no gain
        (model(0.6, 0.6, 0.9), {"natural"}),  # a domain pays for another
        (model(0.95, 0.6, 0.75), set()),  # within a domain one corpus may pay for another
        (model(0.5, 0.5, 0.5), {"mean", "medical", "natural"}),
    ],
)
def test_every_domain_and_the_mean_have_to_pass(challenger: dict[str, Tally], failing: set[str]) -> None:
    verdict = judge(Gate(), CHAMPION, challenger, DOMAINS)
    assert [row.scope for row in verdict.requirements] == ["medical", "natural", "mean"]
    assert {row.scope for row in verdict.requirements if not row.passed} == failing
    assert verdict.passed == (not failing)
    assert verdict.as_json()["passed"] == verdict.passed


def test_differences_are_means_of_the_corpora() -> None:
    verdict = judge(Gate(), CHAMPION, model(0.8, 0.7, 0.7), DOMAINS)
    rows = {row.scope: row for row in verdict.requirements}
    assert rows["natural"].corpora == ("street", "town")
    street = judge(Gate(), {"street": CHAMPION["street"]}, {"street": tally(0.8)}, {"street": "natural"}).requirements[
        -1
    ]
    assert rows["natural"].difference == pytest.approx(street.difference / 2)
    assert rows["mean"].difference == pytest.approx(street.difference / 3)
    assert (rows["medical"].difference, rows["medical"].bound) == (0, 0)


@pytest.mark.parametrize(("images", "passed"), [(6, False), (400, True)])
def test_a_gain_counts_only_if_enough_images_show_it(images: int, passed: bool) -> None:
    """The same gain of 2 points, which varies by 10 from image to image."""
    gains = 0.02 + 0.1 * np.random.default_rng(1).standard_normal(images)
    gains += 0.02 - gains.mean()
    challenger = Tally.joined([tally(0.7 + gain, images=1) for gain in gains], 2)
    verdict = judge(Gate(), {"street": tally(0.7, images=images)}, {"street": challenger}, {"street": "natural"})
    assert verdict.requirements[-1].difference > 0.01
    assert verdict.passed == passed


def test_stricter_gates_pass_less() -> None:
    challenger = model(0.72, 0.71, 0.7)
    assert judge(Gate(), CHAMPION, challenger, DOMAINS).passed
    assert not judge(Gate(min_gain=0.05), CHAMPION, challenger, DOMAINS).passed
    assert not judge(Gate(max_drop=0), CHAMPION, model(0.9, 0.9, 0.699), DOMAINS).passed
    assert judge(Gate(max_drop=0), CHAMPION, model(0.9, 0.9, 0.7), DOMAINS).passed  # which loses nothing


def test_different_images_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different images"):
        judge(Gate(), {"street": tally(0.7, images=5)}, {"street": tally(0.7, images=6)}, {"street": "natural"})
