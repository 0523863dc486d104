"""The seven real samples: splits against their pair lists, pixels and class counts against a reading written here."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.corpora import load_corpus

pytestmark = pytest.mark.real_data


def of_ids(path: Path, names: dict[int, str]) -> Counter[str]:
    values, counts = np.unique(np.asarray(Image.open(path)), return_counts=True)
    return Counter({names[int(v)]: int(c) for v, c in zip(values, counts, strict=True)})


def of_nuclei(folder: Path) -> Counter[str]:
    masks = [np.asarray(Image.open(path)) for path in folder.glob("*.png")]
    nuclei = int((np.stack(masks).max(axis=0) > 0).sum())
    return Counter({"cell nucleus": nuclei, "background": masks[0].size - nuclei})


def of_colours(path: Path) -> Counter[str]:
    names = {(0, 0, 0): "soil", (0, 255, 0): "crop", (255, 0, 0): "weed"}
    colours = Image.open(path).convert("RGB").getcolors()
    assert colours is not None
    return Counter({names[colour]: count for count, colour in colours})  # type: ignore[index]


CAMVID = ["sky", "building", "pole", "road", "pavement", "tree", "traffic sign", "fence", "car", "pedestrian"]
CAMVID_IDS = dict(enumerate([*CAMVID, "bicyclist", "ignore"]))
LOVEDA = ["ignore", "background", "building", "road", "water", "barren", "forest", "agricultural"]
COUNTS: dict[str, Callable[[Path], Counter[str]]] = {
    "camvid": lambda path: of_ids(path, CAMVID_IDS),
    "dsb2018": of_nuclei,
    "isic2017_lesion": lambda path: of_ids(path, {0: "background", 255: "skin lesion"}),
    "isbi_em_membrane": lambda path: of_ids(path, {0: "cell membrane", 255: "cell interior"}),
    "fair_kampala_buildings": lambda path: of_ids(path, {0: "background", 1: "building"}),
    "loveda_mini": lambda path: of_ids(path, dict(enumerate(LOVEDA))),
    "cwfid": of_colours,
}


@pytest.mark.parametrize("name", COUNTS)
def test_splits_and_class_pixels_match_an_independent_reading(real_corpora: Path, name: str) -> None:
    root = real_corpora / name
    with (root / "pairs.csv").open(newline="") as file:
        pairs = {(row["split"], row["image"]): row["mask"] for row in csv.DictReader(file)}
    corpus = load_corpus(name, root)
    refs = [(split, ref) for split in corpus.splits for ref in corpus.list(split)]
    found = {(split, ref.image.relative_to(root).as_posix()): ref for split, ref in refs}
    assert set(found) == set(pairs)
    assert len({(split, ref.key) for split, ref in refs}) == len(pairs)

    names = {**dict(enumerate(corpus.vocabulary)), 255: "ignore"}
    for where, ref in found.items():
        content = corpus.read(ref)
        counted = np.bincount(content.mask.ravel(), minlength=256)
        expected = +COUNTS[name](root / pairs[where])
        assert {names[i]: int(counted[i]) for i in np.flatnonzero(counted)} == dict(expected), ref.key
        assert np.array_equal(content.image, np.asarray(Image.open(root / where[1]).convert("RGB"))), ref.key


def test_isic_2017_finds_the_same_training_images_in_its_official_folders(real_corpora: Path) -> None:
    official, alone = (load_corpus(name, real_corpora / "isic2017_lesion") for name in ("isic2017", "isic2017_lesion"))
    both = [ref.image for split in alone.splits for ref in alone.list(split)]
    assert [ref.image for ref in official.list("train")] == sorted(both)
