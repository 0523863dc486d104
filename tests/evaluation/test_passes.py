"""Vocabularies cut into passes, and the passes' scores merged."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from digseg.evaluation.passes import ANCHOR, merge_passes, plan_passes


@settings(deadline=None)
@given(st.data())
def test_every_class_is_asked_once_and_every_pass_has_the_anchor(data: st.DataObject) -> None:
    number = data.draw(st.integers(1, 400))
    background = data.draw(st.none() | st.integers(0, number - 1))
    held = data.draw(st.integers(2, 64))
    per_pass = data.draw(st.none() | st.integers(1, held - 1))
    passes = plan_passes(number, background, held, per_pass)
    assert max(map(len, passes)) <= held
    if len(passes) == 1:
        assert passes == (tuple(range(number)),)
        return
    anchor = ANCHOR if background is None else background
    assert {asked[0] for asked in passes} == {anchor}
    foreground = [number for _, *asked in passes for number in asked]
    assert foreground == [number for number in range(number) if number != background]
    sizes = {len(asked) for asked in passes}
    assert max(sizes) - min(sizes) <= 1
    assert len(passes) == -(-len(foreground) // min(held - 1, per_pass or held))


def test_a_hundred_and_fifty_classes_take_three_passes_of_the_palette() -> None:
    assert [len(asked) for asked in plan_passes(150, None, 64)] == [51, 51, 51]
    assert len(plan_passes(151, 0, 64)) == 3
    assert len(plan_passes(64, None, 64)) == 1


def test_one_class_a_pass_is_a_binary_question_each() -> None:
    assert plan_passes(3, 1, 64, classes_per_pass=1) == ((1, 0), (1, 2))
    assert plan_passes(3, None, 64, classes_per_pass=1) == ((ANCHOR, 0), (ANCHOR, 1), (ANCHOR, 2))


def test_merged_odds_are_those_of_the_product_of_the_passes() -> None:
    # One pixel. Pass 1: background 1/2, road 1/4, car 1/4; pass 2: background 1/5, sky 4/5.
    passes = ((0, 1, 2), (0, 3))
    logits = [torch.tensor([0.5, 0.25, 0.25]).log().view(3, 1, 1), torch.tensor([0.2, 0.8]).log().view(2, 1, 1)]
    merged = merge_passes(logits, passes, 4).softmax(0).flatten()
    products = torch.tensor([0.5 * 0.2, 0.25 * 0.2, 0.25 * 0.2, 0.8 * 0.5])
    assert merged.tolist() == pytest.approx((products / products.sum()).tolist())


@settings(deadline=None)
@given(st.integers(1, 12), st.none() | st.just(0), st.integers(0, 2**32 - 1))
def test_scores_that_do_not_depend_on_the_others_merge_to_one_pass(
    per_pass: int, background: int | None, seed: int
) -> None:
    scores = torch.randn(13, 2, 3, generator=torch.Generator().manual_seed(seed)).double()  # the last: the anchor
    passes = plan_passes(12, background, 64, per_pass)
    # Each pass adds what it likes to all of its scores: a softmax does not see it.
    logits = [scores[list(asked)] + 5.0 * number for number, asked in enumerate(passes)]
    torch.testing.assert_close(merge_passes(logits, passes, 12).softmax(0), scores[:12].softmax(0))
