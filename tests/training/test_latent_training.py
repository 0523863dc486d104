"""Training on stored latents against training on the pixels that they encode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kl_autoencoder import write_kl_autoencoder
from latent_writing import write_latents
from shard_writing import noise_samples, write_split
from small_world import small_config

from digseg.config import Config
from digseg.errors import DigSegError
from digseg.model.autoencoder import KLAutoencoder
from digseg.training.logging import read_metrics
from digseg.training.trainer import Trainer
from digseg.training.world import World

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Square images of the crop's size and their latents: one view, nothing changed at random."""
    folder = tmp_path_factory.mktemp("latents")
    write_kl_autoencoder(folder / "sd")
    write_split(folder / "shards", "squares", noise_samples(8, 3, size=(32, 32)), ("sand", "rock", "moss"))
    write_latents(_config(folder, "encode"), folder / "latents")
    return folder


@pytest.fixture(scope="module")
def encoded(folder: Path) -> dict[str, list[int]]:
    """For the runs ``pixels`` and ``latents``, how many images each call of the autoencoder encoded."""
    calls: dict[str, list[int]] = {"pixels": [], "latents": []}
    encode = KLAutoencoder.encode
    for run, found in calls.items():

        def counted(self: KLAutoencoder, images: torch.Tensor, found: list[int] = found) -> torch.Tensor:
            if not images.is_meta:  # as where operations are counted by shapes
                found.append(len(images))
            return encode(self, images)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(KLAutoencoder, "encode", counted)
            stored = {"latents": str(folder / "latents")} if run == "latents" else {}
            Trainer(_config(folder, run, **stored), World()).train()
    return calls


def test_no_image_is_encoded_in_training(encoded: dict[str, list[int]]) -> None:
    palette = [64]
    assert sorted(encoded["pixels"]) == sorted([8] * STEPS + palette)
    assert encoded["latents"] == palette


def test_losses_on_latents_are_those_on_the_pixels_of_the_same_views(
    folder: Path, encoded: dict[str, list[int]]
) -> None:
    pixels, latents = _losses(folder, "pixels"), _losses(folder, "latents")
    assert len(pixels) == STEPS
    # float16 keeps 11 bits of a latent.
    assert latents == pytest.approx(pixels, rel=2e-3)
    assert pixels[0] != pytest.approx(pixels[-1], rel=2e-2)


def test_run_on_latents_that_was_stopped_goes_on_as_if_it_had_not_been(
    folder: Path, encoded: dict[str, list[int]]
) -> None:
    stored = {"latents": str(folder / "latents")}
    halfway = _config(folder, "parts", **stored)
    halfway = halfway.model_copy(update={"training": halfway.training.model_copy(update={"steps": STEPS // 2})})
    Trainer(halfway, World()).train()
    Trainer(_config(folder, "parts", **stored), World()).train()
    assert _losses(folder, "parts")[STEPS // 2 :] == _losses(folder, "latents")[STEPS // 2 :]


@pytest.mark.parametrize(
    ("part", "vae"),
    [("weights", {"seed": 1}), ("scaling factor", {"scaling_factor": 0.5})],
)
def test_run_with_another_autoencoder_is_refused_before_a_step_is_taken(
    folder: Path, tmp_path: Path, part: str, vae: dict[str, Any]
) -> None:
    write_kl_autoencoder(tmp_path / "sd", **vae)
    config = _config(folder, f"refused-{part[:7]}", latents=str(folder / "latents"))
    model = config.model.model_copy(
        update={"autoencoder": config.model.autoencoder.model_copy(update={"path": str(tmp_path / "sd/vae")})}
    )
    with pytest.raises(
        DigSegError, match=rf"squares/train was encoded for another run .* autoencoder {part} \(latents"
    ):
        Trainer(config.model_copy(update={"model": model}), World()).train()
    assert not (folder / f"runs/refused-{part[:7]}/metrics.jsonl").exists()


def _config(folder: Path, name: str, **data: object) -> Config:
    still = {"short_side": 32, "scale": [1.0, 1.0], "flip": False, "colour_jitter": 0.0}
    base = small_config(folder)
    return small_config(
        folder,
        run={"name": name, "storage": str(folder / "runs")},
        data={**base.data.model_dump(mode="json"), **still, **data},
        model={
            **base.model.model_dump(mode="json"), "autoencoder": {"type": "kl", "path": str(folder / "sd/vae")}
        },
        training={"steps": STEPS, "global_batch_size": 8, "log_every": 1, "precision": "fp32", "checkpoint_every": 2},
        cluster={"backend": "local"},
        tracking={"enabled": False},
    )  # fmt: skip


def _losses(folder: Path, run: str) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "runs" / run / "metrics.jsonl")]
