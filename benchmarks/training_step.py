"""What DeepSpeed ZeRO costs a training step, against a bare PyTorch loop on the same batch and machine.

Both train the segmenter of ``configs/demo.yaml`` in one process: the baseline with AdamW and
``clip_grad_norm_`` alone, the other through :class:`digseg.training.engine.Engine`, as a run does. They take
turns, so that a machine that slows down slows both; the figures are medians of all timed steps, and the
spread is that of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from digseg.config import Config, load_config
from digseg.console import say
from digseg.model import build_segmenter
from digseg.model.text import load_text_encoder
from digseg.model.training_module import SegmenterLoss
from digseg.training.engine import Engine
from digseg.training.world import World

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
NAMES = 8  # classes a query


@dataclass(frozen=True)
class SyntheticBatch:
    """Random pixels and labels: what a step costs does not depend on them."""

    images: torch.Tensor
    labels: torch.Tensor
    query_ids: torch.Tensor
    colour_ids: torch.Tensor
    class_weights: torch.Tensor
    latents: torch.Tensor | None = None

    @classmethod
    def draw(cls, size: int, crop: int, device: torch.device) -> SyntheticBatch:
        """``size`` samples of ``crop`` x ``crop`` pixels, asked for :data:`NAMES` classes each."""
        rows = torch.arange(NAMES).expand(size, NAMES)
        return cls(
            images=(torch.rand(size, 3, crop, crop) * 2 - 1).to(device),
            labels=torch.randint(0, NAMES, (size, crop, crop)).to(device),
            query_ids=rows.to(device),
            colour_ids=rows.to(device),
            class_weights=torch.ones(size, NAMES, device=device),
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=4, help="samples a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="timed steps a round, for each of the two")
    parser.add_argument("--zero-stage", type=int, default=1, choices=(0, 1, 2, 3))
    options = parser.parse_args(arguments)
    overrides = [f"training.global_batch_size={options.batch}", f"training.zero_stage={options.zero_stage}"]
    config = load_config(CONFIG, [*overrides, "cluster.backend=local", "cluster.workers=1"])
    torch.manual_seed(config.run.seed)
    world = World.from_environment()
    batch = SyntheticBatch.draw(options.batch, config.data.crop_size, world.device)

    bare, engine = _bare_step(config, batch, world), _engine_step(config, batch, world)
    for step in (bare, engine):
        _timed(step, 2, world)
    rounds = [(_timed(bare, options.steps, world), _timed(engine, options.steps, world)) for _ in range(options.rounds)]

    baseline = statistics.median(second for times, _ in rounds for second in times)
    measured = statistics.median(second for _, times in rounds for second in times)
    ratios = [statistics.median(engine_times) / statistics.median(bare_times) for bare_times, engine_times in rounds]
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine() + " CPU"
    say(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {options.batch}")
    say(f"bare PyTorch loop     {baseline * 1e3:8.1f} ms/step")
    say(f"DeepSpeed ZeRO-{options.zero_stage}      {measured * 1e3:8.1f} ms/step")
    say(f"ratio {measured / baseline:.3f} (rounds {min(ratios):.3f} to {max(ratios):.3f})")


def _loss(config: Config, world: World) -> SegmenterLoss:
    encoder = load_text_encoder(config.model)
    return SegmenterLoss(build_segmenter(config, encoder), config, torch.randn(NAMES, encoder.dim)).to(world.device)


def _bare_step(config: Config, batch: SyntheticBatch, world: World) -> Callable[[], None]:
    module, training = _loss(config, world), config.training
    optimizer = torch.optim.AdamW(
        module.parameters(),
        lr=training.learning_rate,
        betas=training.adam_betas,
        weight_decay=training.weight_decay,
        fused=True,
    )

    def step() -> None:
        module(batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), training.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _engine_step(config: Config, batch: SyntheticBatch, world: World) -> Callable[[], None]:
    engine = Engine(_loss(config, world), config, world)

    def step() -> None:
        engine.forward_backward(batch)
        engine.step(config.training.learning_rate)

    return step


def _timed(step: Callable[[], None], times: int, world: World) -> list[float]:
    """Seconds of each of ``times`` steps."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        step()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
