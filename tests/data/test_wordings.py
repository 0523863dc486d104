"""Synonyms and templates of training queries."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mixtures import ALL, CELLS, STREET, TILES, manifest
from pydantic import ValidationError

from digseg.config import QueriesConfig
from digseg.config.schema import DataConfig
from digseg.data.format import Manifest
from digseg.data.queries import Query, class_frequencies, draw_query, query_vocabulary
from digseg.data.wordings import check_synonyms, name_table
from digseg.errors import DigSegError

SYNONYMS = {
    "street": {"road": ["street", "lane"], "car": ["automobile", "vehicle"]},
    "cells": {"nucleus": ["cell nucleus"]},
    "tiles": {"water": ["lake"], "building": ["structure"]},
}
TEMPLATES = ["a photo of a {}", "{} seen from above"]
PLAIN = QueriesConfig(sub_vocabulary_p=0.5, foreign_p=1.0)
WORDED = QueriesConfig(sub_vocabulary_p=0.5, foreign_p=1.0, synonyms=SYNONYMS, templates=TEMPLATES)
NAMES = name_table(ALL, SYNONYMS)
TEXTS = [template.replace("{}", name) for template in ("{}", *TEMPLATES) for name in NAMES]
OWNER = {word: name for classes in SYNONYMS.values() for name, words in classes.items() for word in words}


def drawn(source: Manifest, seed: int, settings: QueriesConfig) -> Query:
    vocabulary = query_vocabulary(source, ALL, NAMES, settings.synonyms)
    return draw_query(vocabulary, class_frequencies(source), settings, np.random.default_rng(seed))


def texts(query: Query) -> list[str]:
    return [TEXTS[number] for number in query.text_ids]


def bare(text: str) -> str:
    return text.removeprefix("a photo of a ").removesuffix(" seen from above")


def test_the_table_begins_with_the_class_names_and_has_no_word_twice() -> None:
    assert NAMES[: len(name_table(ALL, {}))] == name_table(ALL, {})
    assert NAMES[len(name_table(ALL, {})) :] == (
        "automobile",
        "cell nucleus",
        "lake",
        "lane",
        "street",
        "structure",
        "vehicle",
    )


@given(source=st.sampled_from(ALL), seed=st.integers(0, 2**32))
def test_a_query_differs_from_the_plain_one_in_its_words_alone(source: Manifest, seed: int) -> None:
    plain, worded = drawn(source, seed, PLAIN), drawn(source, seed, WORDED)
    named = [OWNER.get(bare(text), bare(text)) for text in texts(worded)]
    assert named == [NAMES[number] for number in plain.text_ids]
    assert np.array_equal(worded.colour_ids, plain.colour_ids)
    assert np.array_equal(worded.label_map, plain.label_map)
    assert np.array_equal(worded.frequencies, plain.frequencies)


@given(source=st.sampled_from(ALL), seed=st.integers(0, 2**32))
def test_no_two_slots_are_called_the_same_and_all_are_in_one_template(source: Manifest, seed: int) -> None:
    said = texts(drawn(source, seed, WORDED))
    assert len({bare(text) for text in said}) == len(said)
    assert len({text.replace(bare(text), "{}") for text in said}) == 1


@given(source=st.sampled_from(ALL), seed=st.integers(0, 2**32))
def test_without_probabilities_nothing_is_reworded(source: Manifest, seed: int) -> None:
    settings = WORDED.model_copy(update={"synonym_p": 0.0, "template_p": 0.0})
    said = texts(drawn(source, seed, settings))
    assert {bare(text) for text in said} <= set(name_table(ALL, {}))
    assert said == [bare(text) for text in said]


def test_every_wording_comes_as_often_as_the_config_says() -> None:
    whole = WORDED.model_copy(update={"sub_vocabulary_p": 0.0})
    said = [texts(drawn(STREET, seed, whole)) for seed in range(1500)]
    words = Counter(bare(text) for query in said for text in query)
    for name, share in {"road": 1 / 2, "street": 1 / 4, "lane": 1 / 4, "car": 1 / 2, "vehicle": 1 / 4}.items():
        assert words[name] / 1500 == pytest.approx(share, abs=0.06)  # five standard deviations
    assert words["sky"] == words["person"] == 1500
    templates = Counter(query[0].replace(bare(query[0]), "{}") for query in said)
    assert templates["{}"] / 1500 == pytest.approx(1 / 2, abs=0.06)
    assert templates["{} seen from above"] / 1500 == pytest.approx(1 / 4, abs=0.06)


def test_foreign_classes_go_by_their_synonyms_too_but_never_by_what_may_be_visible() -> None:
    house = manifest("house", "indoor", ("wall", "window"), may_contain=("structure",))
    lawn = manifest("lawn", "garden", ("pond", "leaf"))
    mixture = [STREET, CELLS, TILES, house, lawn]
    synonyms = {**SYNONYMS, "street": {**SYNONYMS["street"], "sky": ["field"]}, "lawn": {"pond": ["lake"]}}
    settings = WORDED.model_copy(update={"synonyms": synonyms, "synonym_p": 1.0, "templates": [], "max_foreign": 9})
    names = name_table(mixture, synonyms)
    vocabulary = query_vocabulary(house, mixture, names, synonyms)
    foreign: set[str] = set()
    for seed in range(200):
        query = draw_query(vocabulary, class_frequencies(house), settings, np.random.default_rng(seed))
        foreign.update(names[number] for number in query.text_ids[query.frequencies < 0])
    assert foreign >= {"automobile", "vehicle", "street", "lane", "cell nucleus", "person"}
    # "structure" may be visible; "lake" is two things, and "field" a class of its own.
    assert foreign >= {"building", "water", "pond", "sky", "field"}
    assert not foreign & {"structure", "lake", "car", "road", "nucleus"}


def test_a_synonym_of_an_own_class_is_not_asked_for_as_a_foreign_one() -> None:
    for synonyms, expected in (
        ({}, {"field", "water"}),
        ({"street": {"road": ["field"]}}, {"water"}),
        ({"street": {"road": ["Field"]}}, {"water"}),  # of the same embedding
    ):
        names = name_table([STREET, TILES], synonyms)
        vocabulary = query_vocabulary(STREET, [STREET, TILES], names, synonyms)
        assert {names[number] for number in vocabulary.foreign_name_ids} == expected


@pytest.mark.parametrize(
    ("synonyms", "said"),
    [
        ({"street": {"raod": ["street"]}}, "street: there is no class 'raod'; did you mean 'road'?"),
        ({"street": {"road": ["Car"]}}, "'Car', a wording of 'road', is itself a class"),
        ({"street": {"road": ["road"]}}, "'road', a wording of 'road', is itself a class"),
        ({"street": {"road": ["background"]}}, "'background', a wording of 'road', is itself a class"),
    ],
)
def test_wrong_synonyms_are_refused(synonyms: dict[str, dict[str, list[str]]], said: str) -> None:
    check_synonyms(SYNONYMS, ALL)
    with pytest.raises(DigSegError, match=said.replace("?", r"\?")):
        check_synonyms(synonyms, ALL)


@pytest.mark.parametrize(
    ("queries", "said"),
    [
        ({"synonyms": {"stret": {"road": ["street"]}}}, "'stret' is not among the corpora; did you mean 'street'"),
        (
            {"synonyms": {"street": {"road": ["lane"], "car": ["Lane"]}}},
            "'Lane' is given for 'road' and again for 'car'",
        ),
        ({"synonyms": {"street": {"road": ["lane", "lane"]}}}, "'lane' is given for 'road' and again for 'road'"),
        ({"synonyms": {"street": {"road": [" "]}}}, "street: 'road' has an empty wording"),
        ({"synonyms": {"street": {"road": []}}}, "at least 1 item"),
        ({"templates": ["a photo"]}, "'a photo' needs one {} where the class name goes"),
        ({"templates": ["{} and {}"]}, "'{} and {}' needs one {} where the class name goes"),
    ],
)
def test_wordings_that_cannot_be_told_apart_are_refused(queries: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError) as error:
        DataConfig.model_validate({"corpora": [{"name": "street"}], "queries": queries})
    assert said in str(error.value)
