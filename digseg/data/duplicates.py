"""The same image twice, or nearly: found by hashes, within and across the splits and corpora of a root."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from digseg.data.format import ImageHashes, Manifest, hashes_name, parse_hashes, split_path
from digseg.data.storage import Storage
from digseg.errors import DigSegError

NEAR_BITS = 4
"""Images whose perceptual hashes differ in no more of their 64 bits are nearly the same."""

HASH_BITS = 64

UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]


class Member(NamedTuple):
    """An image: ``split`` is ``corpus/split``, ``number`` its place there."""

    split: str
    number: int
    key: str

    def record(self) -> dict[str, str]:
        """Its names, apart."""
        corpus, _, split = self.split.partition("/")
        return {"corpus": corpus, "split": split, "key": self.key}


@dataclass(frozen=True)
class DuplicateGroup:
    """Images of which each is the same as, or nearly the same as, some other of them.

    ``pair`` are the two that are closest, of different splits where the group has several: equal in every pixel
    (``same``), or with perceptual hashes that differ in ``distance`` bits.
    """

    members: tuple[Member, ...]
    pair: tuple[Member, Member]
    same: bool
    distance: int

    @property
    def leaks(self) -> bool:
        """Whether it reaches across splits or corpora."""
        return self.pair[0].split != self.pair[1].split

    def to_line(self) -> str:
        """A line of JSON; the closest pair comes first among the members, ``kind`` and ``distance`` are its own."""
        others = (member for member in self.members if member not in self.pair)
        record = {
            "kind": "exact" if self.same else "near",
            "distance": self.distance,
            "leak": self.leaks,
            "members": [member.record() for member in (*self.pair, *others)],
        }
        return json.dumps(record) + "\n"

    def __str__(self) -> str:
        first, second = (f"{member.key} of {member.split}" for member in self.pair)
        how = "the same image" if self.same else f"nearly the same image: {self.distance} of {HASH_BITS} bits differ"
        more = f"; {len(self.members) - 2} more like them" if len(self.members) > 2 else ""
        return f"{first} and {second} ({how}{more})"


@dataclass(frozen=True)
class Duplicates:
    """Groups across splits first, those with the closest pairs before others. ``flat`` images were not compared."""

    images: int
    flat: int
    groups: tuple[DuplicateGroup, ...]

    @property
    def leaks(self) -> tuple[DuplicateGroup, ...]:
        return tuple(group for group in self.groups if group.leaks)


def find_duplicates(storage: Storage, manifests: Iterable[Manifest]) -> Duplicates:
    """Duplicates among all images of some splits, by the hashes beside their shards.

    Raises:
        DigSegError: a file of hashes is missing or damaged, or cannot be read.
    """
    with storage.reading():
        return _found(storage, manifests)


def _found(storage: Storage, manifests: Iterable[Manifest]) -> Duplicates:
    finder = DuplicateFinder()
    for manifest in manifests:
        folder = split_path(manifest.corpus, manifest.split)
        for shard in manifest.shards:
            path = f"{folder}/{hashes_name(shard.name)}"
            try:
                hashes = parse_hashes(storage.read(path), storage.url(path))
            except FileNotFoundError as error:
                raise DigSegError(f"{storage.url(path)} is missing; run {manifest.job} again to mend it") from error
            finder.add(folder, hashes)
    return finder.find()


class DuplicateFinder:
    """Takes hashes a shard at a time and keeps some 200 bytes an image."""

    def __init__(self) -> None:
        self._splits: list[str] = []
        self._sizes: list[int] = []
        self._keys: list[str] = []
        self._pixels: list[npt.NDArray[np.bytes_]] = []
        self._hashes: list[UInt64Array] = []
        self._flat: list[npt.NDArray[np.bool_]] = []

    def add(self, split: str, hashes: Sequence[ImageHashes]) -> None:
        """The next images of ``split`` in the order of its samples; the shards of a split follow each other."""
        if not self._splits or self._splits[-1] != split:
            self._splits.append(split)
            self._sizes.append(0)
        self._sizes[-1] += len(hashes)
        self._keys += [line.key for line in hashes]
        self._pixels.append(np.array([line.pixels_sha256 for line in hashes], dtype="S64"))
        self._hashes.append(np.array([int(line.phash or "0", 16) for line in hashes], dtype=np.uint64))
        self._flat.append(np.array([line.phash is None for line in hashes], dtype=bool))

    def find(self, near_bits: int = NEAR_BITS) -> Duplicates:
        """All groups among the images that were added.

        A flat image (see :func:`digseg.data.hashes.hash_image`) is in none: blank tiles are alike everywhere.
        """
        if not self._keys:
            return Duplicates(0, 0, ())
        flat = np.concatenate(self._flat)
        images = np.flatnonzero(~flat)
        pixels = np.unique(np.concatenate(self._pixels)[images], return_inverse=True)[1]
        values, hashes = np.unique(np.concatenate(self._hashes)[images], return_inverse=True)
        pairs = near_pairs(values, near_bits)
        component = _components(len(values), pairs)
        edges: dict[int, list[_Edge]] = defaultdict(list)
        for left, right in pairs.tolist():
            distance = int(np.bitwise_count(values[left] ^ values[right]))
            edges[int(component[left])].append(_Edge(distance, left, right))
        splits = np.repeat(np.arange(len(self._sizes)), self._sizes)[images]
        labels = component[hashes]
        shared = np.flatnonzero(np.bincount(labels, minlength=1)[labels] > 1)
        groups = []
        for run in _runs(labels[shared]):
            places = shared[run]
            near = edges[int(labels[places[0]])]
            groups.append(_group(places, splits, pixels, hashes, near, images, self._member))
        groups.sort(key=lambda group: (not group.leaks, not group.same, group.distance, group.members))
        return Duplicates(len(flat), int(flat.sum()), tuple(groups))

    def _member(self, image: int) -> Member:
        ends = list(itertools.accumulate(self._sizes))
        split = int(np.searchsorted(ends, image, side="right"))
        return Member(self._splits[split], image - (ends[split] - self._sizes[split]), self._keys[image])


def near_pairs(values: UInt64Array, near_bits: int) -> Int64Array:
    """Places [P, 2] of all pairs of distinct 64-bit ``values`` that differ in at most ``near_bits`` bits, sorted.

    Cut into ``near_bits + 2`` bands, two such values agree in at least two whole bands, as every differing bit spoils
    one band at most (the pigeonhole principle; multi-index hashing, Norouzi et al., arXiv 1307.2982). So only values
    that agree in some two bands are compared: of a million values that spread evenly, each with a few others. Values
    that crowd together in two bands are compared with each other.
    """
    bands = _bands(near_bits + 2)
    found = [np.empty((0, 2), dtype=np.int64)]
    for kept in itertools.combinations(bands, 2):
        keys = values & np.bitwise_or.reduce(np.array(kept, dtype=np.uint64))
        order = np.argsort(keys, kind="stable")
        for left, right in _equal_neighbours(keys[order]):
            close = np.bitwise_count(values[order[left]] ^ values[order[right]]) <= near_bits
            found.append(np.sort(np.stack([order[left[close]], order[right[close]]], axis=1), axis=1))
    return np.unique(np.concatenate(found), axis=0)


def _bands(count: int) -> list[int]:
    """Masks of ``count`` bands of nearly equal width that share the bits of a hash out."""
    edges = [HASH_BITS * number // count for number in range(count + 1)]
    return [(1 << end) - (1 << start) for start, end in itertools.pairwise(edges)]


def _equal_neighbours(ordered: UInt64Array) -> Iterator[tuple[Int64Array, Int64Array]]:
    """Places of all pairs of equal values in a sorted array, those 1 apart, then 2 apart, and so on."""
    left = np.arange(len(ordered))
    for apart in range(1, len(ordered)):
        left = left[left + apart < len(ordered)]
        left = left[ordered[left] == ordered[left + apart]]
        if not left.size:
            return
        yield left, left + apart


class _Edge(NamedTuple):
    """Two hashes, by number, that are near."""

    distance: int
    left: int
    right: int


def _components(count: int, pairs: Int64Array) -> npt.NDArray[np.int32]:
    """The number of the connected component of each of ``count`` nodes."""
    graph = coo_array((np.ones(len(pairs), dtype=bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    labels: npt.NDArray[np.int32] = connected_components(graph, directed=False)[1]
    return labels


def _runs(labels: npt.NDArray[np.integer]) -> list[Int64Array]:
    """The places of each label, in order."""
    if not labels.size:
        return []
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _group(
    places: Int64Array,
    splits: Int64Array,
    pixels: Int64Array,
    hashes: Int64Array,
    edges: Sequence[_Edge],
    images: Int64Array,
    member: Callable[[int], Member],
) -> DuplicateGroup:
    """The group of the images at ``places`` of the arrays, which number their splits, pixels and hashes."""
    across = len(np.unique(splits[places])) > 1
    apart = splits if across else np.arange(len(splits))
    (left, right), same, distance = _closest(places, pixels, hashes, edges, apart)
    members = tuple(member(int(images[place])) for place in places)
    return DuplicateGroup(members, (member(int(images[left])), member(int(images[right]))), same, distance)


def _closest(
    places: Int64Array, pixels: Int64Array, hashes: Int64Array, edges: Iterable[_Edge], apart: Int64Array
) -> tuple[tuple[int, int], bool, int]:
    """The closest two places that differ in ``apart``, whether they are the same, and the bits between them."""
    for same, labels in ((True, pixels), (False, hashes)):
        for run in _runs(labels[places]):
            pair = _pair(places[run], places[run], apart)
            if pair:
                return pair, same, 0
    of_hash = {int(hashes[places[run[0]]]): places[run] for run in _runs(hashes[places])}
    for distance, left, right in sorted(edges):
        pair = _pair(of_hash[left], of_hash[right], apart)
        if pair:
            return pair, False, distance
    raise AssertionError("a component of several images has an edge between any two parts of it")


def _pair(left: Int64Array, right: Int64Array, apart: Int64Array) -> tuple[int, int] | None:
    """A place of ``left`` and one of ``right`` that differ in ``apart``, None where there are none."""
    for first in left[np.unique(apart[left], return_index=True)[1]]:
        others = right[apart[right] != apart[first]]
        if others.size:
            return int(first), int(others[0])
    return None
