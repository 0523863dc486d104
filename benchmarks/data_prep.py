"""Images a second of ``data_prep/shard.py`` against a loop in one process and against ``ray.data``, on the same images.

All three read the same JPEG images and PNG masks and do the same to each: digest the source files, decode image and
mask, map the labels, count classes, hash the pixels, hash perceptually, encode the mask, write WebDataset tars, digest
the tars. They share the code for a sample; what differs is how samples are shared out and how tars are written:

- the job: planned shards as Ray tasks, with the project's own writer, index and manifest;
- the loop: one process and ``webdataset.ShardWriter``;
- ``ray.data``: ``map`` and ``write_webdataset``.

Each runs in fresh processes, and they take turns; the figures are medians over the rounds. Starting Python, Ray and its
workers takes seconds whatever the size of a corpus and is not timed. All keep freed memory, and run at one priority:
Ray's workers would else give way to whatever a machine does besides. Peak memory is the proportional set size of a
side's whole process tree, Ray's own processes included, in a run of its own that is not timed, because looking costs
time.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from scipy.ndimage import gaussian_filter
from shared import ROOT, add_json, report

from digseg.console import progress, say
from digseg.errors import run_main

HEIGHT, WIDTH = 360, 480
CLASSES = 11
DRAWN = 40  # the others are these, shifted
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(256 << 20), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
PRIORITY = {"RAY_worker_niceness": "0"}
SIDES = {"job": "data_prep/shard.py", "loop": "loop with ShardWriter", "ray_data": "ray.data"}
SAMPLING_S = 0.05


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    add_json(parser)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder)
        _draw_corpus(corpus, options.images)
        with progress("measuring", (options.rounds + 1) * len(SIDES), unit="runs") as bar:
            rounds = [{side: _seconds(side, corpus, bar.advance) for side in SIDES} for _ in range(options.rounds)]
            memory = {side: _peak_memory_bytes(side, corpus, bar.advance) for side in SIDES}
    figures = _figures(options.images, rounds, memory)
    report(figures, options.json)


def _start(side: str, corpus: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks/preparation/sides.py"), side, str(corpus)],
        env={**os.environ, **ALLOCATOR, **PRIORITY, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _seconds(side: str, corpus: Path, done: Callable[[], None]) -> float:
    running = _start(side, corpus)
    output, _ = running.communicate()
    times = [line.split()[1] for line in output.splitlines() if line.startswith("seconds ")]
    assert running.returncode == 0, output
    done()
    return float(times[0])


def _peak_memory_bytes(side: str, corpus: Path, done: Callable[[], None]) -> int:
    """The largest sum of proportional set sizes that a side's processes were seen with."""
    with _start(side, corpus) as running:
        assert running.stdout is not None
        root, peak = psutil.Process(running.pid), 0
        while running.poll() is None:
            peak = max(peak, sum(map(_proportional_set_bytes, [root, *root.children(recursive=True)])))
            time.sleep(SAMPLING_S)
        assert running.returncode == 0, running.stdout.read()
    done()
    return peak


def _proportional_set_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:  # it has just ended
        return 0


def _draw_corpus(root: Path, images: int) -> None:
    """A folder corpus of regions with texture: JPEG images of some 60 kB, PNG masks of eleven classes."""
    random = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder / "train").mkdir(parents=True)
    names = ", ".join(f"class {number}" for number in range(CLASSES))
    (root / "classes.yaml").write_text(f"name: drawn\nclasses: [{names}]\ndomain: natural\nlicence: CC0-1.0\n")
    drawn = [_draw(random) for _ in range(min(DRAWN, images))]
    for number in range(images):
        image, mask = (np.roll(pixels, number, axis=(0, 1)) for pixels in drawn[number % len(drawn)])
        Image.fromarray(image).save(root / f"images/train/{number:06d}.jpg", quality=90)
        Image.fromarray(mask).save(root / f"masks/train/{number:06d}.png")


def _draw(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    fields = np.stack([gaussian_filter(random.normal(size=(HEIGHT, WIDTH)), 20) for _ in range(CLASSES)])
    mask = fields.argmax(axis=0).astype(np.uint8)
    colours = random.integers(40, 216, (CLASSES, 3))
    texture = gaussian_filter(random.normal(size=(HEIGHT, WIDTH, 3)), (1, 1, 0)) * 60
    return (colours[mask] + texture).clip(0, 255).astype(np.uint8), mask


def _figures(images: int, rounds: Sequence[dict[str, float]], memory: dict[str, int]) -> dict[str, float]:
    """Say what was measured, and give it for the JSON line."""
    say(f"{images} images of {WIDTH} x {HEIGHT}, {os.cpu_count()} cores, {platform.machine()}, {len(rounds)} rounds")
    medians = {side: statistics.median(seconds[side] for seconds in rounds) for side in SIDES}
    for side, median in medians.items():
        rates = [images / seconds[side] for seconds in rounds]
        say(
            f"{SIDES[side]:22s} {images / median:7.1f} images/s ({min(rates):.1f} to {max(rates):.1f}), "
            f"peak memory {memory[side] / 2**20:.0f} MiB"
        )
    for side in ("loop", "ray_data"):
        ratios = [seconds[side] / seconds["job"] for seconds in rounds]
        say(f"job against {SIDES[side]}: {medians[side] / medians['job']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return {
        "ratio_vs_shardwriter": round(medians["loop"] / medians["job"], 3),
        "ratio_vs_ray_data": round(medians["ray_data"] / medians["job"], 3),
        "peak_memory_bytes": memory["job"],
        "images_per_s": round(images / medians["job"], 1),
        "images_per_s_shardwriter": round(images / medians["loop"], 1),
        "images_per_s_ray_data": round(images / medians["ray_data"], 1),
    }


if __name__ == "__main__":
    run_main(main)
