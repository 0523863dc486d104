"""Reading a sharded split: any sample by its number, with one ranged read."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from digseg.data.cache import ShardCache
from digseg.data.decoding import decode_image, decode_mask
from digseg.data.format import (
    LATENT_MEMBER,
    MASK_MEMBER,
    META_MEMBER,
    IndexEntry,
    Manifest,
    index_name,
    load_manifest,
    parse_index,
    shard_problems,
    split_path,
)
from digseg.data.index import ShardIndex
from digseg.data.latents import Latents, unpack_latents
from digseg.data.order import WindowedOrder
from digseg.data.storage import Storage
from digseg.errors import DigSegError

_RETRY_WAITS_S = (0.2, 1.0, 5.0)
"""Pauses before a read that failed is tried again: what a store or a network file system refuses for a moment."""


class CorruptSampleError(Exception):
    """A sample whose bytes are not what was written. Training replaces it; ``key`` says which one it is."""

    def __init__(self, key: str, where: str, reason: str) -> None:
        super().__init__(f"sample {key!r} in {where}: {reason}")
        self.key = key


@dataclass(frozen=True)
class StoredSample:
    """A sample as it lies in its shard: bytes that were verified, but not decoded. ``where`` names the shard."""

    entry: IndexEntry
    content: bytes
    where: str

    @property
    def key(self) -> str:
        return self.entry.key

    def member(self, name: str) -> bytes:
        """The content of a member. Raises KeyError where the sample has none of that name."""
        return self.entry.cut(name, self.content)


@dataclass(frozen=True)
class Sample:
    """``image`` uint8 [H, W, 3] RGB; ``mask`` [H, W] ids of the vocabulary (uint8, or uint16 above 255
    classes).

    With ``min_short_side`` the image may be smaller than the mask by up to a whole factor, see :meth:`read`.
    ``meta_json`` says size and source; ``latents`` float16 [C, h, w] of the image are there where they are stored.
    """

    key: str
    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[Any]
    meta_json: bytes
    latents: Latents | None = None

    @property
    def meta(self) -> dict[str, Any]:
        """``meta_json`` decoded. Raises ValueError where it is damaged."""
        decoded: dict[str, Any] = json.loads(self.meta_json)
        return decoded

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return self.image.nbytes + self.mask.nbytes + (0 if self.latents is None else self.latents.nbytes)


class ShardedCorpus:
    """A split of a corpus as a sequence of samples, numbered through its shards.

    Opening reads the manifest only; a shard's index is read when a sample of it is first asked for. The
    ``open_indexes`` that were used last stay in memory, whatever the size of the corpus. A sample whose shard is in
    the ``cache`` is read there.

    Raises:
        DigSegError: no such split, a damaged manifest, or (local roots) shard files that are missing or cut
            off.
    """

    def __init__(
        self, root: str | Path, corpus: str, split: str, open_indexes: int = 64, cache: ShardCache | None = None
    ) -> None:
        self.manifest: Manifest = load_manifest(root, corpus, split)
        self._views = 1 if self.manifest.latents is None else self.manifest.latents.views
        self._storage = Storage(root)
        self._folder = split_path(corpus, split)
        self._first = list(itertools.accumulate((s.samples for s in self.manifest.shards), initial=0))
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._open_indexes = open_indexes
        self._cache = cache
        if self._storage.is_local:
            self._check_sizes()

    def __len__(self) -> int:
        return self.manifest.samples

    @property
    def name(self) -> str:
        """``corpus/split``, as samples and messages name it."""
        return f"{self.manifest.corpus}/{self.manifest.split}"

    def shuffled(self, window: int) -> WindowedOrder:
        """An order of the samples that goes through ``window`` shards at a time; all views of a sample are one.

        Shards of unequal sizes are cut where shards of the largest size would be, so that a window may touch a few
        more than that.
        """
        largest = max(shard.samples for shard in self.manifest.shards)
        return WindowedOrder(len(self) // self._views, largest // self._views, window)

    def stored(self, index: int) -> StoredSample:
        """The undecoded bytes of sample ``index``, with one ranged read.

        Raises:
            CorruptSampleError: the bytes differ from what was written.
            DigSegError: the shard is gone, or cannot be read now.
        """
        shard, number = self._locate(index)
        entry = self._index(shard).entry(number)
        return self._cached(shard, entry) or read_stored(self._storage, self._path(shard), entry, self.manifest.job)

    def fetch(self, shard: int) -> bool:
        """Bring a shard into the cache, see :meth:`ShardCache.fetch`."""
        assert self._cache is not None
        return self._cache.fetch(self._storage, self._path(shard), self.manifest.shards[shard])

    def shards_of(self, block: range) -> range:
        """The numbers of the shards that hold a (not empty) block of the order that :meth:`shuffled` gives."""
        first, last = block.start * self._views, block.stop * self._views
        return range(bisect.bisect_right(self._first, first) - 1, bisect.bisect_left(self._first, last))

    def read(self, index: int, min_short_side: int | None = None) -> Sample:
        """Decode sample ``index``.

        With ``min_short_side`` the image is decoded at a reduced size where its shorter side stays at least
        that long (JPEG's own scaling, whole-factor averaging otherwise); the mask always has its full size.

        Raises:
            CorruptSampleError: the bytes differ from what was written, or cannot be decoded.
        """
        return decode_sample(self.stored(index), min_short_side)

    def must_read(self, index: int, min_short_side: int | None = None) -> Sample:
        """:meth:`read` where no other sample can take the place of a damaged one.

        Raises:
            DigSegError: the sample is damaged, with what mends it.
        """
        try:
            return self.read(index, min_short_side)
        except CorruptSampleError as error:
            raise DigSegError(f"{error}; run {self.manifest.job} again to mend it") from error

    def evenly(self, count: int) -> Iterator[Sample]:
        """``count`` evenly spaced samples, all where there are fewer; :meth:`must_read` one after the other."""
        count = min(count, len(self))
        return (self.must_read(number * len(self) // count) for number in range(count))

    def key(self, index: int) -> str:
        """The key of sample ``index``, without reading the sample."""
        shard, number = self._locate(index)
        return self._index(shard).key(number)

    def verify(self) -> None:
        """Compare every byte of every shard with the manifest's sha256.

        Raises:
            DigSegError: naming the first file that is missing or differs, or that cannot be read.
        """
        with self._storage.reading():
            for shard in self.manifest.shards:
                for problem in shard_problems(self._storage, self._folder, shard):
                    raise DigSegError(f"{problem}; run {self.manifest.job} again to mend it")

    def _cached(self, shard: int, entry: IndexEntry) -> StoredSample | None:
        """The sample out of the cache, None where its shard is not there."""
        if self._cache is None:
            return None
        known = self.manifest.shards[shard]
        content = self._cache.read_range(known, entry.start, entry.end)
        if content is not None and zlib.crc32(content) != entry.crc32:
            self._cache.drop(known)
            return None
        return None if content is None else StoredSample(entry, content, self._storage.url(self._path(shard)))

    def _path(self, shard: int) -> str:
        return f"{self._folder}/{self.manifest.shards[shard].name}"

    def _locate(self, index: int) -> tuple[int, int]:
        """(shard, number within it) of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = bisect.bisect_right(self._first, index) - 1
        return shard, index - self._first[shard]

    def _index(self, shard: int) -> ShardIndex:
        if shard not in self._indexes:
            entry = self.manifest.shards[shard]
            path = f"{self._folder}/{index_name(entry.name)}"
            url, hint = self._storage.url(path), f"run {self.manifest.job} again to mend it"
            try:
                content = self._storage.read(path)
            except FileNotFoundError as error:
                raise DigSegError(f"{url} is missing; {hint}") from error
            except OSError as error:
                raise DigSegError(f"{url} cannot be read: {error}") from error
            if hashlib.sha256(content).hexdigest() != entry.index_sha256:
                raise DigSegError(f"{url} is not what the manifest says; {hint}")
            self._indexes[shard] = ShardIndex(parse_index(content, url))
            if len(self._indexes) > self._open_indexes:
                self._indexes.popitem(last=False)
        self._indexes.move_to_end(shard)
        return self._indexes[shard]

    def _check_sizes(self) -> None:
        for shard in self.manifest.shards:
            path = f"{self._folder}/{shard.name}"
            size = self._storage.size(path)
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size} bytes instead of {shard.bytes}"
                hint = f"run {self.manifest.job} again to mend it"
                raise DigSegError(f"{self._storage.url(path)} {found}; {hint}")


def read_stored(storage: Storage, path: str, entry: IndexEntry, job: str) -> StoredSample:
    """The bytes of the sample that ``entry`` places in the tar ``path``, compared with their checksum.

    A read that fails is tried again a few times. If it fails still, that is no damage of the sample: one machine may
    see it and another not, and they would train on different samples.

    Raises:
        CorruptSampleError: the bytes differ from what was written.
        DigSegError: the tar is gone (``job`` makes it again), or cannot be read now.
    """
    where = storage.url(path)
    try:
        content = _read_range(storage, path, entry)
    except FileNotFoundError as error:
        raise DigSegError(f"{where} is gone; run {job} again to mend it") from error
    except OSError as error:
        raise DigSegError(f"sample {entry.key!r} in {where} cannot be read: {error}") from error
    if zlib.crc32(content) != entry.crc32:
        raise CorruptSampleError(entry.key, where, "its bytes are not what was written (crc32 differs)")
    return StoredSample(entry, content, where)


def _read_range(storage: Storage, path: str, entry: IndexEntry) -> bytes:
    for wait_s in _RETRY_WAITS_S:
        try:
            return storage.read_range(path, entry.start, entry.end)
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(wait_s)
    return storage.read_range(path, entry.start, entry.end)


def decode_sample(stored: StoredSample, min_short_side: int | None = None) -> Sample:
    """Decode image, mask and meta; see :meth:`ShardedCorpus.read`.

    Raises:
        CorruptSampleError: a member is missing or cannot be decoded.
    """
    entry = stored.entry
    try:
        return Sample(
            entry.key,
            decode_image(stored.member(entry.image_member), min_short_side),
            decode_mask(stored.member(MASK_MEMBER)),
            stored.member(META_MEMBER),
            unpack_latents(stored.member(LATENT_MEMBER)) if LATENT_MEMBER in entry.members else None,
        )
    except (KeyError, StopIteration) as error:
        raise CorruptSampleError(entry.key, stored.where, "its index line lacks a member") from error
    except (OSError, EOFError, TypeError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CorruptSampleError(entry.key, stored.where, f"cannot be decoded ({error})") from error
