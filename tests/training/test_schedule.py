"""The learning rate against values worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from digseg.config import TrainingConfig
from digseg.training.schedule import learning_rate


def _config(steps: int, warmup: int, ratio: float = 0.1, peak: float = 2.0) -> TrainingConfig:
    return TrainingConfig(steps=steps, warmup_steps=warmup, final_learning_rate_ratio=ratio, learning_rate=peak)


def test_warm_up_is_linear_and_ends_at_the_full_rate() -> None:
    config = _config(steps=100, warmup=4)
    assert [learning_rate(step, config) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]


def test_cosine_passes_half_way_and_ends_at_the_ratio() -> None:
    config = _config(steps=104, warmup=4)
    # Half of the 100 steps after the warm-up: the mean of 2.0 and 0.2.
    assert learning_rate(53, config) == pytest.approx(1.1)
    # A quarter: cos(pi/4) = 0.70711.
    assert learning_rate(28, config) == pytest.approx(0.2 + 1.8 * (1 + math.sqrt(0.5)) / 2)
    assert learning_rate(103, config) == pytest.approx(0.2)


def test_without_warm_up_the_first_step_is_already_on_the_cosine() -> None:
    config = _config(steps=10, warmup=0, ratio=0.0, peak=1.0)
    assert learning_rate(0, config) == pytest.approx((1 + math.cos(math.pi / 10)) / 2)
    assert learning_rate(9, config) == pytest.approx(0.0, abs=1e-12)


def test_a_run_shorter_than_its_warm_up_only_warms_up() -> None:
    config = _config(steps=3, warmup=10)
    assert [learning_rate(step, config) for step in range(3)] == pytest.approx([0.2, 0.4, 0.6])


@given(steps=st.integers(1, 500), warmup=st.integers(0, 600), ratio=st.floats(0, 1), step=st.integers(0, 600))
def test_rate_never_leaves_its_bounds_and_falls_after_the_warm_up(
    steps: int, warmup: int, ratio: float, step: int
) -> None:
    config = _config(steps, warmup, ratio, peak=1.0)
    rate = learning_rate(step, config)
    assert 0.0 <= rate <= 1.0 + 1e-12
    if step >= warmup:
        assert rate >= ratio - 1e-12
        assert learning_rate(step + 1, config) <= rate + 1e-12
