"""Draw the embedded sample corpora: five small worlds in the folder layout and label encoding of real corpora.

    python data_prep/sample_corpora.py --out DIR --images 240 --seed 0

========== ============== ============================================================================
driving/   Cityscapes     ``leftImg8bit/{train,val}/CITY``, ``gtFine/...`` with labelIds, void ids too
microscopy/ DSB2018       ``stage1_train/ID/images`` (RGBA), ``masks`` with one PNG for each nucleus
landcover/ LoveDA         ``{Train,Val}/{Urban,Rural}/{images,masks}_png``; 0 is no-data
fields/    PhenoBench     ``{train,val}/{images,semantics}``; 3 and 4 are plants cut by the border
town/      folder         ``images/val``, ``masks/val``, ``classes.yaml``; names that no other corpus has
========== ============== ============================================================================

``town`` is held out: streets in another season and palette, for queries with names never trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from data_prep.scenes.fields import paint_field
from data_prep.scenes.landcover import paint_landcover
from data_prep.scenes.microscopy import paint_nuclei
from data_prep.scenes.paint import Rng, UInt8
from data_prep.scenes.street import LATE_AUTUMN, SUMMER, paint_street
from digseg.console import progress, say
from digseg.errors import DigSegError, run_main

RECIPE = 1
"""Changes whenever the pictures of a seed change."""

STAMP = "sample_corpora.json"
VAL_EVERY = 5
TOWN_SHARE = 6
"""The held-out corpus has one image for this many of each other domain."""

TOWN_CLASSES = {
    7: "street",
    8: "walkway",
    11: "house",
    21: "shrubs",
    23: "clouds",
    24: "pedestrian",
    26: "automobile",
}
"""Cityscapes labelId to the name that the town's ``classes.yaml`` gives it; all else has no label there."""


def draw_sample_corpora(out: Path, images_per_domain: int, seed: int, size: int, workers: int | None = None) -> None:
    """Draw all five corpora below ``out``; the files depend on the other arguments, not on ``workers``.

    They are drawn under a temporary name and renamed, so ``out`` is whole or absent. Already drawn with the same
    arguments, nothing is done. ``size`` is the height in pixels; streets are a third wider.

    Raises:
        DigSegError: ``out`` holds something else, or an argument is out of range.
    """
    if images_per_domain < 2 * VAL_EVERY:
        raise DigSegError(f"--images is {images_per_domain}: a domain needs {2 * VAL_EVERY} or more")
    if not 64 <= size <= 1024:
        raise DigSegError(f"--size is {size}: allowed are 64 to 1024 pixels")
    if seed < 0:
        raise DigSegError(f"--seed is {seed}: it must not be negative")
    recipe = {"recipe": RECIPE, "images_per_domain": images_per_domain, "seed": seed, "size": size}
    if _already_drawn(out, recipe):
        say(f"sample corpora: {out} is there already")
        return
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    jobs = _jobs(partial, images_per_domain, seed, size)
    with progress("drawing sample corpora", total=len(jobs), unit="images") as bar, _mapper(workers) as run:
        for _ in run(_draw, jobs):
            bar.advance()
    _describe_town(partial / "town")
    (partial / STAMP).write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    partial.replace(out)


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Draw the embedded sample corpora.")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--images", type=int, default=240, help="images a domain (default 240)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files (default 0)")
    parser.add_argument("--size", type=int, default=192, help="height of an image in pixels (default 192)")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one a CPU)")
    given = parser.parse_args()
    draw_sample_corpora(given.out.resolve(), given.images, given.seed, given.size, given.workers)
    say(f"sample corpora: {given.out}")


@dataclass(frozen=True)
class _Job:
    """One image to draw and write."""

    domain: str
    root: Path
    index: int
    seed: int
    size: int

    def rng(self) -> Rng:
        """A generator of this image alone, so the order and number of processes do not matter."""
        return np.random.default_rng([self.seed, list(_WRITERS).index(self.domain), self.index])

    @property
    def split(self) -> str:
        return "val" if self.index % VAL_EVERY == 0 else "train"


def _already_drawn(out: Path, recipe: dict[str, int]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        out.parent.mkdir(parents=True, exist_ok=True)
        return False
    stamp = out / STAMP
    if not stamp.is_file():
        raise DigSegError(f"{out} exists and holds no sample corpora: choose another --out, or remove it")
    if json.loads(stamp.read_text(encoding="utf-8")) != recipe:
        raise DigSegError(
            f"{out} holds sample corpora drawn otherwise (see {stamp}): choose another --out, or remove it"
        )
    return True


def _jobs(root: Path, images_per_domain: int, seed: int, size: int) -> list[_Job]:
    jobs = []
    for domain in _WRITERS:
        count = max(images_per_domain // TOWN_SHARE, 4) if domain == "town" else images_per_domain
        jobs += [_Job(domain, root / domain, index, seed, size) for index in range(count)]
    return jobs


@contextmanager
def _mapper(workers: int | None) -> Iterator[Callable[..., Iterator[None]]]:
    count = workers or len(os.sched_getaffinity(0))
    if count == 1:
        yield map
        return
    # spawned, not forked: the caller may run threads (Ray, torch)
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:

        def run(function: Callable[[_Job], None], jobs: list[_Job]) -> Iterator[None]:
            return pool.map(function, jobs, chunksize=8)

        try:
            yield run
        except BaseException:
            pool.shutdown(cancel_futures=True)  # an interrupted draw must not go on to its end
            raise


def _draw(job: _Job) -> None:
    _WRITERS[job.domain](job, job.rng())


def _draw_driving(job: _Job, rng: Rng) -> None:
    image, mask = paint_street(rng, job.size, job.size * 4 // 3, SUMMER)
    city = "moorburg" if job.split == "val" else ("lindau", "ahrweil")[job.index % 2]
    name = f"{city}_{job.index:06d}_000019"
    _write(job.root / "leftImg8bit" / job.split / city / f"{name}_leftImg8bit.png", image)
    _write(job.root / "gtFine" / job.split / city / f"{name}_gtFine_labelIds.png", mask)


def _draw_microscopy(job: _Job, rng: Rng) -> None:
    image, nuclei = paint_nuclei(rng, job.size)
    name = hashlib.sha256(f"micrograph {job.seed} {job.index}".encode()).hexdigest()
    folder = job.root / "stage1_train" / name
    opaque = np.full((*image.shape[:2], 1), 255, np.uint8)
    _write(folder / "images" / f"{name}.png", np.concatenate([image, opaque], axis=2))
    for number, nucleus in enumerate(nuclei):
        nucleus_name = hashlib.sha256(f"{name} {number}".encode()).hexdigest()
        _write(folder / "masks" / f"{nucleus_name}.png", nucleus.astype(np.uint8) * 255)


def _draw_landcover(job: _Job, rng: Rng) -> None:
    urban = job.index % 2 == 0
    image, mask = paint_landcover(rng, job.size, urban)
    folder = job.root / job.split.capitalize() / ("Urban" if urban else "Rural")
    _write(folder / "images_png" / f"{job.index}.png", image)
    _write(folder / "masks_png" / f"{job.index}.png", mask)


def _draw_field(job: _Job, rng: Rng) -> None:
    image, mask = paint_field(rng, job.size)
    name = f"05-15_{job.index:05d}_P0030{job.index:03d}.png"
    _write(job.root / job.split / "images" / name, image)
    _write(job.root / job.split / "semantics" / name, mask)


def _draw_town(job: _Job, rng: Rng) -> None:
    image, mask = paint_street(rng, job.size, job.size * 4 // 3, LATE_AUTUMN)
    ids = np.full(256, 255, np.uint8)
    ids[list(TOWN_CLASSES)] = np.arange(len(TOWN_CLASSES))
    _write(job.root / "images" / "val" / f"town_{job.index:04d}.png", image)
    _write(job.root / "masks" / "val" / f"town_{job.index:04d}.png", ids[mask])


_WRITERS: dict[str, Callable[[_Job, Rng], None]] = {
    "driving": _draw_driving,
    "microscopy": _draw_microscopy,
    "landcover": _draw_landcover,
    "fields": _draw_field,
    "town": _draw_town,
}


def _describe_town(folder: Path) -> None:
    description: dict[str, Any] = {
        "classes": list(TOWN_CLASSES.values()),
        "ignore": [255],
        "domain": "natural",
        "licence": "Apache-2.0",
    }
    text = yaml.safe_dump(description, sort_keys=False)
    (folder / "classes.yaml").write_text(text, encoding="utf-8")


def _write(path: Path, pixels: UInt8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # run lengths only: faster than the usual search for repeats, and smaller on noise and on flat masks
    Image.fromarray(pixels).save(path, compress_level=1, compress_type=zlib.Z_RLE)


if __name__ == "__main__":
    run_main(main)
