"""Shards of given images and masks, written without Ray."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from digseg.config import Config
from digseg.data.corpus import ShardedCorpus
from digseg.data.format import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    REJECTED_NAME,
    Manifest,
    Statistics,
    ignore_id,
    shard_name,
    split_path,
)
from digseg.data.hashes import hash_image
from digseg.data.storage import Storage
from digseg.data.writer import EncodedSample, ShardWriter, encode_mask, encode_png

Pixels = NDArray[Any]


def write_split(
    root: str | Path,
    corpus: str,
    samples: Mapping[str, tuple[Pixels, Pixels]],
    vocabulary: Sequence[str],
    split: str = "train",
    domain: str = "natural",
    may_contain: Sequence[str] = (),
    samples_per_shard: int = 4,
) -> Manifest:
    """Write key -> (image, mask) as shards of `root` in the order given."""
    storage, folder = Storage(root), split_path(corpus, split)
    entries, statistics = [], []
    items = list(samples.items())
    for number, start in enumerate(range(0, len(items), samples_per_shard)):
        part = items[start : start + samples_per_shard]
        counts = [Statistics.of_mask(mask, len(vocabulary)) for _, (_, mask) in part]
        with ShardWriter(storage, folder, shard_name(corpus, split, number)) as writer:
            for key, (image, mask) in part:
                mask_png = encode_mask(mask, len(vocabulary))
                hashes = hash_image(key, image)
                writer.add(EncodedSample(key, encode_png(image), "png", mask_png, {"key": key}, hashes))
            header, entry = writer.close("0" * 64, Statistics.merged(counts), [])
        entries.append(entry)
        statistics.append(header.statistics)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        corpus=corpus,
        domain=domain,
        split=split,
        licence="CC0-1.0",
        vocabulary=tuple(vocabulary),
        may_contain=tuple(may_contain),
        ignore_id=ignore_id(len(vocabulary)),
        samples=len(items),
        rejected=0,
        rejected_sha256=hashlib.sha256(b"").hexdigest(),
        shards=tuple(entries),
        statistics=Statistics.merged(statistics),
    ).with_digest()
    storage.write(f"{folder}/{REJECTED_NAME}", b"")
    storage.write(f"{folder}/{MANIFEST_NAME}", manifest.to_json())
    return manifest


def noise_samples(
    number: int, num_classes: int, seed: int = 0, size: tuple[int, int] = (40, 56)
) -> dict[str, tuple[Pixels, Pixels]]:
    """Random images and masks that use every class and the ignore id."""
    random = np.random.default_rng(seed)
    ignored = ignore_id(num_classes)
    kind = np.uint8 if ignored == 255 else np.uint16
    return {
        f"k{index:03d}": (
            random.integers(0, 256, (*size, 3), dtype=np.uint8),
            np.where(random.random(size) < 0.1, ignored, random.integers(0, num_classes, size)).astype(kind),
        )
        for index in range(number)
    }


def data_config(root: str | Path, corpora: Sequence[Mapping[str, Any]], batch: int = 8, **data: Any) -> Config:
    """A run over `corpora` in this process, with small crops."""
    settings = {"root": str(root), "corpora": list(corpora), "crop_size": 32, "short_side": 40, **data}
    return Config.model_validate(
        {
            "cluster": {"backend": "local"},
            "data": settings,
            "training": {"steps": 4, "global_batch_size": batch},
        }
    )


def damage_samples(root: str | Path, corpus: str, samples: Iterable[int], split: str = "train") -> None:
    """Flip a byte in each of the samples of a split."""
    opened = ShardedCorpus(root, corpus, split)
    for number in samples:
        stored = opened.stored(number)
        content = bytearray(Path(stored.where).read_bytes())
        content[stored.entry.start + 600] ^= 0xFF
        Path(stored.where).write_bytes(content)
