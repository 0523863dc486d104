import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from digseg.data.order import mix64, permuted_index


@given(length=st.integers(1, 400), seed=st.integers(0, 2**64 - 1))
def test_order_visits_every_index_exactly_once(length: int, seed: int) -> None:
    assert sorted(permuted_index(i, length, seed) for i in range(length)) == list(range(length))


@given(length=st.integers(2, 10**15), seed=st.integers(0, 2**63), fractions=st.lists(st.floats(0, 0.999), min_size=2))
def test_distinct_indices_of_huge_lengths_stay_distinct_and_inside(
    length: int, seed: int, fractions: list[float]
) -> None:
    indices = {int(fraction * length) for fraction in fractions}
    places = {permuted_index(index, length, seed) for index in indices}
    assert len(places) == len(indices)
    assert all(0 <= place < length for place in places)


def test_seeds_reach_every_permutation_about_equally_often() -> None:
    seeds = 4800
    counts = Counter(tuple(permuted_index(i, 4, seed) for i in range(4)) for seed in range(seeds))
    assert set(counts) == set(itertools.permutations(range(4)))
    # 200 expected of each; five standard deviations of a binomial are 69.
    assert max(abs(count - 200) for count in counts.values()) < 69


def test_neighbouring_epochs_are_unrelated() -> None:
    length = 1000
    orders = [[permuted_index(i, length, mix64(7, epoch)) for i in range(length)] for epoch in range(2)]
    same = sum(a == b for a, b in zip(*orders, strict=True))
    assert same < 10  # 1 expected


@pytest.mark.parametrize("index", [-1, 5])
def test_index_outside_the_length_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match="of 5"):
        permuted_index(index, 5, 0)
