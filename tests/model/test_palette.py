from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from digseg.model.palette import MAX_COLOURS, colour_logits, palette


@given(st.integers(2, MAX_COLOURS))
def test_every_prefix_is_the_same_colours_and_well_separated(count: int) -> None:
    colours = palette(count)
    assert torch.equal(colours, palette(MAX_COLOURS)[:count])
    distance = torch.cdist(colours, colours) + 10 * torch.eye(count)
    assert distance.min() >= 0.5


def test_one_class_against_the_rest_is_white_on_black() -> None:
    assert palette(2).tolist() == [[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]


def test_small_queries_are_separated_further() -> None:
    separation = {count: torch.pdist(palette(count)).min().item() for count in (4, 8, 64)}
    assert separation[4] > separation[8] > separation[64]


def test_sizes_outside_the_palette_are_refused() -> None:
    for count in (1, MAX_COLOURS + 1):
        with pytest.raises(ValueError, match="between 2 and 64"):
            palette(count)


def test_scores_of_a_painted_pixel_worked_out_by_hand() -> None:
    black, white = [-1.0] * 3, [1.0] * 3
    colours = torch.tensor([[black, white, [1.0, -1.0, -1.0]]])
    painted = torch.tensor([[[[-1.0, 0.0]], [[-1.0, 0.0]], [[-1.0, 0.0]]]])  # a black pixel, a grey one
    logits = colour_logits(painted, colours, torch.tensor([[True, True, False]]))
    assert logits[0, :, 0, 0].tolist() == [0.0, -32.0 * 12, -1e4]
    assert logits[0, :, 0, 1].tolist() == [-32.0 * 3, -32.0 * 3, -1e4]


def test_a_palette_asked_for_during_inference_serves_training() -> None:
    with torch.inference_mode():
        colours = palette(5)
    weight = torch.ones(3, requires_grad=True)
    (colours * weight).sum().backward()
    assert weight.grad is not None
