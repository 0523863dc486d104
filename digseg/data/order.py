"""The order of a corpus' samples within an epoch: a seeded permutation that is computed, never stored.

A balanced Feistel network over the next power of two permutes; an index that falls outside the length walks
on until it falls inside (cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
Any number of workers can ask for any index at any time, and resume needs nothing but the index.
"""

from __future__ import annotations

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 8


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
    keys = [mix64(seed, round_number) for round_number in range(_ROUNDS)]
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


def _feistel(value: int, half: int, keys: list[int]) -> int:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for key in keys:
        state = (right ^ key) + _GOLDEN & _MASK64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
        left, right = right, left ^ (state ^ state >> 31) >> 17 & mask
    return left << half | right
