"""Display colours: stable by name, distinct within a vocabulary."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import skimage.color

from digseg.evaluation.colours import IGNORE_COLOURS, class_colours, colour_distance, paint

STREET = [
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign symbol",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
]
LAND = ["background", "building", "road", "water", "barren", "forest", "agricultural"]


@pytest.mark.parametrize("vocabulary", [STREET, LAND, [f"kind {number}" for number in range(19)]])
def test_no_two_classes_of_a_vocabulary_look_alike(vocabulary: list[str]) -> None:
    colours = class_colours(vocabulary)
    assert min(colour_distance(first, second) for first, second in combinations(colours, 2)) > 20


def test_large_vocabularies_still_have_a_colour_for_each_class() -> None:
    assert len(set(class_colours([f"kind {number}" for number in range(150)]))) == 150


def test_a_name_keeps_its_colour_in_every_order_and_spelling_of_case() -> None:
    forward = dict(zip(STREET, class_colours(STREET), strict=True))
    backward = dict(zip(STREET[::-1], class_colours(STREET[::-1]), strict=True))
    assert forward == backward
    assert class_colours(["Road"]) == class_colours(["road"]) == [forward["road"]]
    land = dict(zip(LAND, class_colours(LAND), strict=True))
    assert land["road"] == forward["road"]
    assert land["building"] == forward["building"]


def test_distance_is_that_of_scikit_image() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        first, second = (tuple(int(c) for c in random.integers(0, 256, 3)) for _ in range(2))
        labs = [skimage.color.rgb2lab(np.array(colour, np.uint8)[None, None]) for colour in (first, second)]
        assert colour_distance(first, second) == pytest.approx(np.linalg.norm(labs[0] - labs[1]), abs=0.05)


def test_a_painted_mask_has_class_colours_and_hatched_ignored_pixels() -> None:
    mask = np.zeros((20, 30), np.uint8)
    mask[:, 10:20] = 1
    mask[:, 20:] = 255
    painted = paint(mask, ["sky", "road"])
    sky, road = class_colours(["sky", "road"])
    assert (painted[:, :10] == sky).all()
    assert (painted[:, 10:20] == road).all()
    ignored = {tuple(colour) for colour in painted[:, 20:].reshape(-1, 3).tolist()}
    assert ignored == set(IGNORE_COLOURS)


def test_another_wording_of_a_class_has_its_colour_but_never_beside_it() -> None:
    assert class_colours(["automobile"]) == class_colours(["car"])
    car, automobile = class_colours(["car", "automobile"])
    assert [car] == class_colours(["car"])
    assert colour_distance(car, automobile) > 20
