"""Which corpus a global position belongs to, by weights, and which sample of which epoch it is there.

A periodic table holds every corpus exactly in proportion to its weight, evenly spread with seeded jitter,
so that the proportions hold over every period and nearly so over every batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from digseg.data.order import Window, WindowedOrder, mix64
from digseg.errors import DigSegError

MIN_PERIOD = 256
MAX_PERIOD = 65_536
_ORDER = 0  # stream of the run's seed


class Place(NamedTuple):
    """A sample of a corpus of the mixture, and the epoch (of that corpus) in which it comes."""

    corpus: int
    epoch: int
    sample: int


class GlobalOrder:
    """The sample at every global position >= 0 of a run, a pure function of (seed, position).

    Args:
        corpora: how each corpus is shuffled.
        weights: of the corpora, see :class:`Mixture`.
    """

    def __init__(self, corpora: Sequence[WindowedOrder], weights: Sequence[float], seed: int) -> None:
        self._corpora, self._seed = tuple(corpora), seed
        self.mixture = Mixture([corpus.samples for corpus in corpora], weights, seed)

    def corpus_at(self, position: int) -> int:
        """The corpus that a position belongs to; a replacement is of the same."""
        return self.mixture.locate(position)[0]

    def locate(self, position: int, attempt: int = 0) -> Place:
        """What lies at a position. ``attempt`` n is the n-th replacement: the sample n places on in the epoch."""
        corpus, epoch, index = self.mixture.locate(position)
        order = self._corpora[corpus]
        return Place(corpus, epoch, order.sample((index + attempt) % order.samples, self._epoch_seed(corpus, epoch)))

    def windows_from(self, position: int, corpus: int) -> Iterator[Window]:
        """The window that a corpus' next sample at or after a position is drawn from, and all that follow."""
        order, nth = self._corpora[corpus], self.mixture.samples_before(position, corpus)
        while True:
            epoch, index = divmod(nth, order.samples)
            window = order.window_at(index, self._epoch_seed(corpus, epoch))
            yield window
            nth = epoch * order.samples + window.end

    def _epoch_seed(self, corpus: int, epoch: int) -> int:
        return mix64(self._seed, _ORDER, corpus, epoch)


def temperature_weights(sizes: Sequence[int], temperature: float) -> list[float]:
    """Weights n_i^(1/T) of corpora of n_i samples: T = 1 mixes by size, a large T evenly."""
    return [size ** (1 / temperature) for size in sizes]


class Mixture:
    """Corpora of ``sizes`` samples, mixed by ``weights`` (any positive numbers; 1, 1, 2 means 25, 25, 50 %).

    Weights whose smallest whole-number proportions sum to at most 65536 are met exactly; others to within 1/65536,
    but a corpus of a smaller share than that gets 1/65536, which the largest give.

    Raises:
        DigSegError: no corpus, an empty corpus, or a weight that is not a positive number.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        if not sizes or len(sizes) != len(weights):
            raise DigSegError(f"a mixture needs one weight a corpus and at least one corpus, got {sizes}, {weights}")
        for place, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
            if size < 1:
                raise DigSegError(f"corpus {place} of the mixture has no samples")
            if not (math.isfinite(weight) and weight > 0):
                raise DigSegError(f"weight {place} of the mixture is {weight}; it must be a positive number")
        self.sizes = tuple(sizes)
        self._table = _table(whole_proportions(weights), seed)
        self._per_period = np.bincount(self._table, minlength=len(sizes)).tolist()
        self._rank = _rank_among_equals(self._table)
        self.period = len(self._table)

    def locate(self, position: int) -> tuple[int, int, int]:
        """(corpus, epoch, index within the epoch) of a global position >= 0. Pure, O(1).

        Each corpus passes through its indices 0..size-1 in order, epoch after epoch; what index means which
        sample is the order's business (:mod:`digseg.data.order`).
        """
        period, place = divmod(position, self.period)
        corpus = int(self._table[place])
        nth = period * self._per_period[corpus] + int(self._rank[place])
        epoch, index = divmod(nth, self.sizes[corpus])
        return corpus, epoch, index

    def samples_before(self, position: int, corpus: int) -> int:
        """How many samples of a corpus lie at positions before this one."""
        period, place = divmod(position, self.period)
        return int(period * self._per_period[corpus] + np.count_nonzero(self._table[:place] == corpus))


def whole_proportions(weights: Sequence[float]) -> list[int]:
    """Smallest whole numbers in the proportion of the weights, rounded to sum to 65536 (none to 0) where larger."""
    # The decimal that was written (0.1), not the nearest binary fraction to it.
    fractions = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    counts = [int(fraction * scale) for fraction in fractions]
    divisor = math.gcd(*counts)
    counts = [count // divisor for count in counts]
    total = sum(counts)
    if total <= MAX_PERIOD:
        return counts
    shares = [Fraction(count * MAX_PERIOD, total) for count in counts]
    rounded = [max(1, math.floor(share)) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (rounded[i] - shares[i], i))
    for place in by_remainder[: max(0, MAX_PERIOD - sum(rounded))]:
        rounded[place] += 1
    for _ in range(sum(rounded) - MAX_PERIOD):
        rounded[rounded.index(max(rounded))] -= 1
    return rounded


def _table(counts: Sequence[int], seed: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Corpus of every place of the period: the k-th of n occurrences lies at random in [k/n, (k+1)/n)."""
    rng = np.random.default_rng([seed, 0x6D6978])
    base = sum(counts)
    parts = []
    for _ in range(-(-MIN_PERIOD // base)):
        corpora = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        nth = np.concatenate([np.arange(count) for count in counts])
        places = (nth + rng.random(base)) / np.repeat(np.asarray(counts), counts)
        parts.append(corpora[np.argsort(places, kind="stable")])
    return np.concatenate(parts)


def _rank_among_equals(
    table: np.ndarray[tuple[int], np.dtype[np.int32]],
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """For every place, how many places before it hold the same corpus."""
    rank = np.empty(len(table), dtype=np.int64)
    for corpus in range(int(table.max()) + 1):
        places = np.flatnonzero(table == corpus)
        rank[places] = np.arange(len(places))
    return rank
