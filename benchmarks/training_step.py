"""What a training step costs, against two loops on the same machine.

1. The *reference loop* follows the recipe that Marigold's trainer publishes: float32, ``torch.optim.Adam``, the
   autoencoder encodes image and mask in every step, and ``loss.item()`` and a check for NaN on every micro-batch.
   DigSeg trains the same U-Net on stored latents of the same images, with all that its trainer does. One process.
   U-Net and autoencoder are stand-ins, whose operations stand in the ratio of Stable Diffusion 2's.
2. The *bare loop* is PyTorch's DistributedDataParallel around DigSeg's own module, with the same precision, batch and
   optimizer, gradients clipped, and nothing else; 2 processes. DigSeg adds DeepSpeed, the average of the weights, the
   guard and logging. (Ray starts the processes and has no part in a step.) What DeepSpeed adds is paid once a step for
   each weight, so it weighs by how much a step computes with a weight. Two sizes of step are compared: the *recipe's*,
   which computes about as much with each weight as a GPU does in a step of configs/sd2.yaml (8 images of 512 px: 22
   thousand operations), and the *small* one of the first comparison, which computes a third of that.

Both sides take turns, so that a machine that slows down slows both. Figures are medians of all timed steps; a spread
is that of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import AutoencoderKL
from shared import add_json, configured, report
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from digseg.config import Config
from digseg.console import say
from digseg.data.loader import Batch
from digseg.errors import run_main
from digseg.model.denoiser import build_unet
from digseg.model.training_module import SegmenterLoss, resolve_precision
from digseg.training.engine import Engine
from digseg.training.flops import image_flops
from digseg.training.logging import MetricsFile
from digseg.training.state import TrainingState
from digseg.training.trained_model import TrainedModel
from digseg.training.world import World

NAMES = tuple(f"class {number}" for number in range(8))  # of a query
# Operations of encoding one image and of a training step of the U-Net, in Stable Diffusion 2 at 256 px (10^12).
SD2_ENCODING, SD2_STEP = 0.273, 0.539
LEARNING_RATE = 1e-5  # nobody looks at the losses


@dataclass(frozen=True)
class Sides:
    """Seconds of each step, round by round, of the loop compared with and of DigSeg."""

    other: list[list[float]]
    digseg: list[list[float]]

    @property
    def ratios(self) -> list[float]:
        """How many times as many images a second DigSeg trains, round by round."""
        pairs = zip(self.other, self.digseg, strict=True)
        return [statistics.median(other) / statistics.median(own) for other, own in pairs]

    def summary(self) -> dict[str, float]:
        """Medians in seconds, their ratio, and the spread of the rounds' ratios."""
        other, own = (statistics.median(t for times in side for t in times) for side in (self.other, self.digseg))
        return {
            "other_s": other,
            "digseg_s": own,
            "ratio": other / own,
            "low": min(self.ratios),
            "high": max(self.ratios),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="samples a small step in each process")
    parser.add_argument("--pixels", type=int, default=256, help="side of the images of a small step")
    parser.add_argument("--recipe-batch", type=int, default=4, help="samples a step of the recipe in each process")
    parser.add_argument("--recipe-pixels", type=int, default=512, help="side of the images of a step of the recipe")
    parser.add_argument("--width", type=int, default=64, help="channels of the U-Net's first level (SD2: 320)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="timed steps a round, for each side")
    parser.add_argument("--zero-stage", type=int, default=1, choices=(0, 1, 2, 3))
    add_json(parser)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        result = _measured(options, Path(folder))
    compared = {
        "reference loop, 1 process": result["reference_loop"],
        f"bare loop, 2 processes, ZeRO {options.zero_stage}, recipe's step": result["bare_loop"],
        f"bare loop, 2 processes, ZeRO {options.zero_stage}, small step": result["bare_loop_small_step"],
    }
    say(f"{result['device']}, torch {torch.__version__}, {result['precision']}")
    say(
        f"small step: {options.batch} images of {options.pixels} px, each {result['step_gflops']:.1f} GFLOP, and "
        f"{result['encoding_gflops']:.1f} to encode it; {result['flops_per_weight'] / 1e3:.1f} kFLOP a weight"
    )
    say(
        f"recipe's step: {options.recipe_batch} images of {options.recipe_pixels} px, "
        f"{result['recipe_flops_per_weight'] / 1e3:.1f} kFLOP a weight"
    )
    for name, sides in compared.items():
        say(
            f"{name}: {sides['other_s']:.2f} s a step, DigSeg {sides['digseg_s']:.2f} s: "
            f"{sides['ratio']:.2f} x ({sides['low']:.2f} to {sides['high']:.2f} over {options.rounds} rounds)"
        )
    report(result, options.json)


def _measured(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    small = _config(options, options.batch, options.pixels, folder)
    recipe = _config(options, options.recipe_batch, options.recipe_pixels, folder)
    step = _step_flops(small)
    vae, encoding = _autoencoder(step * SD2_ENCODING / SD2_STEP, options.pixels)
    against_reference = _against_reference(small, vae, options)
    against_bare, against_bare_small = (_against_bare(config, options, folder) for config in (recipe, small))
    num_weights = sum(parameter.numel() for parameter in _module(small).parameters() if parameter.requires_grad)
    return {
        "ratio_vs_reference_loop": round(against_reference.summary()["ratio"], 3),
        "ratio_vs_bare_loop": round(against_bare.summary()["ratio"], 3),
        "ratio_vs_bare_loop_small_step": round(against_bare_small.summary()["ratio"], 3),
        "reference_loop": against_reference.summary(),
        "bare_loop": against_bare.summary(),
        "bare_loop_small_step": against_bare_small.summary(),
        "step_gflops": step / 1e9,
        "encoding_gflops": encoding / 1e9,
        "flops_per_weight": step * options.batch / num_weights,
        "recipe_flops_per_weight": _step_flops(recipe) * options.recipe_batch / num_weights,
        "precision": resolve_precision(small.training.precision, torch.device("cpu")),
        "zero_stage": options.zero_stage,
        "batch": options.batch,
        "pixels": options.pixels,
        "recipe_batch": options.recipe_batch,
        "recipe_pixels": options.recipe_pixels,
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
    }


def _step_flops(config: Config) -> float:
    """Operations of one image in a training step."""
    return image_flops(config, 384, len(NAMES)).training


def _config(options: argparse.Namespace, batch: int, pixels: int, folder: Path) -> Config:
    """A U-Net with the levels and layers of Stable Diffusion's, narrower, on latents of factor 8."""
    width = options.width
    settings = {
        "run.storage": folder,
        "training.global_batch_size": batch,
        "training.zero_stage": options.zero_stage,
        "data.crop_size": pixels,
        "model.autoencoder.factor": 8,
        "model.unet.block_out_channels": f"[{width},{2 * width},{4 * width},{4 * width}]",
        "model.unet.attention": "[true,true,true,false]",
        "model.unet.layers_per_block": 2,
        "model.unet.num_heads": 1,  # of 64 channels on the first level, as Stable Diffusion 2's
        "model.unet.cross_attention_dim": 2 * width,
        "cluster.backend": "local",
        "cluster.workers": 1,
        "tracking.enabled": "false",
    }
    return configured(settings)


def _autoencoder(flops: float, pixels: int) -> tuple[Any, int]:
    """An autoencoder with the layers of Stable Diffusion's whose encoder needs about so many operations an image."""
    encoders = {}
    for width in range(4, 129, 4):
        with torch.device("meta"):
            vae = _vae(width)
            with FlopCounterMode(display=False) as counter:
                vae.encode(torch.empty(1, 3, pixels, pixels))
        encoders[counter.get_total_flops()] = width
        if counter.get_total_flops() > flops:
            break
    nearest = min(encoders, key=lambda total: abs(total - flops))
    return _vae(encoders[nearest]).requires_grad_(False).eval(), nearest


def _vae(width: int) -> Any:
    return AutoencoderKL(
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=4,
    )


def _against_reference(config: Config, vae: Any, options: argparse.Namespace) -> Sides:
    torch.manual_seed(config.run.seed)
    world = World()
    batch = random_batch(config.training.global_batch_size, config)
    reference, digseg = _reference_step(config, vae, batch), _digseg_step(config, batch, world)
    return _taking_turns(reference, digseg, options)


def _reference_step(config: Config, vae: Any, batch: Batch) -> Callable[[], None]:
    """One step of the published recipe: noise is predicted from [image latents, noisy mask latents]."""
    unet = build_unet(config.model, 3 * config.model.autoencoder.factor**2)
    optimizer = torch.optim.Adam(unet.parameters(), lr=LEARNING_RATE)
    signal = torch.linspace(0.99, 0.01, 1000)
    tokens = torch.randn(1, len(NAMES), config.model.unet.cross_attention_dim)
    masks = (batch.labels.float() / 4 - 1).unsqueeze(1).expand(-1, 3, -1, -1).contiguous()
    # The stand-in's latents have 4 channels, of which the U-Net takes as many as it has.
    repeats = unet.config.out_channels // 4

    def encoded(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return vae.encode(pixels).latent_dist.mean.repeat(1, repeats, 1, 1) * 0.18215

    def step() -> None:
        image, mask = encoded(batch.images), encoded(masks)
        noise = torch.randn_like(mask)
        timesteps = torch.randint(0, 1000, (len(mask),))
        kept = signal[timesteps].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * mask + (1 - kept).sqrt() * noise
        predicted = unet(
            torch.cat([image, noisy], dim=1), timesteps, tokens.expand(len(mask), -1, -1), return_dict=False
        )[0]
        if torch.isnan(predicted).any():
            raise RuntimeError("the reference loop predicts NaN")
        loss = nn.functional.mse_loss(predicted, noise)
        loss.backward()
        loss.item()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _digseg_step(config: Config, batch: Batch, world: World) -> Callable[[], None]:
    """One step as digseg.training.trainer takes it: engine, guard, average, and figures every `log_every` steps."""
    engine = Engine(_module(config), config, world)
    state = TrainingState(engine, config.training, world)
    metrics = MetricsFile(Path(config.run.storage) / f"metrics-{world.rank}.jsonl")
    taken = 0

    def step() -> None:
        nonlocal taken
        losses = engine.forward_backward(batch)
        engine.step(LEARNING_RATE, state.guard.judge(losses["loss"]))
        state.guard.note(taken, batch.keys, engine.was_bad())
        if state.average is not None:
            state.average.update(engine.shares())
        state.window.add(losses, engine.was_bad(), 0.0)
        taken += 1
        if taken % config.training.log_every == 0:
            state.guard.close()
            figures = state.window.close(world, config.training.global_batch_size)
            metrics.append(taken, {**figures, "gradient_norm": engine.gradient_norm()})

    return step


def _against_bare(config: Config, options: argparse.Namespace, folder: Path) -> Sides:
    with tempfile.TemporaryDirectory(dir=folder) as own:
        mp.start_processes(_compare_in_rank, (config, options, Path(own)), nprocs=2, start_method="spawn")
        return Sides(**json.loads((Path(own) / "sides.json").read_text()))


def _compare_in_rank(rank: int, config: Config, options: argparse.Namespace, folder: Path) -> None:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world = World(rank=rank, world_size=2, local_rank=rank, local_world_size=2)
    torch.manual_seed(rank)
    batch = random_batch(config.training.global_batch_size, config)
    sides = _taking_turns(_bare_step(config, batch), _digseg_step(config, batch, world), options)
    if world.is_main:
        (folder / "sides.json").write_text(json.dumps({"other": sides.other, "digseg": sides.digseg}))
    dist.destroy_process_group()


def _bare_step(config: Config, batch: Batch) -> Callable[[], None]:
    module, training = nn.parallel.DistributedDataParallel(_module(config)), config.training
    optimizer = torch.optim.AdamW(
        module.parameters(),
        lr=LEARNING_RATE,
        betas=training.adam_betas,
        weight_decay=training.weight_decay,
        fused=True,
    )

    def step() -> None:
        module(batch)["loss"].backward()
        nn.utils.clip_grad_norm_(module.parameters(), training.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _module(config: Config) -> SegmenterLoss:
    return TrainedModel(config, NAMES).with_loss()


def random_batch(size: int, config: Config) -> Batch:
    """Random pixels and labels with latents of a shuffle autoencoder: what a step costs does not depend on them."""
    side = config.data.crop_size
    factor = config.model.autoencoder.factor
    rows = torch.arange(len(NAMES)).expand(size, len(NAMES))
    return Batch(
        images=torch.rand(size, 3, side, side) * 2 - 1,
        labels=torch.randint(0, len(NAMES), (size, side, side)),
        query_ids=rows,
        colour_ids=rows,
        class_weights=torch.ones(size, len(NAMES)),
        positions=torch.arange(size),
        latents=torch.randn(size, 3 * factor * factor, side // factor, side // factor),
        keys=[f"{number}" for number in range(size)],
        corrupt={},
    )


def _taking_turns(other: Callable[[], None], digseg: Callable[[], None], options: argparse.Namespace) -> Sides:
    for step in (other, digseg):
        _timed(step, 1)
    rounds = [(_timed(other, options.steps), _timed(digseg, options.steps)) for _ in range(options.rounds)]
    return Sides([times for times, _ in rounds], [times for _, times in rounds])


def _timed(step: Callable[[], None], times: int) -> list[float]:
    """Seconds of each of ``times`` steps."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    run_main(main)
