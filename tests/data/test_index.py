import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from digseg.data.format import IndexEntry
from digseg.data.index import ShardIndex

places = st.tuples(st.integers(0, 2**50), st.integers(0, 2**40))
entries = st.lists(
    st.builds(
        IndexEntry,
        key=st.text(max_size=12),
        members=st.dictionaries(st.sampled_from(["image.jpg", "image.png", "mask.png", "json"]), places),
        start=st.integers(0, 2**50),
        end=st.integers(0, 2**50),
        crc32=st.integers(0, 2**32 - 1),
    ),
    max_size=8,
)


@given(entries=entries)
def test_entries_come_back_as_they_were_given(entries: list[IndexEntry]) -> None:
    index = ShardIndex(entries)
    assert len(index) == len(entries)
    assert [index.entry(number) for number in range(len(index))] == entries
    assert [index.key(number) for number in range(len(index))] == [entry.key for entry in entries]


@pytest.mark.parametrize("samples", [100, 10_000])
def test_a_sample_costs_a_hundred_bytes(samples: int) -> None:
    entries = [
        IndexEntry(f"{n:09d}", dict.fromkeys(("image.jpg", "mask.png", "json"), (n, 9)), n, n + 9, n)
        for n in range(samples)
    ]
    tracemalloc.start()
    index = ShardIndex(entries)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert index.nbytes / samples == 85
    assert held < 100 * samples + 6_000
