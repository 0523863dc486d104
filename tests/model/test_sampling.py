"""Sampling of masks: training makes a model that denoises, and DDIM follows its estimates."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_world import small_config

from digseg.config import Config, DiffusionConfig, ModelConfig
from digseg.model import build_segmenter
from digseg.model.denoiser import build_scheduler
from digseg.model.diffusion import noise_schedule
from digseg.model.palette import palette
from digseg.model.sampling import Sampling, sample_logits
from digseg.model.segmenter import SegmenterOutput
from digseg.model.training_module import SegmenterLoss


class Known:
    """A segmenter that knows the mask, and notes what it is asked."""

    def __init__(self, clean: torch.Tensor) -> None:
        self.clean, self.asked = clean, []
        self.scheduler = build_scheduler(ModelConfig())

    def __call__(self, *arguments: object) -> SegmenterOutput:
        state = arguments[-1]
        self.asked.append((int(state.timesteps[0]), state.latents.clone()))
        logits = torch.stack([state.latents.mean((1, 2, 3)), torch.zeros(len(self.clean))], 1)[..., None, None]
        return SegmenterOutput(logits, (), self.clean)


def _known(steps: int, **options: int) -> tuple[Known, torch.Tensor]:
    clean = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    known = Known(clean)
    how = Sampling(DiffusionConfig(), steps, **options)
    none = torch.zeros(2, 1)
    return known, sample_logits(known, none, none, none, none, torch.zeros_like(clean), how)


def test_steps_go_from_noise_to_the_estimate() -> None:
    known, _ = _known(4)
    assert [timestep for timestep, _ in known.asked] == [999, 749, 499, 249]
    noise = known.asked[0][1]
    assert torch.equal(noise[0], noise[1])
    assert noise.std().item() == pytest.approx(1, abs=0.2)
    distances = [(latents - known.clean).square().mean().item() for _, latents in known.asked]
    assert distances == sorted(distances, reverse=True)
    # DDIM, eta 0: x_s = sqrt(a_s) x_0 + sqrt(1 - a_s) noise, as pure noise is what x_999 is.
    signal = noise_schedule(known.scheduler, DiffusionConfig()).alphas_cumprod[749]
    torch.testing.assert_close(known.asked[1][1], signal.sqrt() * known.clean + (1 - signal).sqrt() * noise)


def test_seeds_decide_and_an_ensemble_averages_probabilities() -> None:
    single = [_known(2, seed=seed)[1].softmax(1) for seed in (3, 4)]
    assert torch.equal(single[0], _known(2, seed=3)[1].softmax(1))
    assert not torch.equal(single[0], single[1])
    torch.testing.assert_close(_known(2, seed=3, ensemble=2)[1].exp(), (single[0] + single[1]) / 2)


def _config(folder: Path, kind: str) -> Config:
    diffusion = {"zero_terminal_snr": kind != "epsilon", "min_snr_gamma": 5.0}
    objective = {"type": "multi_step", "diffusion": diffusion, "dice": 0.5}
    return small_config(folder, objective=objective, training={"steps": 1, "precision": "fp32"})


@pytest.mark.parametrize("kind", ["sample", "v_prediction", "epsilon"])
def test_a_few_steps_learn_to_denoise_a_mask(tmp_path: Path, kind: str) -> None:
    """Left and right halves, told by name: the loss falls, and sampled masks are right."""
    config = _config(tmp_path, kind)
    text = torch.randn(2, 384, generator=torch.Generator().manual_seed(0))
    segmenter = build_segmenter(config)
    segmenter.scheduler.register_to_config(prediction_type=kind)  # as a checkpoint's says
    module = SegmenterLoss(segmenter, config, text)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    batch = _batch()
    losses = []
    for step in range(30):
        batch.positions = torch.arange(4) + 4 * step
        optimizer.zero_grad()
        values = module(batch)
        values["loss"].backward()
        optimizer.step()
        losses.append(values["loss"].item())
    assert set(values) == {"loss", "class_score", "feedback", "reconstruction", "dice"}
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    module.eval()
    mask = torch.ones(4, 2, dtype=torch.bool)
    inputs = (batch.images, text[batch.query_ids], mask, palette(8)[batch.colour_ids])
    with torch.no_grad():
        latents = segmenter.autoencoder.encode(batch.images)
        logits = sample_logits(segmenter, *inputs, latents, Sampling(config.objective.diffusion, 3))
    assert (logits.argmax(1) == batch.labels).float().mean() > 0.9


def _batch() -> SimpleNamespace:
    images = torch.full((4, 3, 32, 32), 0.6)
    images[..., :16] = -0.6
    slots = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0]])
    labels = torch.where(images[:, 0] < 0, slots[:, :1, None], slots[:, 1:, None])
    colours = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    return SimpleNamespace(
        images=images, latents=None, labels=labels, query_ids=slots, colour_ids=colours, class_weights=torch.ones(4, 2)
    )
