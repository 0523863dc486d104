"""What reading training data costs: against webdataset, against decoding from memory, and as a corpus grows.

Four comparisons on a corpus of JPEGs and PNG masks that is drawn here (480x360 pixels, as CamVid's are):

- training samples a second (shuffled, decoded, augmented, 256 px crops) against ``webdataset`` with the same batch size
  and number of loader processes. Its pipeline is that of its documentation: shuffled shards, a buffer of 1000, its own
  decoders, batches made in the loader processes. The augmentation is the same twice: in distribution, written the usual
  way (PIL resizes the whole image, then crop, mirror, ``ImageEnhance``; ``ratio_vs_webdataset``), and in code, this
  project's own (``ratio_vs_webdataset_same_code``);
- the same against the floor: decoding and augmenting the same bytes from memory, in as many processes of torch's own
  loader;
- undecoded samples a second in shuffled order against ``webdataset`` reading one shard after another;
- a sample's cost among a million indexed samples against its cost among a thousand, for training samples and undecoded
  ones. The million are hard links to the same shards, so that both read the same bytes.

The sides take turns; figures are medians over the rounds, spreads are those of the rounds' ratios. Loader processes
start, and fill their queues, before the clock does. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from scipy.ndimage import gaussian_filter
from shared import add_json, report
from torch.utils.data import DataLoader, Dataset
from webdataset.autodecode import imagehandler

from digseg.config import Config
from digseg.console import say
from digseg.data.corpus import ShardedCorpus
from digseg.data.decoding import decode_image, decode_mask
from digseg.data.format import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    MASK_MEMBER,
    Manifest,
    ShardEntry,
    Statistics,
    index_name,
    shard_name,
    split_path,
)
from digseg.data.hashes import hash_image
from digseg.data.loader import training_batches
from digseg.data.mixture import GlobalOrder
from digseg.data.storage import Storage
from digseg.data.training_data import TrainingData
from digseg.data.transform_settings import TransformSettings
from digseg.data.transforms import training_crop
from digseg.data.writer import EncodedSample, ShardWriter, encode_mask
from digseg.errors import run_main

CORPUS, SPLIT = "drawn", "train"
HEIGHT, WIDTH, CLASSES, CROP, BATCH = 360, 480, 12, 256, 16
SAMPLES, SHARDS, MILLION = 1024, 4, 10**6
WINDOW = 16 * SAMPLES // SHARDS  # what is shuffled together: each opens the indexes of 16 more shards of the million
LABELS = np.arange(256, dtype=np.uint8)
Round = Callable[[], float]  # samples a second
Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]  # image and labels of a crop


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--workers", type=int, default=1, help="loader processes of either side")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, default=20, help=f"timed batches of {BATCH} a round")
    add_json(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        say(f"drawing {SAMPLES} samples of {WIDTH}x{HEIGHT} pixels ...")
        manifest = _draw_corpus(root / "thousand")
        _link_corpus(root / "thousand", root / "million", manifest)
        config = _config(root / "thousand", options.workers)
        settings = TransformSettings.of(config.data, config.data.corpora[0], manifest.domain)
        urls = [str(root / "thousand" / split_path(CORPUS, SPLIT) / shard.name) for shard in manifest.shards]
        corpus = ShardedCorpus(root / "thousand", CORPUS, SPLIT)

        say(f"training samples/s, crops of {CROP}, batches of {BATCH}, {options.workers} loader processes a side:")
        loaders = {
            "digseg": training_batches(TrainingData(config.data, seed=0), config, 0, 1, 0, 10**6),
            "webdataset": _webdataset_batches(urls, _OrdinaryAugmentation(settings), options.workers),
            "webdataset, same code": _webdataset_batches(urls, _SameAugmentation(settings), options.workers),
            "from memory": _memory_batches(corpus, settings, options.workers),
        }
        decoded = _compared(
            {name: _batch_round(batches, options) for name, batches in loaders.items()}, options.rounds, "digseg"
        )
        del loaders
        say("undecoded samples/s, one process:")
        raw = _compared(
            {
                "digseg, shuffled": _stored_round(corpus),
                "webdataset, in order": lambda: _rate(SAMPLES, iter(wds.WebDataset(urls, shardshuffle=False))),
            },
            options.rounds,
            "digseg, shuffled",
        )
        corpora = {"million": root / "million", "thousand": root / "thousand"}
        say("training samples/s by the number of samples that are indexed, one process:")
        sides = {name: _sample_round(TrainingData(_config(path, 0).data, seed=0)) for name, path in corpora.items()}
        grown = _compared(sides, min(options.rounds, 3), "million")
        say("undecoded samples/s by the number of samples that are indexed, one process:")
        sides = {name: _stored_round(ShardedCorpus(path, CORPUS, SPLIT)) for name, path in corpora.items()}
        raw_grown = _compared(sides, options.rounds, "million")
        figures = {
            "samples_per_second": decoded["digseg"][0],
            "ratio_vs_webdataset": decoded["webdataset"][1],
            "ratio_vs_webdataset_same_code": decoded["webdataset, same code"][1],
            "ratio_vs_decode_floor": decoded["from memory"][1],
            "raw_samples_per_second": raw["digseg, shuffled"][0],
            "ratio_raw_vs_webdataset": raw["webdataset, in order"][1],
            "cost_ratio_1e6_vs_1e3": 1 / grown["thousand"][1],
            "raw_cost_ratio_1e6_vs_1e3": 1 / raw_grown["thousand"][1],
            "workers": options.workers,
        }
    report({name: round(value, 3) for name, value in figures.items()}, options.json)


def _compared(sides: dict[str, Round], rounds: int, ours: str) -> dict[str, tuple[float, float]]:
    """Name -> (median rate, median over the rounds of our rate by this one's), after a round that does not count."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in sides if number % 2 else reversed(sides):
            rate = sides[name]()
            if number:
                rates[name].append(rate)
    result = {}
    for name, values in rates.items():
        ratios = [mine / other for mine, other in zip(rates[ours], values, strict=True)]
        result[name] = (statistics.median(values), statistics.median(ratios))
        spread = "" if name == ours else f", ratio {result[name][1]:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        say(f"  {name:22} {result[name][0]:9.0f}{spread}")
    return result


def _rate(samples: int, stream: Iterator[Any]) -> float:
    """Samples a second of the next so many items of a stream."""
    began = time.perf_counter()
    for _ in islice(stream, samples):
        pass
    return samples / (time.perf_counter() - began)


def _batch_round(batches: Iterator[Any], options: argparse.Namespace) -> Round:
    def measure() -> float:
        # What was made while the others had their turn does not count.
        for _ in islice(batches, 2 * options.workers + 2):
            pass
        return BATCH * _rate(options.batches, batches)

    return measure


def _stored_round(corpus: ShardedCorpus, samples: int = 2 * WINDOW) -> Round:
    """Undecoded samples at consecutive positions of the order that training has; each round goes on."""
    order = GlobalOrder([corpus.shuffled(16)], [1.0], seed=0)
    stream = (corpus.stored(order.locate(position).sample) for position in count())
    return lambda: _rate(samples, stream)


def _sample_round(data: TrainingData, samples: int = WINDOW) -> Round:
    """Training samples at consecutive positions, in this process; each round goes on through another window."""
    stream = (data.sample(position) for position in count())
    return lambda: _rate(samples, stream)


class _SameAugmentation:
    """The augmentation of training, by its own code."""

    decoders = (imagehandler("rgb8", ["jpg"]), imagehandler("l8", ["png"]))

    def __init__(self, settings: TransformSettings) -> None:
        self._settings, self._random = settings, np.random.default_rng(0)

    def __call__(self, sample: dict[str, Any]) -> Pair:
        return training_crop(sample["image.jpg"], sample["mask.png"], LABELS, self._settings, self._random)


class _OrdinaryAugmentation:
    """The same augmentation in distribution, as it is usually written for PIL."""

    decoders = (imagehandler("pilrgb", ["jpg"]), imagehandler("pill", ["png"]))

    def __init__(self, settings: TransformSettings) -> None:
        self._settings, self._random = settings, np.random.default_rng(0)

    def __call__(self, sample: dict[str, Any]) -> Pair:
        settings, random = self._settings, self._random
        image, mask = sample["image.jpg"], sample["mask.png"]
        ratio = settings.short_side * random.uniform(*settings.scale) / min(image.size)
        size = tuple(round(side * ratio) for side in image.size)
        image = image.resize(size, Image.Resampling.BILINEAR)
        mask = mask.resize(size, Image.Resampling.NEAREST)
        left, top = (int(random.integers(min(0, side - CROP), max(0, side - CROP) + 1)) for side in size)
        if min(size) < CROP:
            canvas, ids = Image.new("RGB", (CROP, CROP), (128, 128, 128)), Image.new("L", (CROP, CROP), 255)
            canvas.paste(image, (-left, -top))
            ids.paste(mask, (-left, -top))
            image, mask = canvas, ids
        else:
            box = (left, top, left + CROP, top + CROP)
            image, mask = image.crop(box), mask.crop(box)
        if random.random() < 0.5:
            image, mask = (part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for part in (image, mask))
        bounds = 1 - settings.colour_jitter, 1 + settings.colour_jitter
        for kind in (ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Brightness):
            image = kind(image).enhance(random.uniform(*bounds))
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)), np.array(mask)


def _webdataset_batches(
    urls: Sequence[str], augmentation: _SameAugmentation | _OrdinaryAugmentation, workers: int
) -> Iterator[Any]:
    dataset = (
        wds.WebDataset(list(urls), shardshuffle=len(urls), seed=0, detshuffle=True)
        .repeat()
        .shuffle(1000)
        .decode(*augmentation.decoders)
        .map(augmentation)
        .batched(BATCH)
    )
    return iter(wds.WebLoader(dataset, batch_size=None, num_workers=workers))


class _InMemory(Dataset[Pair]):
    """The encoded images and masks of a corpus as bytes."""

    def __init__(self, corpus: ShardedCorpus, settings: TransformSettings) -> None:
        stored = [corpus.stored(number) for number in range(len(corpus))]
        self._encoded = [(s.member(s.entry.image_member), s.member(MASK_MEMBER)) for s in stored]
        self._settings, self._random = settings, np.random.default_rng(0)

    def __getitem__(self, number: int) -> Pair:
        image, mask = self._encoded[number]
        pixels = decode_image(image, self._settings.longest_short_side)
        return training_crop(pixels, decode_mask(mask), LABELS, self._settings, self._random)


def _memory_batches(corpus: ShardedCorpus, settings: TransformSettings, workers: int) -> Iterator[Any]:
    numbers = cycle([list(range(start, start + BATCH)) for start in range(0, SAMPLES, BATCH)])
    dataset = _InMemory(corpus, settings)
    return iter(DataLoader(dataset, batch_sampler=numbers, num_workers=workers))  # type: ignore[arg-type]


def _config(root: Path, workers: int) -> Config:
    return Config.model_validate(
        {
            "cluster": {"backend": "local"},
            "data": {
                "root": str(root),
                "corpora": [{"name": CORPUS, "split": SPLIT}],
                "crop_size": CROP,
                "short_side": CROP,
                "workers": workers,
            },
            "training": {"steps": 10**6, "global_batch_size": BATCH},
        }
    )


def _draw_corpus(root: Path) -> Manifest:
    random = np.random.default_rng(0)
    pictures = [_picture(random) for _ in range(32)]
    storage, folder, shards, totals = Storage(root), split_path(CORPUS, SPLIT), [], []
    for number in range(SHARDS):
        counts = []
        with ShardWriter(storage, folder, shard_name(CORPUS, SPLIT, number)) as writer:
            for sample in range(SAMPLES // SHARDS):
                image, mask = (np.roll(a, 7 * sample + number, axis=1) for a in pictures[sample % len(pictures)])
                jpeg = io.BytesIO()
                Image.fromarray(image).save(jpeg, "JPEG", quality=88)
                counts.append(Statistics.of_mask(mask, CLASSES))
                key = f"{number}-{sample:05d}"
                encoded = encode_mask(mask, CLASSES)
                writer.add(EncodedSample(key, jpeg.getvalue(), "jpg", encoded, {}, hash_image(key, image)))
            totals.append(Statistics.merged(counts))
            shards.append(writer.close("0" * 64, totals[-1], [])[1])
    return _write_manifest(storage, shards, Statistics.merged(totals))


def _picture(random: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Regions with a colour and a texture each; as a JPEG and a PNG of about 41 and 4 kB."""
    fields = gaussian_filter(random.normal(size=(CLASSES, HEIGHT, WIDTH)), (0, 18, 18))
    mask = fields.argmax(axis=0).astype(np.uint8)
    colours = random.integers(30, 220, (CLASSES, 3))[mask]
    texture = (
        gaussian_filter(random.normal(size=(HEIGHT, WIDTH, 1)), (1.1, 1.1, 0))
        * random.uniform(10, 90, 12)[mask][..., None]
    )
    return (colours + texture).clip(0, 255).astype(np.uint8), mask


def _link_corpus(source: Path, target: Path, manifest: Manifest) -> None:
    """A corpus of a million samples whose shards are those of ``source``, again and again."""
    folder = Path(split_path(CORPUS, SPLIT))
    (target / folder).mkdir(parents=True)
    shards = []
    for number, shard in zip(range(MILLION * SHARDS // SAMPLES), cycle(manifest.shards), strict=False):
        name = shard_name(CORPUS, SPLIT, number)
        for old, new in ((shard.name, name), (index_name(shard.name), index_name(name))):
            os.link(source / folder / old, target / folder / new)
        shards.append(shard.model_copy(update={"name": name}))
    _write_manifest(Storage(target), shards, manifest.statistics)


def _write_manifest(storage: Storage, shards: Sequence[ShardEntry], counts: Statistics) -> Manifest:
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        corpus=CORPUS,
        domain="natural",
        split=SPLIT,
        licence="CC0-1.0",
        vocabulary=tuple(f"class {number}" for number in range(CLASSES)),
        may_contain=(),
        ignore_id=255,
        samples=sum(shard.samples for shard in shards),
        rejected=0,
        rejected_sha256=hashlib.sha256(b"").hexdigest(),
        shards=tuple(shards),
        statistics=counts,
    ).with_digest()
    storage.write(f"{split_path(CORPUS, SPLIT)}/{MANIFEST_NAME}", manifest.to_json())
    return manifest


if __name__ == "__main__":
    run_main(main)
