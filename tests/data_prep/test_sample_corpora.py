"""The drawn corpora: same bytes for a seed, read by the real adapters, worth learning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from corpus_files import digests
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_prep.corpora import load_corpus
from data_prep.sample_corpora import draw_sample_corpora
from data_prep.scenes.paint import overlap
from digseg.errors import DigSegError

IMAGES, SIZE = 15, 96
DOMAINS = ["driving", "microscopy", "landcover", "fields", "town"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("drawn") / "corpora"
    draw_sample_corpora(out, IMAGES, seed=3, size=SIZE, workers=1)
    return out


def test_number_of_workers_does_not_change_a_byte(drawn: Path, tmp_path: Path) -> None:
    draw_sample_corpora(tmp_path / "again", IMAGES, seed=3, size=SIZE, workers=2)
    assert digests(tmp_path / "again") == digests(drawn)


def test_another_seed_draws_other_pictures(drawn: Path, tmp_path: Path) -> None:
    draw_sample_corpora(tmp_path / "other", 10, seed=4, size=SIZE, workers=1)
    first, other = digests(drawn / "landcover"), digests(tmp_path / "other" / "landcover")
    assert not set(first.values()) & set(other.values())


@pytest.mark.parametrize("domain", DOMAINS)
def test_adapters_read_every_sample(drawn: Path, domain: str) -> None:
    corpus = load_corpus(f"sample_{domain}", drawn / domain)
    counts = {split: len(corpus.list(split)) for split in corpus.splits}
    assert counts == ({"val": 4} if domain == "town" else {"train": 12, "val": 3})
    seen: set[int] = set()
    for split in corpus.splits:
        for ref in corpus.list(split):
            content = corpus.read(ref)
            assert content.image.shape[0] == SIZE
            seen |= set(np.unique(content.mask).tolist())
    assert seen - {255} == set(range(len(corpus.vocabulary)))


def test_layouts_carry_the_traps_of_the_real_corpora(drawn: Path) -> None:
    driving = {int(v) for p in (drawn / "driving").rglob("*_labelIds.png") for v in np.unique(Image.open(p))}
    assert {7, 8, 11, 17, 20, 21, 23, 24, 26} < driving  # and void ids beside them
    fields = {int(v) for p in (drawn / "fields").rglob("semantics/*.png") for v in np.unique(Image.open(p))}
    assert fields == {0, 1, 2, 3, 4}
    cover = {int(v) for p in (drawn / "landcover").rglob("masks_png/*.png") for v in np.unique(Image.open(p))}
    assert {0, 1, 2, 3, 4, 5, 6, 7} == cover
    images = list((drawn / "microscopy").glob("stage1_train/*/images/*.png"))
    assert len(images) == IMAGES
    assert {np.asarray(Image.open(path)).shape for path in images} == {(SIZE, SIZE, 4)}
    masks = [np.asarray(Image.open(path)) for path in images[0].parents[1].glob("masks/*.png")]
    assert np.sum([mask > 0 for mask in masks], axis=0).max() == 1  # nuclei do not overlap


def test_held_out_town_names_no_class_of_the_other_corpora(drawn: Path) -> None:
    trained = {name for d in DOMAINS[:4] for name in load_corpus(f"sample_{d}", drawn / d).vocabulary}
    town = load_corpus("sample_town", drawn / "town")
    assert not trained & set(town.vocabulary)
    assert town.splits == ("val",)


@pytest.mark.parametrize("domain", ["driving", "landcover", "fields"])
def test_colour_alone_does_not_tell_the_classes(drawn: Path, domain: str) -> None:
    """The best guess by mean colour of a class leaves many pixels wrong."""
    corpus = load_corpus(f"sample_{domain}", drawn / domain)
    contents = [corpus.read(ref) for ref in corpus.list("train")]
    pixels = np.concatenate([c.image.reshape(-1, 3) for c in contents]).astype(np.float64)
    labels = np.concatenate([c.mask.ravel() for c in contents])
    pixels, labels = pixels[labels != 255][::11], labels[labels != 255][::11]
    means = np.stack([pixels[labels == k].mean(axis=0) for k in range(len(corpus.vocabulary))])
    guess = np.argmin(((pixels[:, None] - means[None]) ** 2).sum(axis=2), axis=1)
    recall = [float((guess[labels == k] == k).mean()) for k in range(len(corpus.vocabulary))]
    assert np.mean(recall) < 0.65


def test_drawing_again_with_the_same_arguments_does_nothing(drawn: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in drawn.rglob("*")}
    draw_sample_corpora(drawn, IMAGES, seed=3, size=SIZE)
    assert {path: path.stat().st_mtime_ns for path in drawn.rglob("*")} == before


def test_corpora_drawn_otherwise_are_not_overwritten(drawn: Path) -> None:
    with pytest.raises(DigSegError, match="drawn otherwise"):
        draw_sample_corpora(drawn, IMAGES, seed=5, size=SIZE)


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DigSegError, match="holds no sample corpora"):
        draw_sample_corpora(tmp_path, IMAGES, seed=0, size=SIZE)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_draw_that_dies_leaves_nothing_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(folder: Path) -> None:
        raise OSError("no space left")

    out = tmp_path / "corpora"
    monkeypatch.setattr("data_prep.sample_corpora._describe_town", full_disk)
    with pytest.raises(OSError, match="no space left"):
        draw_sample_corpora(out, 10, seed=0, size=64, workers=1)
    assert not out.exists()
    monkeypatch.undo()
    draw_sample_corpora(out, 10, seed=0, size=64, workers=1)
    assert (out / "town" / "classes.yaml").is_file()


@pytest.mark.parametrize(
    ("images", "seed", "size", "message"),
    [(3, 0, 192, "--images is 3"), (240, 0, 8, "--size is 8"), (240, -1, 192, "--seed is -1")],
)
def test_arguments_out_of_range_are_refused(tmp_path: Path, images: int, seed: int, size: int, message: str) -> None:
    with pytest.raises(DigSegError, match=message):
        draw_sample_corpora(tmp_path / "out", images, seed, size)


@given(top=st.integers(-9, 9), left=st.integers(-9, 9), height=st.integers(1, 6), width=st.integers(1, 6))
def test_a_patch_covers_the_pixels_it_has_in_common_with_the_picture(
    top: int, left: int, height: int, width: int
) -> None:
    patch = np.arange(1, height * width + 1).reshape(height, width)
    picture, expected = np.zeros((5, 7), int), np.zeros((5, 7), int)
    for (row, column), value in np.ndenumerate(patch):
        if 0 <= top + row < 5 and 0 <= left + column < 7:
            expected[top + row, left + column] = value
    here, part = overlap(top, left, patch.shape, picture.shape)
    picture[here] = patch[part]
    assert np.array_equal(picture, expected)
