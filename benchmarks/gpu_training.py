"""A ladder of switches for training Stable Diffusion 2's U-Net on one GPU: images/s, TFLOP/s, MFU and peak memory each.

The bottom rung is the recipe that published trainers of diffusion models for dense prediction use (Marigold's: float32,
Adam, the autoencoder encodes image and mask at every step, the loss is read and checked for NaN at every step); each
further rung adds one switch to those below it. Weights and data are random: what a step costs does not depend on them.
Neither Ray nor DeepSpeed is needed.

FLOPs are those of the U-Net's products, convolutions and attention, forward and backward, counted from its shapes;
encoding and recomputation do not count. MFU is their rate over the device's bf16 peak (by data sheet; on other devices
that of a large matrix product, measured).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from shared import add_json, report
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from digseg.training.throughput import device_peak

LATENT_CHANNELS, FACTOR, TOKENS = 4, 8, 77


@dataclass(frozen=True)
class Size:
    """A U-Net and an autoencoder of Stable Diffusion's kind."""

    channels: tuple[int, ...]
    layers: int
    heads: tuple[int, ...]
    token_dim: int
    autoencoder_channels: tuple[int, ...]
    groups: int = 32


SIZES = {
    "sd2": Size((320, 640, 1280, 1280), 2, (5, 10, 20, 20), 1024, (128, 256, 512, 512)),
    "tiny": Size((32, 64), 1, (2, 2), 32, (32, 32, 32, 32)),
}


@dataclass(frozen=True)
class Rung:
    """The switches of one measurement."""

    name: str
    encode: bool = True  # image and mask, at every step
    read_loss: bool = True
    bf16: bool = False
    attention: str = "math"
    channels_last: bool = False
    fused: bool = False  # AdamW
    compiled: bool = False
    batch: int = 0


@dataclass
class Result:
    """A rung's figures; ``error`` says why there are none."""

    rung: Rung
    pixels: int
    seconds: list[float] = field(default_factory=list)
    images_per_second: float = 0.0
    tflops_per_second: float = 0.0
    mfu: float = 0.0
    peak_bytes: int = 0
    error: str | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--pixels", type=int, nargs="+", default=[256, 512], help="sides of the images")
    parser.add_argument("--batch", type=int, default=8, help="images a step, on all rungs but the last ones")
    parser.add_argument("--batches", type=int, nargs="*", default=[16, 32, 64], help="of the last rungs")
    parser.add_argument("--steps", type=int, default=20, help="timed, after 5 that are not")
    parser.add_argument("--size", choices=SIZES, default="sd2")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-compile", action="store_true", help="leave that rung out, which takes minutes to begin")
    add_json(parser)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device here; --size tiny --device cpu tries the script itself", file=sys.stderr)
        sys.exit(2)
    device = torch.device(options.device)
    peak, source = device_peak("bf16" if device.type == "cuda" else "fp32", device)
    print(f"{_name(device)}, peak {peak / 1e12:.3g} TFLOP/s ({source}), torch {torch.__version__}", flush=True)
    results = []
    for pixels in options.pixels:
        print(f"\n{pixels} px                 images/s  TFLOP/s   MFU  peak GB  spread", flush=True)
        for rung in _ladder(options.batch, options.batches, not options.no_compile):
            result = _measured(SIZES[options.size], rung, pixels, device, options.steps, peak)
            results.append(result)
            print(_line(result), flush=True)
    figures = {
        "device": _name(device),
        "torch": torch.__version__,
        "size": options.size,
        "peak_flops": peak,
        "peak_source": source,
        "results": [asdict(result) for result in results],
        **_headline(results),
    }
    report(figures, options.json)


def _ladder(batch: int, batches: Sequence[int], compiled: bool) -> Iterator[Rung]:
    rung = Rung("reference loop", batch=batch)
    yield rung
    for name, switch in (
        ("stored latents", {"encode": False}),
        ("no reading of the loss", {"read_loss": False}),
        ("bf16", {"bf16": True}),
        ("sdpa", {"attention": "sdpa"}),
        ("xformers instead", {"attention": "xformers"}),
        ("channels_last", {"attention": "sdpa", "channels_last": True}),
        ("fused AdamW", {"fused": True}),
        *([("compile", {"compiled": True})] if compiled else []),
        *((f"batch {size}", {"batch": size}) for size in batches),
    ):
        rung = replace(rung, name=name, **switch)
        yield rung


def _measured(size: Size, rung: Rung, pixels: int, device: torch.device, steps: int, peak: float) -> Result:
    result = Result(rung, pixels)
    try:
        step = _Step(size, rung, pixels, device)
        for _ in range(5):
            step.take()
        _wait(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(steps):
            began = time.perf_counter()
            step.take()
            _wait(device)
            result.seconds.append(time.perf_counter() - began)
    except (RuntimeError, ImportError, ValueError) as error:  # no room, no such kernel, no compiler
        result.error = str(error).split("\n")[0]
        return result
    finally:
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    result.images_per_second = rung.batch / statistics.median(result.seconds)
    result.tflops_per_second = result.images_per_second * _flops(size, pixels) / 1e12
    result.mfu = result.tflops_per_second * 1e12 / peak
    result.peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return result


class _Step:
    """Model, optimizer and one batch of a rung."""

    def __init__(self, size: Size, rung: Rung, pixels: int, device: torch.device) -> None:
        self._rung, self._device = rung, device
        torch.manual_seed(0)
        with torch.device(device):
            unet = _unet(size)
            side = pixels // FACTOR
            self._images = torch.rand(2, rung.batch, 3, pixels, pixels) * 2 - 1 if rung.encode else None
            self._latents = torch.randn(2, rung.batch, LATENT_CHANNELS, side, side)
            self._tokens = torch.randn(rung.batch, TOKENS, size.token_dim)
            self._times = torch.full((rung.batch,), 999)
            self._autoencoder = _autoencoder(size).requires_grad_(False) if rung.encode else None
        _set_attention(unet, rung.attention)
        if rung.channels_last:
            unet = unet.to(memory_format=torch.channels_last)
        self._optimizer = (
            torch.optim.AdamW(unet.parameters(), lr=1e-5, fused=True)
            if rung.fused
            else torch.optim.Adam(unet.parameters(), lr=1e-5)
        )
        self._unet: Any = torch.compile(unet) if rung.compiled else unet

    def take(self) -> None:
        """One step."""
        images, masks = self._latents if self._autoencoder is None else self._encoded()
        inputs = torch.cat([images, torch.zeros_like(masks)], dim=1)
        if self._rung.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._rung.bf16):
            predicted = self._unet(inputs, self._times, self._tokens, return_dict=False)[0]
        loss = nn.functional.mse_loss(predicted.float(), masks)
        if self._rung.read_loss and (bool(loss.isnan()) or loss.item() < 0):
            raise AssertionError("the loss of random data is finite")
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _encoded(self) -> tuple[Tensor, Tensor]:
        assert self._images is not None
        assert self._autoencoder is not None
        images, masks = (self._autoencoder.encode(part).latent_dist.mean for part in self._images)
        return images, masks


def _unet(size: Size) -> Any:
    levels = len(size.channels)
    return UNet2DConditionModel(
        in_channels=2 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=(*("CrossAttnDownBlock2D",) * (levels - 1), "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * (levels - 1)),
        block_out_channels=size.channels,
        layers_per_block=size.layers,
        cross_attention_dim=size.token_dim,
        attention_head_dim=size.heads,
        norm_num_groups=size.groups,
        use_linear_projection=True,
    )


def _autoencoder(size: Size) -> Any:
    levels = len(size.autoencoder_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=size.autoencoder_channels,
        layers_per_block=2,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=size.groups,
    ).eval()


def _set_attention(unet: Any, kernel: str) -> None:
    if kernel == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    else:
        unet.set_attn_processor(AttnProcessor2_0() if kernel == "sdpa" else AttnProcessor())


def _flops(size: Size, pixels: int) -> int:
    """Of one image, forward and backward."""
    with torch.device("meta"):
        unet, side = _unet(size), pixels // FACTOR
        inputs = torch.empty(1, 2 * LATENT_CHANNELS, side, side)
        tokens = torch.empty(1, TOKENS, size.token_dim)
        with FlopCounterMode(display=False) as counter:
            unet(inputs, torch.empty(1), tokens, return_dict=False)[0].sum().backward()
    return int(counter.get_total_flops())


def _headline(results: Sequence[Result]) -> dict[str, float]:
    """The best of each side: its MFU, and its rate against the reference loop's."""
    headline = {}
    for pixels in dict.fromkeys(result.pixels for result in results):
        done = [result for result in results if result.pixels == pixels and result.error is None]
        best = max(done, key=lambda result: result.images_per_second, default=None)
        if best is not None:
            headline[f"mfu_{pixels}"] = best.mfu
            if done[0].rung.name == "reference loop":
                headline[f"ratio_vs_reference_loop_{pixels}"] = best.images_per_second / done[0].images_per_second
    return headline


def _line(result: Result) -> str:
    if result.error is not None:
        return f"{result.rung.name:24} {result.error}"
    spread = (max(result.seconds) - min(result.seconds)) / statistics.median(result.seconds)
    return (
        f"{result.rung.name:24} {result.images_per_second:8.2f} {result.tflops_per_second:8.2f} {result.mfu:5.1%} "
        f"{result.peak_bytes / 1e9:8.1f} {spread:7.0%}"
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


if __name__ == "__main__":
    main()
