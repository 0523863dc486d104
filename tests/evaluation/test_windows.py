"""Sliding windows: their places, and the blend against one that holds everything at once."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from digseg.evaluation.windows import blended, cuts


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 120), st.floats(0, 0.9))
def test_windows_cover_everything_and_weigh_one_everywhere(length: int, window: int, overlap: float) -> None:
    parts = cuts(length, window, overlap)
    side = min(window, length)
    assert {len(part.weights) for part in parts} == {side}
    starts = [part.start for part in parts]
    assert (starts[0], starts[-1]) == (0, length - side)
    # Evenly spaced, to a pixel, and never further apart than the overlap allows.
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    assert all(0 <= gap <= side * (1 - overlap) + 1 for gap in gaps)
    assert max(gaps, default=0) - min(gaps, default=0) <= 1
    assert sum(part.final for part in parts) == length
    total = torch.zeros(length)
    for part in parts:
        assert (part.weights > 0).all()
        total[part.start : part.start + side] += part.weights
    torch.testing.assert_close(total, torch.ones(length))


def test_two_windows_fade_linearly_into_each_other() -> None:
    first, second = cuts(6, 4, 0.5)
    assert (first.start, second.start) == (0, 2)
    # Over the two shared places the distances to the windows' borders are 1.5 : 0.5 and 0.5 : 1.5.
    assert first.weights.tolist() == pytest.approx([1, 1, 0.75, 0.25])
    assert second.weights.tolist() == pytest.approx([0.25, 0.75, 1, 1])


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(8, 40), st.floats(0, 0.8))
def test_the_stream_is_the_weighted_mean_of_all_windows(height: int, width: int, window: int, overlap: float) -> None:
    def answer(top: int, left: int, high: int, wide: int) -> torch.Tensor:
        return torch.rand(3, high, wide, generator=torch.Generator().manual_seed(1000 * top + left))

    whole = torch.zeros(3, height, width)
    for row in cuts(height, window, overlap):
        for column in cuts(width, window, overlap):
            weights = row.weights[:, None] * column.weights
            rows = slice(row.start, row.start + len(row.weights))
            columns = slice(column.start, column.start + len(column.weights))
            whole[:, rows, columns] += weights * answer(row.start, column.start, *weights.shape)
    seen = torch.zeros(height, width)
    for top, left, slab in blended(height, width, window, overlap, answer):
        rows, columns = slice(top, top + slab.shape[1]), slice(left, left + slab.shape[2])
        seen[rows, columns] += 1
        torch.testing.assert_close(slab, whole[:, rows, columns])
    assert (seen == 1).all()


def test_a_window_that_covers_the_image_answers_alone() -> None:
    said = torch.rand(2, 7, 9)
    ((top, left, slab),) = blended(7, 9, 9, 0.25, lambda *_: said)
    assert (top, left) == (0, 0)
    assert slab is said  # not a copy: it may be large
