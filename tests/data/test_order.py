import itertools
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from digseg.data.order import WindowedOrder, _feistel, mix64, permuted_index


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


orders = st.builds(WindowedOrder, samples=st.integers(1, 300), block=st.integers(1, 40), window=st.integers(1, 6))


@given(order=orders, seed=st.integers(0, 2**64 - 1))
def test_windowed_epoch_holds_every_sample_exactly_once(order: WindowedOrder, seed: int) -> None:
    assert sorted(order.sample(i, seed) for i in range(order.samples)) == list(range(order.samples))


@given(order=orders, seed=st.integers(0, 2**64 - 1))
def test_window_is_made_of_few_blocks_and_names_them(order: WindowedOrder, seed: int) -> None:
    index = 0
    while index < order.samples:
        window = order.window_at(index, seed)
        assert window.begin == index
        samples = [order.sample(i, seed) for i in range(window.begin, window.end)]
        assert sorted(samples) == sorted(itertools.chain(*window.blocks))
        assert len({sample // order.block for sample in samples}) <= order.window
        index = window.end


def test_windows_of_two_epochs_join_other_blocks() -> None:
    order = WindowedOrder(samples=1000, block=10, window=5)
    joined = [{frozenset(order.window_at(i, epoch).blocks) for i in range(0, 1000, 50)} for epoch in range(2)]
    assert len(joined[0]) == len(joined[1]) == 20
    assert len(joined[0] & joined[1]) <= 1


def test_samples_that_share_a_shard_are_spread_over_the_window() -> None:
    order = WindowedOrder(samples=1000, block=100, window=5)
    blocks = [order.sample(i, 3) // 100 for i in range(500)]
    assert sum(a == b for a, b in itertools.pairwise(blocks)) < 150  # 100 expected, 499 without a shuffle


def test_a_billion_samples_cost_as_little_as_a_thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    permutations = []

    def counted(value: int, half: int, keys: tuple[int, ...]) -> int:
        permutations.append(value)
        return _feistel(value, half, keys)

    monkeypatch.setattr("digseg.data.order._feistel", counted)

    def work(samples: int) -> int:
        """Permutations that 200 samples and the 16 blocks of their windows take."""
        order = WindowedOrder(samples, block=50, window=16)
        permutations.clear()
        for index in range(samples // 3, samples // 3 + 200):
            order.sample(index, 1)
        return len(permutations)

    # A walk of the cycle has under 4 steps in the mean; these samples lie in two windows at most.
    assert [work(samples) < 4 * (200 + 2 * 16) for samples in (10**3, 10**6, 10**9)] == [True] * 3
    tracemalloc.start()
    work(10**9)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


@given(indices=st.sets(st.integers(0, 10**9 - 1), min_size=2, max_size=20), seed=st.integers(0, 2**63))
def test_distinct_places_of_a_billion_samples_hold_distinct_samples(indices: set[int], seed: int) -> None:
    order = WindowedOrder(10**9, block=512, window=16)
    samples = {order.sample(index, seed) for index in indices}
    assert len(samples) == len(indices)
    assert all(0 <= sample < 10**9 for sample in samples)


@pytest.mark.parametrize("index", [-1, 30])
def test_place_outside_the_epoch_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match="of 30"):
        WindowedOrder(30, 10, 2).sample(index, 0)
