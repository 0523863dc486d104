"""What the image path of Stable Diffusion's autoencoder costs a training step: images against stored latents.

The U-Net is that of ``configs/demo.yaml``, on the latents of an autoencoder of Stable Diffusion's architecture (84 M
parameters, random weights: what a step costs does not depend on them). One step is forward, backward and AdamW. Both
ways take turns, so that a machine that slows down slows both; figures are medians of all timed steps, and the spread is
that of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from shared import add_json, configured, report
from training_step import NAMES, random_batch

from digseg.config import Config
from digseg.console import say
from digseg.data.loader import Batch
from digseg.errors import run_main
from digseg.model.training_module import SegmenterLoss
from digseg.training.trained_model import TrainedModel


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=2, help="images a step")
    parser.add_argument("--resolution", type=int, default=256, help="pixels a side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="timed steps a round, for each of the two")
    add_json(parser)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        config = _config(Path(folder), options.resolution)
        loss = TrainedModel(config, NAMES).with_loss().to(device)
    images = dataclasses.replace(random_batch(options.batch, config), latents=None).to(device)
    latents = dataclasses.replace(images, latents=loss.segmenter.autoencoder.encode(images.images).half())
    ways = {"images": _step(loss, images, device), "latents": _step(loss, latents, device)}
    for step in ways.values():
        step()
    rounds = [
        {name: [step() for _ in range(options.steps)] for name, step in ways.items()} for _ in range(options.rounds)
    ]

    seconds = {name: statistics.median(s for times in rounds for s in times[name]) for name in ways}
    ratios = [statistics.median(times["images"]) / statistics.median(times["latents"]) for times in rounds]
    ratio = seconds["images"] / seconds["latents"]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    say(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    say(f"{options.batch} images of {options.resolution} px a step")
    for name, value in seconds.items():
        say(f"{name:8} {value * 1e3:9.1f} ms/step  {options.batch / value:8.2f} images/s")
    say(f"ratio {ratio:.2f} (rounds {min(ratios):.2f} to {max(ratios):.2f})")
    figures = {
        "images_per_s": options.batch / seconds["images"],
        "latents_per_s": options.batch / seconds["latents"],
        "ratio_latents_vs_images": ratio,
        "ratio_rounds": ratios,
    }
    report(figures, options.json)


def _config(folder: Path, resolution: int) -> Config:
    """That of the demo with an autoencoder of Stable Diffusion's architecture, whose weights go into ``folder``."""
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    vae.save_pretrained(folder / "vae")
    return configured(
        {
            "model.autoencoder.type": "kl",
            "model.autoencoder.path": folder / "vae",
            "data.crop_size": resolution,
        }
    )


def _step(loss: SegmenterLoss, batch: Batch, device: torch.device) -> Callable[[], float]:
    """A function that takes one step and returns its seconds."""
    optimizer = torch.optim.AdamW(loss.parameters(), fused=True)

    def step() -> float:
        start = time.perf_counter()
        loss(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return step


if __name__ == "__main__":
    run_main(main)
