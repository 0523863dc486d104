"""Bad samples keep their own reason; bad jobs stop with one message."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from corpus_files import photo, save, spoil_exif, truncate
from PIL import Image
from scipy.io import savemat

from data_prep.corpora import BadSample, Corpus, SampleRef, load_corpus
from data_prep.corpora.spec import ExifRule
from digseg.errors import DigSegError

LABELS = np.array([[0, 1, 2, 2]] * 16).repeat(8, axis=1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder corpus of two intact samples in the split `train`."""
    for name in ("a", "b"):
        save(tmp_path / f"images/train/{name}.png", photo(16, 32))
        save(tmp_path / f"masks/train/{name}.png", LABELS)
    describe(tmp_path)
    return tmp_path


def describe(root: Path, **fields: object) -> None:
    document = {"classes": ["soil", "crop", "weed"], "domain": "agriculture", "licence": "CC0-1.0", **fields}
    (root / "classes.yaml").write_text(yaml.safe_dump(document))


def listed(root: Path, key: str) -> tuple[Corpus, SampleRef]:
    corpus = load_corpus("folder", root)
    return corpus, next(ref for ref in corpus.list("train") if ref.key == key)


def reason(root: Path, key: str) -> str:
    corpus, ref = listed(root, key)
    with pytest.raises(BadSample) as caught:
        corpus.read(ref)
    return str(caught.value)


def test_image_without_mask_is_listed_with_the_problem(root: Path) -> None:
    (root / "masks/train/b.png").unlink()
    _, ref = listed(root, "b")
    assert ref.problem == "no mask masks/train/b.*"
    assert reason(root, "b") == ref.problem


def test_mask_without_image_is_listed_with_the_problem(root: Path) -> None:
    (root / "images/train/b.png").unlink()
    _, ref = listed(root, "b")
    assert ref.problem == "no image images/train/b.*"


def test_two_images_of_one_name_are_a_problem(root: Path) -> None:
    save(root / "images/train/b.jpg", photo(16, 32))
    _, ref = listed(root, "b")
    assert ref.problem == "several images: images/train/b.jpg, images/train/b.png"


def test_mask_of_another_size(root: Path) -> None:
    save(root / "masks/train/b.png", LABELS[:, :20])
    assert reason(root, "b") == "mask b.png is 20 x 16 pixels, the image 32 x 16"


def test_class_id_outside_the_vocabulary(root: Path) -> None:
    wrong = LABELS.copy()
    wrong[3, 4], wrong[5, 6] = 9, 17
    save(root / "masks/train/b.png", wrong)
    assert reason(root, "b") == (
        "mask b.png has class id 9, 17, outside the vocabulary (first at row 3, column 4, 2 in all): "
        "give it a class or list it under `ignore`"
    )


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_image(root: Path, suffix: str) -> None:
    (root / "images/train/b.png").unlink()
    truncate(save(root / f"images/train/b.{suffix}", photo(16, 32)))
    assert reason(root, "b").startswith(f"image b.{suffix} is damaged or truncated")


def test_truncated_mask(root: Path) -> None:
    truncate(save(root / "masks/train/b.png", photo(64, 64)[..., 0]))
    assert reason(root, "b").startswith("mask b.png is damaged or truncated")


def test_file_that_is_no_image(root: Path) -> None:
    (root / "images/train/b.png").write_text("not an image")
    assert reason(root, "b") == "image b.png is no image file that can be identified"


def test_image_beyond_the_decoder_s_limit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    assert reason(root, "b").startswith("image b.png is too large to decode: Image size (512 pixels) exceeds limit")


@pytest.mark.parametrize("block", [b"not a TIFF", b"II*\0", b"II*\0\x08\0\0"])
def test_damaged_exif_matters_only_where_it_is_applied(root: Path, block: bytes) -> None:
    (root / "images/train/b.png").unlink()
    path = spoil_exif(save(root / "images/train/b.jpg", photo(16, 32)), block)
    assert reason(root, "b") == (
        "image b.jpg has damaged EXIF data: mend or remove them, or set `exif` to ignore for the corpus"
    )
    corpus, ref = listed(root, "b")
    ignoring = corpus.spec.model_copy(update={"exif": ExifRule(image="ignore", mask="ignore")})
    content = replace(corpus, spec=ignoring).read(ref)
    assert content.image_bytes is None  # a reader that turns images may stumble over it
    np.testing.assert_array_equal(content.image, np.asarray(Image.open(path)))


def test_damaged_exif_of_a_mask(root: Path) -> None:
    (root / "masks/train/b.png").unlink()
    spoil_exif(save(root / "masks/train/b.jpg", LABELS), b"not a TIFF")
    assert reason(root, "b").startswith("mask b.jpg has damaged EXIF data")


def test_empty_file(root: Path) -> None:
    (root / "masks/train/b.png").write_bytes(b"")
    assert reason(root, "b") == "mask b.png is no image file that can be identified"


def test_colour_mask_where_ids_are_read(root: Path) -> None:
    save(root / "masks/train/b.png", photo(16, 32))
    assert reason(root, "b").startswith("mask b.png is of mode RGB, the label rule reads 1, L")
    assert reason(root, "b").endswith("; where masks hold colours, give each class its colour")


def test_sample_of_a_list_that_no_file_matches_is_a_problem(root: Path) -> None:
    for folder in ("images", "masks"):
        for path in (root / folder / "train").iterdir():
            path.rename(root / folder / path.name)
        (root / folder / "train").rmdir()
    (root / "splits.yaml").write_text("train: [a, ghost]\nval: [b]\n")
    describe(root, splits="splits.yaml")
    _, ref = listed(root, "ghost")
    assert ref.problem == "no image images/ghost.*; no mask masks/ghost.*"


def test_unknown_value_in_a_binary_mask(tmp_path: Path) -> None:
    for k in (1, 2):
        save(tmp_path / f"membrane/train/image/{k}.png", photo(1, 2))
        save(tmp_path / f"membrane/train/label/{k}.png", [[0, 255 if k == 1 else 90]])
    corpus = load_corpus("isbi_em_membrane", tmp_path)
    intact, wrong = corpus.list("train")
    assert corpus.read(intact).mask.shape == (1, 2)
    with pytest.raises(BadSample, match=r"value 90, outside \[0, 255\] \(first at row 0, column 1, 1 in all\)"):
        corpus.read(wrong)


def test_unknown_colour(tmp_path: Path) -> None:
    save(tmp_path / "images/001_image.png", photo(1, 2))
    save(tmp_path / "annotations/001_annotation.png", [[[0, 255, 0], [1, 2, 3]]])
    (tmp_path / "train_test_split.yaml").write_text("train: [1]\ntest: []\n")
    corpus = load_corpus("cwfid", tmp_path)
    with pytest.raises(BadSample) as caught:
        corpus.read(corpus.list("train")[0])
    assert str(caught.value) == (
        "mask 001_annotation.png has the colour (1, 2, 3), outside the vocabulary (first at row 0, "
        "column 1, 1 in all): give it a class, list it under `ignore`, or set `other_colours: ignore`"
    )


def test_colour_mask_where_two_levels_are_read(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / f"Kvasir-SEG/images/{name}.jpg", photo(16, 16))
        save(tmp_path / f"Kvasir-SEG/masks/{name}.jpg", np.full((16, 16, 3), (255, 0, 0)))
    corpus = load_corpus("kvasir_seg", tmp_path)
    with pytest.raises(BadSample, match=r"mask b\.jpg is of mode RGB, the label rule reads 1, L"):
        corpus.read(corpus.list("train")[0])


@pytest.mark.parametrize(
    ("contents", "problem"),
    [
        (None, "is no MATLAB file that can be read"),
        ({"T": np.zeros((1, 1))}, "has no variable 'S', but T"),
        ({"S": np.zeros((1, 1, 3))}, "the variable 'S' is no matrix of ids 0..65535"),
        ({"S": np.array([[0.5]])}, "the variable 'S' is no matrix of ids 0..65535"),
        ({"S": np.array([[np.nan]])}, "the variable 'S' is no matrix of ids 0..65535"),
        ({"S": np.array([[-1]])}, "the variable 'S' is no matrix of ids 0..65535"),
        ({"S": np.array(["sky"])}, "the variable 'S' is no matrix of ids 0..65535"),
        ({"S": np.zeros((2, 1))}, "is 1 x 2 pixels, the image 1 x 1"),
    ],
)
def test_unreadable_matrix(tmp_path: Path, contents: dict[str, np.ndarray] | None, problem: str) -> None:
    save(tmp_path / "images/x.jpg", photo(1, 1))
    for folder in ("annotations", "imageLists"):
        (tmp_path / folder).mkdir()
    (tmp_path / "imageLists/train.txt").write_text("x")
    (tmp_path / "imageLists/test.txt").write_text("")
    if contents is None:
        (tmp_path / "annotations/x.mat").write_bytes(b"not a matrix" * 20)
    else:
        savemat(tmp_path / "annotations/x.mat", contents)
    corpus = load_corpus("coco_stuff10k_matlab", tmp_path)
    with pytest.raises(BadSample, match=re.escape(problem)) as caught:
        corpus.read(corpus.list("train")[0])
    assert "mask x.mat" in str(caught.value)


def test_large_image_that_cannot_be_opened_is_reported_once(tmp_path: Path) -> None:
    save(tmp_path / "train/images/P1.png", photo(2, 2)).write_bytes(b"nothing")
    save(tmp_path / "train/Semantic_masks/P1_instance_color_RGB.png", np.zeros((2, 2, 3)))
    save(tmp_path / "train/images/P2.png", photo(70, 1000))
    corpus = load_corpus("isaid", tmp_path)
    broken, *without_mask = corpus.list("train")
    with pytest.raises(BadSample, match=r"image P1\.png is no image file"):
        corpus.read(broken)
    assert {ref.problem for ref in without_mask} == {"no mask train/Semantic_masks/P2_instance_color_RGB.png"}


def test_one_nucleus_of_another_size_is_named(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / f"stage1_train/{name}/images/{name}.png", photo(4, 4))
        save(tmp_path / f"stage1_train/{name}/masks/good.png", np.zeros((4, 4)))
    save(tmp_path / "stage1_train/b/masks/wrong.png", np.zeros((4, 3)))
    corpus = load_corpus("dsb2018", tmp_path)
    with pytest.raises(BadSample, match=r"mask wrong\.png is 3 x 4 pixels, the image 4 x 4"):
        corpus.read(corpus.list("train")[0])


def test_missing_root_stops(tmp_path: Path) -> None:
    with pytest.raises(DigSegError, match=r"corpus camvid: the folder .*nowhere does not exist"):
        load_corpus("camvid", tmp_path / "nowhere")


def test_unknown_corpus_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DigSegError, match="unknown corpus 'camvit'; did you mean 'camvid'"):
        load_corpus("camvit", tmp_path)


def test_empty_split_says_what_was_looked_for(tmp_path: Path) -> None:
    save(tmp_path / "CamVid/train/x.png", photo())
    corpus = load_corpus("camvid", tmp_path)
    with pytest.raises(DigSegError, match=r"split 'val' is empty, no sample .*/CamVid/val does not exist"):
        corpus.list("val")
    (tmp_path / "CamVid/val").mkdir()
    with pytest.raises(DigSegError, match=r"no sample matches CamVid/val/\{frame\}\.\* below \S+$"):
        corpus.list("val")


def test_unknown_split_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DigSegError, match="corpus camvid has no split 'trian'; did you mean 'train'"):
        load_corpus("camvid", tmp_path).list("trian")


def test_missing_split_list_stops(tmp_path: Path) -> None:
    save(tmp_path / "images/001_image.png", photo())
    with pytest.raises(DigSegError, match=r"train_test_split.yaml: cannot read the list"):
        load_corpus("cwfid", tmp_path).list("train")


def test_folder_without_classes_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(DigSegError, match=r"classes.yaml is missing: .*`classes`, `domain` and `licence`"):
        load_corpus("folder", tmp_path)


def test_keys_that_become_equal_are_refused(root: Path) -> None:
    for name in ("x.1", "x_1"):
        save(root / f"images/train/{name}.png", photo(16, 32))
        save(root / f"masks/train/{name}.png", LABELS)
    with pytest.raises(DigSegError, match="two samples share the key 'x_1'"):
        load_corpus("folder", root).list("train")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"domain": "farming"}, "field domain: Input should be 'natural', 'medical'"),
        ({"clases": ["soil"]}, "field clases: unknown; did you mean 'classes'"),
        ({"classes": []}, "field classes"),
        ({"classes": {"soil": 0}}, "field classes"),
    ],
)
def test_errors_in_classes_name_file_and_field(root: Path, fields: dict[str, object], message: str) -> None:
    describe(root, **fields)
    with pytest.raises(DigSegError, match=message) as caught:
        load_corpus("folder", root)
    assert str(root / "classes.yaml") in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("vocabulary: [soil, crop, wheat]\n", "label names the class 'weed', which the vocabulary lacks"),
        ("vocabulary: [soil, crop, weed, stone]\n", r"no pixel value for \['stone'\]"),
        ("vocabulary: [soil, crop, weed, crop]\n", "vocabulary names crop twice"),
        ("label: {ignore: [0]}\n", r"label.ignore lists \[0\], which label.values maps"),
        ("label: {values: {0: soil, 1: 7}}\n", "field label.grey.values.1: Input should be a valid string"),
        ("splits: {by: number, field: k, bound: 3, below: a, rest: b}\n", "need a layout with one entry"),
        ("key: '{city}'\n", r"use \['city'\], which layout.train.images does not name"),
        ("layout: {val: {masks: 'val/{other}.png'}}\n", r"images name the fields \['name'\], masks \['other'\]"),
        ("chanel_order: rgb\n", "field chanel_order: unknown; did you mean 'channel_order'"),
        ("tiles: {size: 512, grid: even}\n", "key must name {tile}"),
        (
            "tiles: {size: 512, grid: even}\nkey: '{name}-{tile}'\n"
            "layout: {val: {images: 'val/{name}-{tile}.png', masks: 'val/{name}-{tile}m.png'}}\n",
            "layout.val names {tile}, which is the number",
        ),
        ("key: '{name}-{tile}'\n", r"use \['tile'\], which layout.train.images does not name"),
        (
            "tiles: {size: 512, grid: even}\nkey: '{name}-{tile}'\nexif: {image: apply}\n",
            "tiles are cut from the pixels as stored",
        ),
        ("layout: {val: {images: 'val/{name:[}.png'}}\n", r"images: \{name:\[\} holds no regular expression"),
        ("extends: nothing.yaml\n", "field extends: .*nothing.yaml does not exist"),
        ("label: [\n", "not valid YAML"),
    ],
)
def test_errors_in_a_description_name_file_and_field(
    tmp_path: Path, repository: Path, change: str, message: str
) -> None:
    base = (repository / "configs/corpora/phenobench.yaml").as_posix()
    path = tmp_path / "mine.yaml"
    path.write_text(("" if "extends" in change else f"extends: {base}\n") + change)
    with pytest.raises(DigSegError, match=message) as caught:
        load_corpus(str(path), tmp_path)
    assert str(path) in str(caught.value)


def test_tiles_of_one_image_in_both_splits_are_refused(tmp_path: Path, repository: Path) -> None:
    base = (repository / "configs/corpora/deepglobe_land.yaml").as_posix()
    (tmp_path / "cut.yaml").write_text(f"extends: {base}\ntiles: {{size: 512, grid: even}}\nkey: '{{id}}_{{tile}}'\n")
    with pytest.raises(DigSegError, match=r"splits\.field must name what the tiles of an image share"):
        load_corpus(str(tmp_path / "cut.yaml"), tmp_path)


def test_description_that_extends_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(DigSegError, match="extends this file again"):
        load_corpus(str(tmp_path / "a.yaml"), tmp_path)
