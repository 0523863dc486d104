"""Verifying shards that lie somewhere: every byte, every index line, every mask, against what the manifest says."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from digseg.console import progress
from digseg.data.corpus import CorruptSampleError, decode_sample, read_stored
from digseg.data.duplicates import DuplicateFinder, Duplicates
from digseg.data.format import (
    MANIFEST_NAME,
    REJECTED_NAME,
    IndexEntry,
    Manifest,
    ShardEntry,
    Statistics,
    hashes_name,
    index_name,
    inner_folders,
    is_shard_file,
    parse_hashes,
    parse_header,
    parse_index,
    parse_manifest,
    shard_problems,
    split_folders,
    split_path,
)
from digseg.data.storage import Storage
from digseg.errors import DigSegError


@dataclass
class LintReport:
    """What was looked at, what is wrong with it, a line each, and the images that come more than once."""

    splits: int = 0
    shards: int = 0
    samples: int = 0
    problems: list[str] = field(default_factory=list)
    duplicates: Duplicates = field(default_factory=lambda: Duplicates(0, 0, ()))


def lint_shards(root: str | Path) -> LintReport:
    """Verify all splits of all corpora below a root (a folder or fsspec URL); nothing is changed.

    Checked are the manifest's digest; presence, size and sha256 of every shard, its index and hashes, and of the list
    of rejected samples; the index' agreement with shard and hashes; that every sample's image and mask decode, are of
    one size, and hold no id outside the vocabulary; that views have finite latents, of the right shape, and lie in
    their order; that no key comes twice; the manifest's statistics; and files of shards that no manifest knows, or that
    lie without one. One sample is in memory at a time, and the hashes of all. Images that come more than once are no
    problem of the shards; they are found by their hashes alone.

    Raises:
        DigSegError: there are no shards below the root, or a file that is there cannot be read.
    """
    storage = Storage(root)
    with storage.reading():
        return _linted(storage)


def _linted(storage: Storage) -> LintReport:
    report, finder = LintReport(), DuplicateFinder()
    folders = split_folders(storage)
    for folder in inner_folders(storage):
        if folder not in folders and any(map(is_shard_file, storage.files(folder))):
            report.problems.append(f"{storage.url(f'{folder}/{MANIFEST_NAME}')} is missing")
    for folder in folders:
        report.splits += 1
        path = f"{folder}/{MANIFEST_NAME}"
        content = storage.read(path)
        try:
            manifest = parse_manifest(content, storage.url(path))
        except DigSegError as error:
            report.problems.append(str(error))
            continue
        if content != manifest.to_json():
            report.problems.append(f"{storage.url(path)} was changed by hand: it says the same in other bytes")
        report.problems += _Split(storage, folder, manifest, report, finder).problems()
    report.duplicates = finder.find()
    return report


class _Split:
    def __init__(
        self, storage: Storage, folder: str, manifest: Manifest, report: LintReport, finder: DuplicateFinder
    ) -> None:
        self._storage, self._folder, self._manifest = storage, folder, manifest
        self._report, self._finder = report, finder
        self._keys: set[str] = set()
        self._counted: Statistics | None = None

    def problems(self) -> Iterator[str]:
        manifest, url = self._manifest, self._storage.url(f"{self._folder}/{MANIFEST_NAME}")
        if split_path(manifest.corpus, manifest.split) != self._folder:
            yield f"{url} describes {manifest.corpus}/{manifest.split}, not the folder it lies in"
        damaged = False
        with progress(f"verifying {self._folder}", manifest.samples, unit="samples") as bar:
            for shard in manifest.shards:
                self._report.shards += 1
                for problem in self._shard(shard):
                    damaged = True
                    yield problem
                bar.advance(shard.samples)
        # Counts of what could not be read would only repeat that it could not be read.
        if not damaged and self._counted != manifest.statistics:
            yield f"{url}: its statistics are not those of the masks"
        yield from self._rejected()
        known = {name for shard in manifest.shards for name in shard.digests()}
        for name in self._storage.files(self._folder):
            if is_shard_file(name) and name not in known:
                yield f"{self._storage.url(f'{self._folder}/{name}')} is not in the manifest"

    def _rejected(self) -> Iterator[str]:
        path = f"{self._folder}/{REJECTED_NAME}"
        try:
            content = self._storage.read(path)
        except FileNotFoundError:
            yield f"{self._storage.url(path)} is missing"
            return
        if hashlib.sha256(content).hexdigest() != self._manifest.rejected_sha256:
            yield f"{self._storage.url(path)} has another sha256 than the manifest says"

    def _shard(self, shard: ShardEntry) -> Iterator[str]:
        tar, index = f"{self._folder}/{shard.name}", f"{self._folder}/{index_name(shard.name)}"
        yield from shard_problems(self._storage, self._folder, shard)
        try:
            content = self._storage.read(index)
            entries = parse_index(content, self._storage.url(index))
        except FileNotFoundError:
            return  # said above
        except DigSegError as error:
            yield str(error)
            return
        header = parse_header(content)
        if header is None or (header.name, header.samples, header.sha256) != (shard.name, len(entries), shard.sha256):
            yield f"{self._storage.url(index)}: its first line does not fit the lines below it or the manifest"
        if len(entries) != shard.samples:
            yield f"{self._storage.url(index)} lists {len(entries)} samples, the manifest says {shard.samples}"
        yield from self._hashes(shard, entries)
        if self._storage.size(tar) is None:
            return
        for number, entry in enumerate(entries):
            self._report.samples += 1
            reason = self._sample(tar, entry, number)
            if reason:
                yield reason

    def _hashes(self, shard: ShardEntry, entries: Sequence[IndexEntry]) -> Iterator[str]:
        path = f"{self._folder}/{hashes_name(shard.name)}"
        try:
            lines = parse_hashes(self._storage.read(path), self._storage.url(path))
        except FileNotFoundError:
            return  # said above
        except DigSegError as error:
            yield str(error)
            return
        if [line.key for line in lines] != [entry.key for entry in entries]:
            yield f"{self._storage.url(path)} is not of the samples that the index lists"
        self._finder.add(self._folder, lines)

    def _sample(self, tar: str, entry: IndexEntry, number: int) -> str | None:
        """What is wrong with a sample; its statistics are kept where nothing is."""
        name = f"sample {entry.key!r} in {self._storage.url(tar)}"
        if entry.key in self._keys:
            return f"{name}: another sample of the split has this key too"
        self._keys.add(entry.key)
        try:
            sample = decode_sample(read_stored(self._storage, tar, entry, self._manifest.job))
        except CorruptSampleError as error:
            return str(error)
        mask = sample.mask
        if sample.image.shape[:2] != mask.shape:
            return f"{name}: the mask has {mask.shape[::-1]} pixels, the image {sample.image.shape[1::-1]}"
        num_classes = len(self._manifest.vocabulary)
        foreign = np.unique(mask[(mask >= num_classes) & (mask != self._manifest.ignore_id)])
        if foreign.size:
            ids = ", ".join(map(str, foreign[:5]))
            return f"{name}: ids outside the vocabulary of {num_classes} classes: {ids}"
        recipe = self._manifest.latents
        reason = recipe.problem(number, entry.key, mask.shape, sample.latents) if recipe else None
        if reason:
            return f"{name}: {reason}"
        counted = Statistics.of_mask(mask, num_classes)
        self._counted = Statistics.merged([self._counted, counted]) if self._counted else counted
        return None
