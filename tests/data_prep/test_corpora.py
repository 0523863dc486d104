"""Each corpus' description against a tiny copy of its layout, with the trap of its label rule in it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from corpus_files import ids, keys, photo, save
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_prep.corpora import BadSample, Corpus, corpus_names, load_corpus
from data_prep.corpora.source import Source, open_source
from data_prep.corpora.spec import CorpusSpec, Tiles
from data_prep.corpora.tiles import tile_boxes


def test_cityscapes_maps_label_ids_and_leaves_the_void_ones_out(tmp_path: Path) -> None:
    name = "bern_000001_000019"
    save(tmp_path / f"leftImg8bit/val/bern/{name}_leftImg8bit.png", photo(2, 4))
    save(tmp_path / f"gtFine/val/bern/{name}_gtFine_labelIds.png", [[7, 8, 26, 33], [0, 1, 6, 23]])
    save(tmp_path / f"gtFine/val/bern/{name}_gtFine_color.png", photo(2, 4))
    corpus = load_corpus("cityscapes", tmp_path)
    assert ids(corpus, "val", name) == [[0, 1, 13, 18], [255, 255, 255, 10]]
    assert len(corpus.vocabulary) == 19
    assert corpus.domain == "natural"


def test_sample_driving_is_cityscapes_with_fewer_classes(tmp_path: Path) -> None:
    name = "lindau_000001_000019"
    save(tmp_path / f"leftImg8bit/train/lindau/{name}_leftImg8bit.png", photo(1, 4))
    save(tmp_path / f"gtFine/train/lindau/{name}_gtFine_labelIds.png", [[7, 26, 19, 4]])
    corpus = load_corpus("sample_driving", tmp_path)
    road, car = corpus.vocabulary.index("road"), corpus.vocabulary.index("car")
    assert ids(corpus, "train", name) == [[road, car, 255, 255]]
    assert "traffic light" not in corpus.vocabulary


def test_dsb2018_unites_the_nuclei_and_reads_rgba(tmp_path: Path) -> None:
    rgba = np.concatenate([photo(2, 3), np.full((2, 3, 1), 255)], axis=2)
    for name in "abcdef":
        save(tmp_path / f"stage1_train/{name}/images/{name}.png", rgba)
        save(tmp_path / f"stage1_train/{name}/masks/m1.png", [[255, 0, 0], [0, 0, 0]])
        save(tmp_path / f"stage1_train/{name}/masks/m2.png", [[0, 0, 0], [0, 255, 255]])
    corpus = load_corpus("dsb2018", tmp_path)
    assert ids(corpus, "train", "b") == [[1, 0, 0], [0, 1, 1]]
    assert keys(corpus, "val") == ["a", "f"]  # every 5th of the sorted ids
    assert keys(corpus, "train") == ["b", "c", "d", "e"]
    content = corpus.read(corpus.list("val")[0])
    assert np.array_equal(content.image, rgba[..., :3])
    assert content.image_bytes is None  # a shard holds RGB, not RGBA


def test_loveda_shifts_ids_by_one_and_ignores_no_data(tmp_path: Path) -> None:
    for area in ("Urban", "Rural"):
        save(tmp_path / f"Train/{area}/images_png/1.png", photo(2, 4))
        save(tmp_path / f"Train/{area}/masks_png/1.png", [[0, 1, 2, 3], [4, 5, 6, 7]])
    corpus = load_corpus("loveda", tmp_path)
    assert keys(corpus, "train") == ["Rural-1", "Urban-1"]
    assert ids(corpus, "train", "Urban-1") == [[255, 0, 1, 2], [3, 4, 5, 6]]
    assert corpus.vocabulary[3] == "water"


def test_phenobench_joins_partial_plants_with_whole_ones(tmp_path: Path) -> None:
    save(tmp_path / "train/images/p.png", photo(1, 5))
    save(tmp_path / "train/semantics/p.png", [[0, 1, 2, 3, 4]])
    corpus = load_corpus("phenobench", tmp_path)
    assert corpus.vocabulary == ("soil", "crop", "weed")
    assert ids(corpus, "train", "p") == [[0, 1, 2, 1, 2]]


def test_camvid_ignores_eleven_and_keeps_zero(tmp_path: Path) -> None:
    save(tmp_path / "CamVid/test/0001TP_1.jpg", photo(1, 4))
    save(tmp_path / "CamVid/testannot/0001TP_1.png", [[0, 6, 10, 11]])
    corpus = load_corpus("camvid", tmp_path)
    assert ids(corpus, "test", "0001TP_1") == [[0, 6, 10, 255]]
    assert corpus.vocabulary[6] == "traffic sign"


def test_isic_reads_white_as_lesion_and_holds_back_every_fifth(tmp_path: Path) -> None:
    for i in range(6):
        save(tmp_path / f"ISIC-2017_Training_Data/ISIC_{i}.jpg", photo(1, 3))
        mask = tmp_path / f"ISIC-2017_Training_Part1_GroundTruth/ISIC_{i}_segmentation.png"
        save(mask, [[0, 255, 255]])
    corpus = load_corpus("isic2017_lesion", tmp_path)
    assert ids(corpus, "train", "ISIC_1") == [[0, 1, 1]]
    assert keys(corpus, "val") == ["ISIC_0", "ISIC_5"]


def test_isbi_em_is_inverted_and_split_by_slice_number(tmp_path: Path) -> None:
    for k in (2, 10, 23, 24, 29):
        save(tmp_path / f"membrane/train/image/{k}.jpg", photo(1, 2)[..., 0])
        save(tmp_path / f"membrane/train/label/{k}.png", [[0, 255]])
    corpus = load_corpus("isbi_em_membrane", tmp_path)
    membrane, interior = corpus.vocabulary.index("cell membrane"), corpus.vocabulary.index("cell interior")
    assert ids(corpus, "train", "2") == [[membrane, interior]]
    assert {ref.key for ref in corpus.list("train")} == {"2", "10", "23"}
    assert {ref.key for ref in corpus.list("val")} == {"24", "29"}


def test_kampala_reads_zero_and_one_of_tiles_in_any_image_format(tmp_path: Path) -> None:
    save(tmp_path / "chips/OAM-1-2-21.tif", photo(1, 2))
    save(tmp_path / "binarymasks/OAM-1-2-21.mask.tif", [[0, 1]])
    save(tmp_path / "val-chips/OAM-3-4-20.jpg", photo(1, 2))
    save(tmp_path / "val-binarymasks/OAM-3-4-20.mask.png", [[1, 0]])
    corpus = load_corpus("fair_kampala_buildings", tmp_path)
    assert ids(corpus, "train", "OAM-1-2-21") == [[0, 1]]
    assert ids(corpus, "val", "OAM-3-4-20") == [[1, 0]]


def test_cwfid_reads_colours_and_counts_a_doubly_listed_image_as_test(tmp_path: Path) -> None:
    for i in (1, 2, 28):
        save(tmp_path / f"images/{i:03d}_image.png", photo(1, 3))
        save(tmp_path / f"annotations/{i:03d}_annotation.png", [[[0, 0, 0], [0, 255, 0], [255, 0, 0]]])
        save(tmp_path / f"masks/{i:03d}_mask.png", [[255, 0, 0]], mode="1")
    (tmp_path / "train_test_split.yaml").write_text("train: [2, 28]\ntest: [1, 28]\n")
    corpus = load_corpus("cwfid", tmp_path)
    assert ids(corpus, "train", "002") == [[0, 1, 2]]
    assert keys(corpus, "train") == ["002"]
    assert keys(corpus, "test") == ["001", "028"]


def write_folder(root: Path, names: list[str], below: str = "") -> None:
    for i, name in enumerate(names):
        save(root / "images" / below / f"{name}.jpg", photo(2, 2, seed=i))
        save(root / "masks" / below / f"{name}.png", [[0, 1], [2, 255]])


def describe(root: Path, **fields: object) -> None:
    document = {"classes": ["soil", "crop", "weed"], "domain": "agriculture", "licence": "CC0-1.0", **fields}
    (root / "classes.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


def test_folder_needs_only_images_masks_and_classes(tmp_path: Path) -> None:
    write_folder(tmp_path, [f"x{i}" for i in range(7)])
    describe(tmp_path)
    corpus = load_corpus("folder", tmp_path)
    assert corpus.vocabulary == ("soil", "crop", "weed")
    assert (corpus.name, corpus.domain, corpus.licence) == ("folder", "agriculture", "CC0-1.0")
    assert ids(corpus, "train", "x1") == [[0, 1], [2, 255]]
    assert keys(corpus, "val") == ["x0", "x5"]


def test_folder_takes_splits_from_sub_folders(tmp_path: Path) -> None:
    write_folder(tmp_path, ["a", "b"], "train")
    write_folder(tmp_path, ["c"], "holdout")
    describe(tmp_path, name="my_fields")
    corpus = load_corpus("folder", tmp_path)
    assert corpus.name == "my_fields"
    assert {split: keys(corpus, split) for split in corpus.splits} == {
        "holdout": ["c"],
        "train": ["a", "b"],
    }


def test_folder_takes_splits_from_a_list_with_old_suffixes(tmp_path: Path) -> None:
    write_folder(tmp_path, ["a", "b", "c.v2", "007"])
    (tmp_path / "splits.yaml").write_text("train: [a.png, images/c.v2.png, 7]\nval: [b]\n")
    describe(tmp_path, splits="splits.yaml")
    corpus = load_corpus("folder", tmp_path)
    assert keys(corpus, "train") == ["007", "a", "c_v2"]
    assert keys(corpus, "val") == ["b"]


def test_folder_maps_given_ids_to_names_and_joins_equal_names(tmp_path: Path) -> None:
    write_folder(tmp_path, ["a", "b"])
    describe(tmp_path, classes={0: "background", 1: "plant", 2: "plant", 255: "sky"}, splits=2)
    corpus = load_corpus("folder", tmp_path)
    assert corpus.vocabulary == ("background", "plant", "sky")
    assert ids(corpus, "train", "b") == [[0, 1], [1, 2]]


def test_folder_reads_colours_where_classes_are_given_colours(tmp_path: Path) -> None:
    write_folder(tmp_path, ["a", "b"])
    save(tmp_path / "masks/b.png", [[[0, 0, 0], [255, 0, 0]], [[0, 128, 0], [255, 255, 255]]])
    describe(tmp_path, classes={"road": [255, 0, 0], "tree": [0, 128, 0], "soil": [0, 0, 0]}, ignore=[[255, 255, 255]])
    corpus = load_corpus("folder", tmp_path)
    assert corpus.vocabulary == ("road", "tree", "soil")
    assert ids(corpus, "train", "b") == [[2, 0], [1, 255]]
    with pytest.raises(BadSample, match=r"mask a\.png is of mode L, a colour mask is RGB"):
        corpus.read(corpus.list("val")[0])


def test_folder_reads_indices_of_a_palette_mask(tmp_path: Path) -> None:
    write_folder(tmp_path, ["a", "b"])
    save(tmp_path / "masks/b.png", [[0, 1], [2, 255]], mode="P")
    describe(tmp_path)
    assert ids(load_corpus("folder", tmp_path), "train", "b") == [[0, 1], [2, 255]]


def test_exif_orientation_turns_the_image_and_the_mask_only_where_told(tmp_path: Path) -> None:
    stored, labels = np.zeros((16, 24, 3), np.uint8), [[0] * 12 + [1] * 12] * 16
    stored[:, 12:] = 250
    save(tmp_path / "images/a.jpg", stored, orientation=3)
    save(tmp_path / "images/b.jpg", stored, orientation=6)
    save(tmp_path / "masks/a.png", labels)
    save(tmp_path / "masks/b.png", np.rot90(labels, k=-1))
    describe(tmp_path, splits=2)
    turned = load_corpus("folder", tmp_path)
    content = turned.read(turned.list("val")[0])
    assert content.image[8, 2].mean() > 200  # upside down: the bright half is on the left
    assert content.mask.tolist() == labels  # drawn on the picture as people see it
    assert content.image_bytes is None
    quarter = turned.read(turned.list("train")[0])
    assert quarter.image.shape == (24, 16, 3)
    assert (quarter.image[..., 0] > 125).tolist() == (quarter.mask == 1).tolist()

    document = own_description(label={"reader": "grey", "values": {0: "soil", 1: "crop"}})
    document |= {"exif": {"image": "apply", "mask": "as_image"}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(document))
    corpus = load_corpus(str(tmp_path / "own.yaml"), tmp_path)
    both = corpus.read(corpus.list("val")[0])
    assert both.mask.tolist() == np.rot90(labels, k=2).tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(tmp_path: Path, orientation: int) -> None:
    path = save(tmp_path / "images/a.png", photo(4, 6), orientation=orientation)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    save(tmp_path / "masks/a.png", np.zeros(upright.shape[:2]))
    describe(tmp_path, splits=2)
    corpus = load_corpus("folder", tmp_path)
    np.testing.assert_array_equal(corpus.read(corpus.list("val")[0]).image, upright)


def own_description(**changes: object) -> dict[str, object]:
    label: dict[str, object] = {"ignore": [], "other_values": "bad_sample", "dropped_classes": "error"}
    document: dict[str, object] = {
        "title": "own",
        "domain": "agriculture",
        "licence": "CC0-1.0",
        "vocabulary": ["soil", "crop"],
        "may_contain": [],
        "key": "{name}",
        "layout": {"all": {"images": "images/{name}.*", "masks": "masks/{name}.*"}},
        "splits": {"by": "every_nth", "n": 2, "nth": "val", "others": "train"},
        "channel_order": "rgb",
        "exif": {"image": "ignore", "mask": "ignore"},
        **changes,
    }
    if isinstance(document["label"], dict) and document["label"]["reader"] in ("grey", "palette", "index"):
        document["label"] = label | document["label"]
    return document


def own_corpus(root: Path, **changes: object) -> Corpus:
    path = root / "own.yaml"
    path.write_text(yaml.safe_dump(own_description(**changes)))
    return load_corpus(str(path), root)


def test_own_description_by_path_reads_jpeg_masks_by_threshold(tmp_path: Path) -> None:
    mask = np.zeros((16, 16))
    mask[:, 8:] = 255
    save(tmp_path / "images/a.png", photo(16, 16))
    save(tmp_path / "masks/a.jpg", mask)
    assert len(np.unique(np.asarray(Image.open(tmp_path / "masks/a.jpg")))) >= 2
    label = {"reader": "binary", "threshold": 128, "at_or_above": "crop", "below": "soil", "levels": "any"}
    corpus = own_corpus(tmp_path, label=label)
    assert corpus.name == "own"
    assert np.array_equal(corpus.read(corpus.list("val")[0]).mask, mask // 255)


def test_palette_reader_takes_indices_where_the_colours_say_otherwise(tmp_path: Path) -> None:
    save(tmp_path / "images/a.png", photo(1, 3))
    save(tmp_path / "masks/a.png", [[0, 1, 255]], mode="P")
    label = {"reader": "palette", "values": {0: "soil", 1: "crop"}, "ignore": [255]}
    corpus = own_corpus(tmp_path, label=label)
    assert corpus.read(corpus.list("val")[0]).mask.tolist() == [[0, 1, 255]]


def test_lossy_colours_are_binarised_and_black_is_ignored(tmp_path: Path) -> None:
    save(tmp_path / "images/a.png", photo(1, 3))
    save(tmp_path / "masks/a.png", [[[3, 250, 9], [240, 255, 4], [12, 0, 30]]])
    colours = {"soil": [255, 255, 0], "crop": [0, 255, 0]}
    label = {"reader": "colour", "colours": colours, "ignore": [[0, 0, 0]], "other_colours": "bad_sample"}
    corpus = own_corpus(tmp_path, label=label | {"binarise_at": 128, "dropped_classes": "error"})
    assert corpus.read(corpus.list("val")[0]).mask.tolist() == [[1, 0, 255]]


def test_sixteen_bit_ids_and_images_are_read(tmp_path: Path) -> None:
    save(tmp_path / "images/a.png", np.array([[0, 65535, 257 * 100]], np.uint16))
    save(tmp_path / "masks/a.png", np.array([[0, 1000, 1000]], np.uint16))
    corpus = own_corpus(tmp_path, label={"reader": "grey", "values": {0: "soil", 1000: "crop"}})
    content = corpus.read(corpus.list("val")[0])
    assert content.mask.tolist() == [[0, 1, 1]]
    assert content.image[0, :, 0].tolist() == [0, 255, 100]
    assert content.image_bytes is None


def test_original_bytes_are_kept_where_any_reader_decodes_them_alike(tmp_path: Path) -> None:
    path = save(tmp_path / "images/a.jpg", photo(1, 3))
    save(tmp_path / "masks/a.png", [[0, 1, 1]])
    corpus = own_corpus(tmp_path, label={"reader": "grey", "values": {0: "soil", 1: "crop"}})
    content = corpus.read(corpus.list("val")[0])
    assert (content.image_bytes, content.image_ext) == (path.read_bytes(), "jpg")


def test_suffix_of_kept_bytes_is_that_of_their_format_whatever_the_file_is_called(tmp_path: Path) -> None:
    path = save(tmp_path / "images/a.png", photo(1, 3)).rename(tmp_path / "images/a.jpg")
    save(tmp_path / "masks/a.png", [[0, 1, 1]])
    corpus = own_corpus(tmp_path, label={"reader": "grey", "values": {0: "soil", 1: "crop"}})
    content = corpus.read(corpus.list("val")[0])
    assert (content.image_bytes, content.image_ext) == (path.read_bytes(), "png")


@given(width=st.integers(1, 2000), height=st.integers(1, 2000), size=st.integers(64, 1000))
def test_even_tiles_hold_every_pixel_once_and_are_nearly_equal(width: int, height: int, size: int) -> None:
    boxes = tile_boxes(width, height, Tiles(size=size, grid="even"))
    covered = np.zeros((height, width), np.uint8)
    for left, upper, right, lower in filter(None, boxes):
        covered[upper:lower, left:right] += 1
    assert (covered == 1).all()
    sizes = [(right - left, lower - upper) for left, upper, right, lower in filter(None, boxes)]
    assert len(boxes) == len(sizes) == math.ceil(width / size) * math.ceil(height / size)
    for lengths in zip(*sizes, strict=True):
        assert max(lengths) - min(lengths) <= 1


def test_whole_tiles_keep_their_number_in_the_grid() -> None:
    boxes = tile_boxes(200, 130, Tiles(size=64, grid="whole"))
    assert [number for number, box in enumerate(boxes) if box is not None] == [0, 1, 2, 4, 5, 6]
    assert boxes[5] == (64, 64, 128, 128)


def test_neighbouring_tiles_are_cut_from_one_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        save(tmp_path / f"images/{name}.png", photo(100, 150, seed=ord(name)))
        save(tmp_path / f"masks/{name}.png", np.arange(15000).reshape(100, 150) // 100 % 2)
    label = {"reader": "grey", "values": {0: "soil", 1: "crop"}}
    splits = {"by": "every_nth", "n": 2, "nth": "val", "others": "train", "field": "name"}
    corpus = own_corpus(tmp_path, label=label, splits=splits, tiles={"size": 64, "grid": "even"}, key="{name}_{tile}")
    refs = [*corpus.list("val"), *corpus.list("train")]
    alone = [corpus.read(ref) for ref in refs]
    decoded = []

    def open_and_count(image: Path, masks: tuple[Path, ...], spec: CorpusSpec) -> Source:
        decoded.append(image.name)
        return open_source(image, masks, spec)

    monkeypatch.setattr("data_prep.corpora.corpus.open_source", open_and_count)
    for (ref, content), expected, listed in zip(corpus.read_all(refs), alone, refs, strict=True):
        assert ref == listed
        assert not isinstance(content, BadSample)
        assert np.array_equal(content.mask, expected.mask)
        assert np.array_equal(content.image, expected.image)
    assert len(refs) == 12
    assert len(decoded) == 2


def test_grey_masks_stored_with_three_channels_are_read(tmp_path: Path) -> None:
    save(tmp_path / "images/a.png", photo(1, 2))
    save(tmp_path / "masks/a.png", [[[1, 1, 1], [0, 0, 0]]])
    corpus = own_corpus(tmp_path, label={"reader": "grey", "values": {0: "soil", 1: "crop"}})
    assert ids(corpus, "val", "a") == [[1, 0]]


def test_a_list_of_values_makes_the_splits(tmp_path: Path) -> None:
    for name in ("a1", "a2", "b1", "c1"):
        save(tmp_path / f"images/{name}.png", photo(1, 2))
        save(tmp_path / f"masks/{name}.png", [[0, 1]])
    layout = {"all": {"images": "images/{site:[a-z]}{n}.*", "masks": "masks/{site:[a-z]}{n}.*"}}
    splits = {"by": "value", "field": "site", "splits": {"train": ["a"], "val": ["b"]}}
    label = {"reader": "grey", "values": {0: "soil", 1: "crop"}}
    corpus = own_corpus(tmp_path, label=label, layout=layout, splits=splits, key="{site}{n}")
    assert (keys(corpus, "train"), keys(corpus, "val")) == (["a1", "a2"], ["b1"])  # c is in neither


def test_a_description_without_a_vocabulary_takes_the_names_of_its_label(tmp_path: Path) -> None:
    document = own_description(label={"reader": "grey", "values": {7: "crop", 2: "soil", 9: "crop"}})
    del document["vocabulary"]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    assert load_corpus(str(tmp_path / "own.yaml"), tmp_path).vocabulary == ("crop", "soil")


def test_bgr_images_come_out_as_rgb(tmp_path: Path) -> None:
    pixels = photo(1, 3)
    save(tmp_path / "images/a.png", pixels)
    save(tmp_path / "masks/a.png", [[0, 1, 1]])
    label = {"reader": "grey", "values": {0: "soil", 1: "crop"}}
    corpus = own_corpus(tmp_path, label=label, channel_order="bgr")
    content = corpus.read(corpus.list("val")[0])
    assert np.array_equal(content.image, pixels[..., ::-1])
    assert content.image_bytes is None


@pytest.mark.parametrize("name", [n for n in corpus_names() if n not in ("folder", "sample_town")])
def test_every_description_is_valid(name: str, tmp_path: Path) -> None:
    corpus = load_corpus(name, tmp_path)
    assert corpus.name == name
    assert len(corpus.splits) >= 2
    assert corpus.licence


def test_the_documentation_lists_every_public_corpus(repository: Path) -> None:
    table = (repository / "docs/data.md").read_text()
    public = [name for name in corpus_names() if not name.startswith("sample_") and name != "loveda_mini"]
    assert [name for name in public if f"`{name}`" not in table and name != "folder"] == []
