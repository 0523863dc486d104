"""The order of a corpus' samples within an epoch: a seeded permutation that is computed, never stored.

Samples are shuffled through a window of a few shards at a time, so that readers touch few files at once. A balanced
Feistel network over the next power of two permutes; an index that falls outside the length walks
on until it falls inside (cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
Any number of workers can ask for any index at any time, and resume needs nothing but the index.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 8
# Streams of an epoch's seed; its windows have 0, 1, 2, ...
_SHORT, _BLOCKS = -1, -2


@dataclass(frozen=True)
class WindowedOrder:
    """A shuffle of ``samples`` samples that lie in blocks (shards) of ``block`` each, the last one perhaps shorter.

    Blocks are permuted; each run of up to ``window`` of them is a window, and samples are permuted within it. So an
    epoch holds every sample once, and samples that are close in the order come from few blocks. What that costs:
    samples of blocks that fell into different windows never come near each other in that epoch. With no more blocks
    than fit one window the shuffle is a permutation of all samples.

    Any place of any epoch costs O(1) time and memory.
    """

    samples: int
    block: int
    window: int

    def sample(self, index: int, seed: int) -> int:
        """The sample at place ``index`` of the epoch named by ``seed``.

        Raises:
            IndexError: the index is not in [0, samples).
        """
        return self.window_at(index, seed).sample(index)

    def window_at(self, index: int, seed: int) -> Window:
        """The window that place ``index`` of the epoch named by ``seed`` belongs to. Raises IndexError."""
        if not 0 <= index < self.samples:
            raise IndexError(f"index {index} of {self.samples}")
        if self.block * self.window >= self.samples:
            return Window(0, (range(self.samples),), seed)
        short = _short_place(seed, self._blocks)
        if index < self._begin(short + 1, short):
            place = min(index // self.block, short)
        else:
            place = (index - self.samples) // self.block + self._blocks
        return _window(self, ((place + 1) * self._windows - 1) // self._blocks, seed)

    @property
    def _blocks(self) -> int:
        return -(-self.samples // self.block)

    @property
    def _windows(self) -> int:
        return -(-self._blocks // self.window)

    def _begin(self, place: int, short: int) -> int:
        """How many samples come before a place in the order of blocks; ``short`` is the place of the short block."""
        return place * self.block - (self._blocks * self.block - self.samples if place > short else 0)


@dataclass(frozen=True)
class Window:
    """Places [begin, end) of an epoch and the blocks of samples that lie there, in an order that ``seed`` names."""

    begin: int
    blocks: tuple[range, ...]
    seed: int

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        return tuple(accumulate(map(len, self.blocks)))

    @property
    def end(self) -> int:
        return self.begin + self._ends[-1]

    def sample(self, index: int) -> int:
        """The sample at a place of the epoch within the window."""
        place = permuted_index(index - self.begin, self._ends[-1], self.seed)
        block = bisect.bisect_right(self._ends, place)
        return self.blocks[block][place - self._ends[block]]


# A reader goes back and forth between the windows of its corpora, so a few of them are kept.
@lru_cache(maxsize=256)
def _window(order: WindowedOrder, number: int, seed: int) -> Window:
    count, windows = order._blocks, order._windows
    short = _short_place(seed, count)
    first, last = number * count // windows, (number + 1) * count // windows
    blocks = []
    for place in range(first, last):
        block = count - 1
        if place != short:
            block = permuted_index(place - (place > short), count - 1, mix64(seed, _BLOCKS))
        blocks.append(range(block * order.block, min((block + 1) * order.block, order.samples)))
    return Window(order._begin(first, short), tuple(blocks), mix64(seed, number))


@lru_cache(maxsize=256)
def _short_place(seed: int, blocks: int) -> int:
    """Where the last block, which may be shorter than the others, comes in the order of blocks."""
    return mix64(seed, _SHORT) % blocks


def permuted_index(index: int, length: int, seed: int) -> int:
    """Where ``index`` in [0, length) goes in the permutation of that length named by ``seed``.

    O(1) time and memory: a bijection of [0, length) for every seed.

    Raises:
        IndexError: the index is not in [0, length).
    """
    if not 0 <= index < length:
        raise IndexError(f"index {index} of {length}")
    if length == 1:
        return 0
    # An even number of bits, so that both halves are equal: at most 4 * length values, under 4 walks
    # expected.
    half = ((length - 1).bit_length() + 1) // 2
    keys = _round_keys(seed)
    while True:
        index = _feistel(index, half, keys)
        if index < length:
            return index


def mix64(*values: int) -> int:
    """A well-mixed 64-bit hash of integers (the finaliser of splitmix64, Steele et al. 2014)."""
    state = 0
    for value in values:
        state = (state ^ (value & _MASK64)) + _GOLDEN & _MASK64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK64
        state ^= state >> 31
    return state


@lru_cache(maxsize=1024)
def _round_keys(seed: int) -> tuple[int, ...]:
    return tuple(mix64(seed, round_number) for round_number in range(_ROUNDS))


def _feistel(value: int, half: int, keys: tuple[int, ...]) -> int:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for key in keys:
        state = (right ^ key) + _GOLDEN & _MASK64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
        left, right = right, left ^ (state ^ state >> 31) >> 17 & mask
    return left << half | right
