import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mixtures import ALL, CELLS, STREET, TILES, WIDE

from digseg.config import QueriesConfig
from digseg.data.format import Manifest
from digseg.data.queries import (
    Query,
    QueryVocabulary,
    class_frequencies,
    class_weights,
    draw_query,
    query_vocabulary,
)
from digseg.data.wordings import name_table

NAMES = name_table(ALL, {})


def drawn(source: Manifest, seed: int, **settings: float) -> tuple[QueryVocabulary, Query]:
    vocabulary = query_vocabulary(source, ALL, NAMES, {})
    query = draw_query(
        vocabulary,
        class_frequencies(source),
        QueriesConfig.model_validate(settings),
        np.random.default_rng(seed),
    )
    return vocabulary, query


def query_names(query: Query) -> list[str]:
    return [NAMES[name_id] for name_id in query.text_ids]


def test_name_table_holds_all_names_and_background_sorted() -> None:
    assert name_table([STREET], {}) == ("background", "car", "person", "road", "sky")


@given(source=st.sampled_from(ALL), seed=st.integers(0, 2**32), sub_vocabulary=st.sampled_from([0.0, 0.5, 1.0]))
def test_slots_have_distinct_names_and_distinct_colours(source: Manifest, seed: int, sub_vocabulary: float) -> None:
    _, query = drawn(source, seed, sub_vocabulary_p=sub_vocabulary)
    assert 1 <= len(query.text_ids) <= 64
    assert len(set(query.text_ids.tolist())) == len(query.text_ids)
    assert len(set(query.colour_ids.tolist())) == len(query.colour_ids) == len(query.text_ids)
    assert query.colour_ids.min() >= 0
    assert query.colour_ids.max() < 64


@given(source=st.sampled_from(ALL), seed=st.integers(0, 2**32))
def test_pixels_go_to_their_own_name_or_to_background(source: Manifest, seed: int) -> None:
    _, query = drawn(source, seed, sub_vocabulary_p=0.5)
    names = query_names(query)
    for class_id, name in enumerate(source.vocabulary):
        slot = query.label_map[class_id]
        assert names[slot] == (name if name in names else "background")
    assert query.label_map[source.ignore_id] == 255
    assert set(query.label_map[len(source.vocabulary) :].tolist()) == {255}


@given(source=st.sampled_from(ALL), seed=st.integers(0, 2**32))
def test_foreign_names_are_never_visible_ones_and_get_no_pixel(source: Manifest, seed: int) -> None:
    _, query = drawn(source, seed, sub_vocabulary_p=1.0, foreign_p=1.0)
    own = {*source.vocabulary, "background"}
    foreign = set(query_names(query)) - own
    assert not foreign & set(source.may_contain)
    same_domain = [other for other in ALL if other.domain == source.domain]
    assert not foreign & set(itertools.chain(*(other.vocabulary for other in same_domain)))
    for slot, name in enumerate(query_names(query)):
        assert (query.frequencies[slot] == -1) == (name in foreign)
        if name in foreign:
            assert slot not in query.label_map


@given(seed=st.integers(0, 2**32))
def test_full_query_asks_for_the_whole_vocabulary_whatever_the_mask_shows(seed: int) -> None:
    _, query = drawn(STREET, seed, sub_vocabulary_p=0.0)
    assert sorted(query_names(query)) == sorted(STREET.vocabulary)
    _, query = drawn(TILES, seed, sub_vocabulary_p=0.0)
    assert sorted(query_names(query)) == sorted(TILES.vocabulary)


@given(seed=st.integers(0, 2**32))
def test_sub_vocabulary_is_a_strict_part_with_background(seed: int) -> None:
    _, query = drawn(STREET, seed, sub_vocabulary_p=1.0, foreign_p=0.0)
    kept = set(query_names(query)) - {"background"}
    assert 1 <= len(kept) < len(STREET.vocabulary)
    assert kept < set(STREET.vocabulary)
    assert "background" in query_names(query)


def test_one_foreground_corpus_keeps_its_class_in_four_of_five_sub_vocabularies_and_always_gets_foreign_names() -> None:
    kept = 0
    for seed in range(1000):
        _, query = drawn(CELLS, seed, sub_vocabulary_p=1.0, foreign_p=0.0)
        names = set(query_names(query))
        assert "background" in names
        assert 1 <= len(names - {"background", "nucleus"}) <= 3
        kept += "nucleus" in names
    assert 750 < kept < 850


def test_share_of_sub_vocabularies_is_what_the_config_says() -> None:
    partial = sum("background" in query_names(drawn(STREET, seed)[1]) for seed in range(2000))
    assert 430 < partial < 570  # 500 expected, sd 19


def test_slots_and_colours_are_redrawn_for_every_sample() -> None:
    queries = [drawn(STREET, seed, sub_vocabulary_p=0.0)[1] for seed in range(200)]
    for name_id in queries[0].text_ids:
        slots = {query.text_ids.tolist().index(name_id) for query in queries}
        colours = {int(query.colour_ids[query.text_ids.tolist().index(name_id)]) for query in queries}
        assert slots == set(range(4))
        assert len(colours) > 50


def test_colours_that_are_not_random_are_those_of_prediction() -> None:
    for source in (STREET, TILES):
        for seed in range(100):
            vocabulary, query = drawn(source, seed, random_colours=False, sub_vocabulary_p=0.5)
            in_order = [NAMES[query.text_ids[slot]] for slot in query.colour_ids.argsort()]
            own = [name for name in in_order if name in source.vocabulary]
            assert own == sorted(own, key=source.vocabulary.index)
            assert sorted(query.colour_ids) == list(range(len(in_order)))
            foreign = [name for name in in_order if name not in (*source.vocabulary, "background")]
            assert foreign == in_order[len(in_order) - len(foreign) :]
            if vocabulary.background_class is None and "background" in in_order:
                assert in_order[0] == "background"


def test_colours_that_are_not_random_change_nothing_else() -> None:
    for seed in range(50):
        random, fixed = (drawn(TILES, seed, random_colours=one)[1] for one in (True, False))
        np.testing.assert_array_equal(random.text_ids, fixed.text_ids)
        np.testing.assert_array_equal(random.label_map, fixed.label_map)


@given(seed=st.integers(0, 2**32))
def test_vocabulary_above_the_limit_is_cut_by_chance_and_the_rest_is_background(seed: int) -> None:
    _, query = drawn(WIDE, seed, max_classes=16, sub_vocabulary_p=0.5)
    names = query_names(query)
    assert len(names) <= 16
    assert "background" in names
    assert len(query.label_map) == 65536
    assert query.label_map[65535] == 255
    background = names.index("background")
    assert (query.label_map[:300] == background).sum() >= 300 - 15


@given(source=st.sampled_from(ALL), seed=st.integers(0, 2**32))
def test_frequencies_of_the_slots_add_up_to_the_corpus(source: Manifest, seed: int) -> None:
    _, query = drawn(source, seed, sub_vocabulary_p=0.5)
    own = query.frequencies[query.frequencies >= 0]
    assert own.sum() == pytest.approx(1.0)
    for slot, name in enumerate(query_names(query)):
        if name in source.vocabulary and name != "background":
            expected = class_frequencies(source)[source.vocabulary.index(name)]
            assert query.frequencies[slot] == pytest.approx(expected)


def test_corpus_alone_has_no_foreign_names_and_still_a_class_to_find() -> None:
    vocabulary = query_vocabulary(CELLS, [CELLS], name_table([CELLS], {}), {})
    settings = QueriesConfig(sub_vocabulary_p=1.0)
    for seed in range(50):
        query = draw_query(vocabulary, np.array([0.8, 0.2]), settings, np.random.default_rng(seed))
        assert len(query.text_ids) == 2


def test_class_weights_by_hand() -> None:
    # shares 0.64 and 0.36: roots 0.8 and 0.6, their sum 1.4
    weights = class_weights(np.array([0.64, 0.36, -1.0]), exponent=0.5, maximum=5.0)
    np.testing.assert_allclose(weights, [1 / 0.8 / 1.4, 1 / 0.6 / 1.4, 1.0], rtol=1e-6)
    np.testing.assert_allclose(class_weights(np.array([0.9999, 0.0001]), 0.5, 5.0)[1], 5.0)
    np.testing.assert_allclose(class_weights(np.array([0.9, 0.1]), 0.0, 5.0), [1.0, 1.0])


def test_class_that_never_occurs_gets_a_finite_weight() -> None:
    assert np.isfinite(class_weights(np.array([1.0, 0.0]), 0.5, 5.0)).all()
    assert np.isfinite(class_weights(np.array([0.0, 0.0]), 0.5, 5.0)).all()
