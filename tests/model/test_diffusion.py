"""The multi-step objective against values worked out by hand and diffusers' schedulers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from digseg.config import DiffusionConfig
from digseg.errors import DigSegError
from digseg.model.diffusion import (
    NoisyMask,
    add_noise,
    compose,
    draw_noise,
    loss_weights,
    multi_resolution_noise,
    noise_schedule,
)

BASE: Any = DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
)
TYPES = ("sample", "v_prediction", "epsilon")


def test_the_schedule_ends_in_pure_noise_and_keeps_its_first_step() -> None:
    """Algorithm 1 of Lin et al.: sqrt(a) is shifted and scaled so that its last value is 0 and its first stays."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    signal = noise_schedule(BASE, DiffusionConfig()).alphas_cumprod
    torch.testing.assert_close(signal, expected.float(), atol=1e-5, rtol=1e-3)
    assert signal[-1] == 0
    assert noise_schedule(BASE, DiffusionConfig(zero_terminal_snr=False)).alphas_cumprod[-1] == pytest.approx(
        0.00466, rel=1e-2
    )


def test_a_unet_that_predicts_noise_needs_a_signal_at_every_timestep() -> None:
    base = DDIMScheduler.from_config(BASE.config, prediction_type="epsilon")
    with pytest.raises(DigSegError, match="zero_terminal_snr is true, but this U-Net predicts the noise"):
        noise_schedule(base, DiffusionConfig())
    assert noise_schedule(base, DiffusionConfig(zero_terminal_snr=False)).config.prediction_type == "sample"


def test_sampling_begins_at_the_last_timestep() -> None:
    schedule = noise_schedule(BASE, DiffusionConfig())
    for steps, expected in ((1, [999]), (4, [999, 749, 499, 249]), (3, [999, 666, 332])):
        schedule.set_timesteps(steps)
        assert schedule.timesteps.tolist() == expected


@pytest.mark.parametrize("kind", TYPES)
def test_what_the_unet_should_answer_gives_the_clean_mask(kind: str) -> None:
    """The targets are those of diffusers on the residual of x_0."""
    random = torch.Generator().manual_seed(0)
    clean, posterior, noise = (torch.randn(2, 3, 4, 4, generator=random) for _ in range(3))
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    timesteps = torch.tensor([10, 700])
    signal = schedule.alphas_cumprod[timesteps]
    residual = clean - posterior
    target = {
        "sample": residual,
        "v_prediction": schedule.get_velocity(residual, noise, timesteps),
        "epsilon": noise,
    }[kind]
    noisy = add_noise(clean, noise, signal)
    torch.testing.assert_close(noisy, schedule.add_noise(clean, noise, timesteps))
    estimate = compose(target, NoisyMask(noisy, timesteps, signal, kind), posterior)
    torch.testing.assert_close(estimate, clean, atol=1e-4, rtol=1e-4)


def test_composition_by_hand() -> None:
    # a = 0.64: sqrt(a) = 0.8, sqrt(1 - a) = 0.6.
    values = {"sample": 2 + 1, "v_prediction": 0.8 * 5 - 0.6 * 1 + 0.36 * 2, "epsilon": (5 - 0.6 * 1) / 0.8}
    for kind, expected in values.items():
        one = torch.ones(1, 1, 1, 1)
        noisy = NoisyMask(5 * one, torch.tensor([0]), torch.tensor([0.64]), kind)
        assert compose(one, noisy, 2 * one).item() == pytest.approx(expected)


def test_loss_weights_by_hand() -> None:
    signal = torch.tensor([0.0, 0.5, 0.9])  # snr 0, 1, 9
    expected = {"sample": [1, 1, 1], "v_prediction": [1, 2, 10], "epsilon": [0, 1, 9]}
    for kind in TYPES:
        assert loss_weights(signal, kind, None).tolist() == pytest.approx(expected[kind])
        assert loss_weights(signal, kind, 5.0).tolist() == pytest.approx([0, 1, 5])


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_the_weighted_error_of_x0_is_the_error_of_the_parametrisation(kind: str) -> None:
    random = torch.Generator().manual_seed(0)
    clean, noise, output, posterior = (torch.randn(1, 2, 3, 3, generator=random) for _ in range(4))
    signal = torch.tensor([0.3])
    root, rest = math.sqrt(0.3), math.sqrt(0.7)
    noisy = NoisyMask(add_noise(clean, noise, signal), torch.tensor([0]), signal, kind)
    residual = clean - posterior
    target = noise if kind == "epsilon" else root * noise - rest * residual
    error = (compose(output, noisy, posterior) - clean).square() * loss_weights(signal, kind, None)
    torch.testing.assert_close(error, (output - target).square())


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.integers(0, 10**12))
def test_noise_is_a_function_of_seed_and_position(seed: int, position: int) -> None:
    together, timesteps = draw_noise(torch.Size([2, 3, 8, 8]), torch.tensor([position, position + 1]), 1000, seed, 0.9)
    alone, timestep = draw_noise(torch.Size([1, 3, 8, 8]), torch.tensor([position + 1]), 1000, seed, 0.9)
    assert torch.equal(together[1], alone[0])
    assert timesteps[1] == timestep[0]
    assert not torch.equal(together[0], together[1])


def test_timesteps_are_uniform() -> None:
    _, timesteps = draw_noise(torch.Size([2000, 1, 1, 1]), torch.arange(2000), 1000, 0, 0.0)
    assert timesteps.min() < 5
    assert timesteps.max() > 994
    assert timesteps.float().mean().item() == pytest.approx(499.5, abs=25)  # standard error: 6.5


def test_multi_resolution_noise_has_variance_one_and_more_low_frequencies() -> None:
    shape = torch.Size([4, 64, 64])
    plain, coarse = (multi_resolution_noise(shape, s, torch.Generator().manual_seed(0)) for s in (0.0, 0.9))
    assert torch.equal(plain, torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert coarse.std().item() == pytest.approx(1.0, abs=1e-4)
    blocks = [torch.nn.functional.avg_pool2d(noise, 16).std().item() for noise in (plain, coarse)]
    assert blocks[0] == pytest.approx(1 / 16, rel=0.4)
    assert blocks[1] > 4 * blocks[0]
