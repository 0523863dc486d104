"""Tallies add up, and survive being stored."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from digseg.evaluation.bootstrap import ImageTotals
from digseg.evaluation.tally import Tally

CLASSES = 4


def images(seed: int, number: int) -> list[Tally]:
    random = np.random.default_rng(seed)
    tallies = []
    for _ in range(number):
        shape = tuple(random.integers(3, 20, size=2))
        labels = random.choice([0, 1, 2, 255], size=shape).astype(np.uint8)
        predictions = random.integers(0, CLASSES, size=shape).astype(np.uint8)
        tallies.append(Tally.of_image(labels, predictions, random.random(shape, np.float32), CLASSES, 255))
    return tallies


def content(tally: Tally) -> list[list[int]]:
    arrays = [tally.confusion, tally.band, tally.contour, tally.reliability]
    arrays += [tally.images.image, tally.images.label, tally.images.totals]
    return [array.tolist() for array in arrays]


@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 8), max_size=4))
@settings(max_examples=25, deadline=None)
def test_any_cut_of_the_images_gives_the_same_tally(seed: int, cuts: list[int]) -> None:
    parts = images(seed, 8)
    bounds = [0, *sorted(cuts), 8]
    joined = [Tally.joined(parts[low:high], CLASSES) for low, high in itertools.pairwise(bounds) if low < high]
    whole = Tally.joined(parts, CLASSES)
    assert content(Tally.joined(joined, CLASSES)) == content(whole)
    assert whole.images.num_images == 8
    np.testing.assert_array_equal(whole.images.summed(CLASSES)[:, 1], whole.confusion.sum(axis=1))


def test_a_tally_survives_being_stored() -> None:
    tally = Tally.joined(images(0, 3), CLASSES)
    restored = Tally.from_bytes(tally.to_bytes())
    assert content(restored) == content(tally)
    assert restored.images.num_images == 3


def test_damaged_content_is_noticed() -> None:
    stored = Tally.joined(images(0, 3), CLASSES).to_bytes()
    for damaged in (b"", stored[: len(stored) // 2], b"x" * 100):
        with pytest.raises(ValueError, match=r"not a stored tally|pickled"):
            Tally.from_bytes(damaged)


def test_nothing_is_an_empty_tally() -> None:
    nothing = Tally.joined([], CLASSES)
    assert not nothing.confusion.any()
    assert nothing.images == ImageTotals(0, nothing.images.image, nothing.images.label, nothing.images.totals)
