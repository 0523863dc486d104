from collections import Counter
from itertools import chain, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from digseg.data.mixture import MAX_PERIOD, GlobalOrder, Mixture, temperature_weights, whole_proportions
from digseg.data.order import WindowedOrder
from digseg.errors import DigSegError

corpora = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 9)), min_size=1, max_size=6)


@given(corpora=corpora, seed=st.integers(0, 2**32), period=st.integers(0, 10**9))
def test_every_period_holds_the_exact_proportions(corpora: list[tuple[int, int]], seed: int, period: int) -> None:
    sizes, weights = zip(*corpora, strict=True)
    mixture = Mixture(sizes, weights, seed)
    first = period * mixture.period
    counts = Counter(mixture.locate(position)[0] for position in range(first, first + mixture.period))
    assert all(counts[i] * sum(weights) == weights[i] * mixture.period for i in range(len(weights)))


@given(corpora=corpora, seed=st.integers(0, 2**32))
def test_each_corpus_goes_through_its_samples_epoch_after_epoch(corpora: list[tuple[int, int]], seed: int) -> None:
    sizes, weights = zip(*corpora, strict=True)
    mixture = Mixture(sizes, weights, seed)
    seen: dict[int, list[tuple[int, int]]] = {}
    for position in range(2 * mixture.period):
        corpus, epoch, index = mixture.locate(position)
        seen.setdefault(corpus, []).append((epoch, index))
    for corpus, places in seen.items():
        assert places == [divmod(nth, sizes[corpus]) for nth in range(len(places))]


@given(seed=st.integers(0, 2**32), start=st.integers(0, 10**6))
def test_any_window_is_close_to_the_proportions(seed: int, start: int) -> None:
    mixture = Mixture([10, 10, 10], [1, 2, 3], seed)
    counts = Counter(mixture.locate(position)[0] for position in range(start, start + 60))
    for corpus, expected in enumerate((10, 20, 30)):
        assert abs(counts[corpus] - expected) <= 2


def test_decimal_weights_are_met_as_they_are_written() -> None:
    assert whole_proportions([0.1, 0.2, 0.7]) == [1, 2, 7]
    assert whole_proportions([1, 1, 0.3]) == [10, 10, 3]


def test_weights_without_small_proportions_are_rounded_and_none_vanishes() -> None:
    counts = whole_proportions([1.0, 1e-9, 0.333333333333])
    assert counts[1] == 1
    assert counts[0] / sum(counts) == pytest.approx(0.75, abs=1e-4)
    assert sum(counts) == MAX_PERIOD


@given(
    tiny=st.lists(st.sampled_from([1e-9, 3e-7, 1.3e-5, 1.5e-5]), min_size=1, max_size=150),
    others=st.lists(st.floats(0.5, 1.5), min_size=1, max_size=4),
)
def test_surplus_of_raised_weights_is_taken_from_the_largest(tiny: list[float], others: list[float]) -> None:
    weights = [*others, *tiny]
    counts = whole_proportions(weights)
    shares = [weight / sum(weights) * MAX_PERIOD for weight in weights]
    assert sum(counts) == MAX_PERIOD
    assert min(counts) >= 1
    for count, share in zip(counts, shares, strict=True):
        assert count <= share + 1 + 1e-6
        assert count >= share - 1 - 1e-6 or count >= max(counts) - 1


def test_seed_changes_the_table_and_nothing_else_does() -> None:
    def table(seed: int) -> list[int]:
        mixture = Mixture([5, 5], [1, 1], seed)
        return [mixture.locate(position)[0] for position in range(256)]

    assert table(1) == table(1)
    assert table(1) != table(2)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weight_that_is_not_positive_is_refused(weight: float) -> None:
    with pytest.raises(DigSegError, match="must be a positive number"):
        Mixture([3, 3], [1.0, weight], 0)


def test_empty_corpus_is_refused() -> None:
    with pytest.raises(DigSegError, match="corpus 1 of the mixture has no samples"):
        Mixture([3, 0], [1.0, 1.0], 0)


@settings(max_examples=30)
@given(corpora=corpora, seed=st.integers(0, 2**32), block=st.integers(1, 9), window=st.integers(1, 3))
def test_every_epoch_of_every_corpus_holds_each_sample_once(
    corpora: list[tuple[int, int]], seed: int, block: int, window: int
) -> None:
    sizes, weights = zip(*corpora, strict=True)
    order = GlobalOrder([WindowedOrder(size, block, window) for size in sizes], weights, seed)
    seen: dict[tuple[int, int], list[int]] = {}
    for position in range(2 * order.mixture.period):
        place = order.locate(position)
        assert place.corpus == order.corpus_at(position)
        seen.setdefault((place.corpus, place.epoch), []).append(place.sample)
    for (corpus, epoch), samples in seen.items():
        assert len(set(samples)) == len(samples)
        if (corpus, epoch + 1) in seen:
            assert sorted(samples) == list(range(sizes[corpus]))


def test_replacements_are_the_next_samples_of_the_epoch() -> None:
    order = GlobalOrder([WindowedOrder(20, 5, 2)], [1.0], seed=4)
    epoch = [order.locate(position).sample for position in range(20)]
    assert [order.locate(17, attempt).sample for attempt in range(5)] == [*epoch[17:], *epoch[:2]]
    assert {order.locate(17, attempt).epoch for attempt in range(5)} == {0}


def test_windows_follow_one_another_from_the_next_sample_of_a_corpus_on() -> None:
    order = GlobalOrder([WindowedOrder(20, 5, 2), WindowedOrder(7, 3, 1)], [1.0, 2.0], seed=4)
    for corpus in range(2):
        places = [order.locate(position) for position in range(300)]
        for position in range(0, 200, 7):
            before = order.mixture.samples_before(position, corpus)
            assert before == sum(place.corpus == corpus for place in places[:position])
            coming = iter([place.sample for place in places[position:] if place.corpus == corpus])
            now, following = islice(order.windows_from(position, corpus), 2)
            left = now.end - before % order.mixture.sizes[corpus]
            assert set(islice(coming, left)) <= set(chain(*now.blocks))
            assert set(islice(coming, following.end - following.begin)) == set(chain(*following.blocks))


@pytest.mark.parametrize(("temperature", "expected"), [(1, [100, 400, 2500]), (2, [10, 20, 50]), (1e9, [1, 1, 1])])
def test_temperature_goes_from_sizes_to_even_weights(temperature: float, expected: list[float]) -> None:
    assert temperature_weights([100, 400, 2500], temperature) == pytest.approx(expected)


def test_temperature_decides_the_exact_proportions() -> None:
    sizes = [100, 400, 2500]
    mixture = Mixture(sizes, temperature_weights(sizes, 2), 0)
    counts = Counter(mixture.locate(position)[0] for position in range(mixture.period))
    assert [counts[i] * 8 for i in range(3)] == [mixture.period, 2 * mixture.period, 5 * mixture.period]
