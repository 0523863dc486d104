"""Public benchmarks: each description against a tiny copy of the corpus' true layout, with its trap in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from corpus_files import ids, keys, photo, save
from PIL import Image
from scipy.io import savemat

from data_prep.corpora import BadSample, load_corpus
from digseg.errors import DigSegError

BLACK, WHITE, RED, GREEN, BLUE = (0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)
CYAN, YELLOW, MAGENTA = (0, 255, 255), (255, 255, 0), (255, 0, 255)


def test_ade20k_counts_from_one_and_ignores_zero(tmp_path: Path) -> None:
    root = tmp_path / "ADEChallengeData2016"
    save(root / "images/validation/ADE_val_00000001.jpg", photo(2, 2)[..., 0])  # some of its photographs are grey
    save(root / "annotations/validation/ADE_val_00000001.png", [[0, 1], [2, 150]])
    corpus = load_corpus("ade20k", tmp_path)
    assert ids(corpus, "val", "ADE_val_00000001") == [[255, 0], [1, 149]]
    assert (corpus.vocabulary[0], corpus.vocabulary[7], corpus.vocabulary[149]) == ("wall", "bed", "flag")
    assert len(corpus.vocabulary) == 150
    assert corpus.read(corpus.list("val")[0]).image.shape == (2, 2, 3)


def test_coco_stuff_164k_closes_the_gaps_and_keeps_zero(tmp_path: Path) -> None:
    save(tmp_path / "images/val2017/000000000139.jpg", photo(1, 5))
    save(tmp_path / "annotations/val2017/000000000139.png", [[0, 10, 12, 181, 255]])
    save(tmp_path / "annotations/val2017/000000000139_labelTrainIds.png", [[0, 10, 11, 170, 255]])
    save(tmp_path / "images/val2017/000000000285.jpg", photo(1, 1))
    save(tmp_path / "annotations/val2017/000000000285.png", [[11]])
    corpus = load_corpus("coco_stuff164k", tmp_path)
    assert keys(corpus, "val") == ["000000000139", "000000000285"]
    assert ids(corpus, "val", "000000000139") == [[0, 10, 11, 170, 255]]
    assert [corpus.vocabulary[i] for i in (0, 10, 11, 170)] == ["person", "fire hydrant", "stop sign", "wood"]
    assert {"brick wall", "other wall", "door", "other structure"} < set(corpus.vocabulary)
    assert len(corpus.vocabulary) == 171
    with pytest.raises(BadSample, match="class id 11, outside the vocabulary"):
        ids(corpus, "val", "000000000285")


def test_coco_stuff_10k_counts_from_one_and_ignores_zero(tmp_path: Path) -> None:
    save(tmp_path / "images/test2014/COCO_train2014_000000000077.jpg", photo(1, 3))
    save(tmp_path / "annotations/test2014/COCO_train2014_000000000077_labelTrainIds.png", [[0, 1, 171]])
    corpus = load_corpus("coco_stuff10k", tmp_path)
    assert ids(corpus, "test", "COCO_train2014_000000000077") == [[255, 0, 170]]
    assert corpus.vocabulary == load_corpus("coco_stuff164k", tmp_path).vocabulary


def test_coco_stuff_10k_as_distributed_reads_matrices_and_lists(tmp_path: Path) -> None:
    for name, labels in (
        ("COCO_train2014_000000000077", [[0, 1, 13, 182]]),
        ("COCO_train2014_000000000149", [[1] * 4]),
    ):
        save(tmp_path / f"images/{name}.jpg", photo(1, 4))
        (tmp_path / "annotations").mkdir(exist_ok=True)
        savemat(tmp_path / f"annotations/{name}.mat", {"S": np.array(labels, np.uint16), "names": ["unlabeled"]})
    (tmp_path / "imageLists").mkdir()
    (tmp_path / "imageLists/train.txt").write_text("COCO_train2014_000000000149\n")
    (tmp_path / "imageLists/test.txt").write_text("COCO_train2014_000000000077\n")
    corpus = load_corpus("coco_stuff10k_matlab", tmp_path)
    assert keys(corpus, "train") == ["COCO_train2014_000000000149"]
    assert ids(corpus, "test", "COCO_train2014_000000000077") == [[255, 0, 11, 170]]


def test_voc_reads_the_indices_of_a_palette_and_keeps_background(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit/VOC2012"
    for name in ("2007_000032", "2007_000033", "2007_000039"):
        save(root / f"JPEGImages/{name}.jpg", photo(1, 4))
    for name in ("2007_000032", "2007_000033"):
        save(root / f"SegmentationClass/{name}.png", [[0, 15, 20, 255]], mode="P")
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000032\n")
    (lists / "val.txt").write_text("2007_000033\n")
    (lists / "test.txt").write_text("2007_000039\n")
    corpus = load_corpus("voc2012", tmp_path)
    assert corpus.splits == ("train", "val")
    assert keys(corpus, "train") == ["2007_000032"]  # most images of the folder have no mask
    assert ids(corpus, "val", "2007_000033") == [[0, 15, 20, 255]]
    assert (corpus.vocabulary[0], corpus.vocabulary[15]) == ("background", "person")


def test_pascal_context_has_background_as_a_class_or_to_ignore(tmp_path: Path) -> None:
    root = tmp_path / "VOC2010"
    save(root / "JPEGImages/2008_000002.jpg", photo(1, 3))
    save(root / "SegmentationClassContext/2008_000002.png", [[0, 1, 59]])
    (root / "ImageSets/SegmentationContext").mkdir(parents=True)
    (root / "ImageSets/SegmentationContext/train.txt").write_text("2008_000002\n")
    (root / "ImageSets/SegmentationContext/val.txt").write_text("")
    with_background, without = (load_corpus(f"pascal_context{n}", tmp_path) for n in (60, 59))
    assert ids(with_background, "train", "2008_000002") == [[0, 1, 59]]
    assert ids(without, "train", "2008_000002") == [[255, 0, 58]]
    assert with_background.vocabulary == ("background", *without.vocabulary)
    assert (len(without.vocabulary), without.vocabulary[0], without.vocabulary[58]) == (59, "aeroplane", "wood")


def test_pascal_context_as_distributed_ignores_the_rarer_of_459_classes(tmp_path: Path) -> None:
    save(tmp_path / "VOC2010/JPEGImages/2008_000002.jpg", photo(1, 4))
    (tmp_path / "trainval").mkdir()
    savemat(tmp_path / "trainval/2008_000002.mat", {"LabelMap": np.array([[1, 2, 284, 458]], np.uint16)})
    (tmp_path / "VOC2010/ImageSets/Main").mkdir(parents=True)
    (tmp_path / "VOC2010/ImageSets/Main/train.txt").write_text("")
    (tmp_path / "VOC2010/ImageSets/Main/val.txt").write_text("2008_000002\n")
    corpus = load_corpus("pascal_context59_matlab", tmp_path)
    labels = ids(corpus, "val", "2008_000002")[0]
    assert [corpus.vocabulary[i] if i < 255 else None for i in labels] == [None, "aeroplane", "person", "wood"]
    assert corpus.vocabulary == load_corpus("pascal_context59", tmp_path).vocabulary


def test_kvasir_thresholds_masks_stored_as_colour_jpeg(tmp_path: Path) -> None:
    polyp = np.zeros((16, 24), bool)
    polyp[4:12, 5:19] = True
    for name in ("cju0", "cju1"):
        save(tmp_path / f"Kvasir-SEG/images/{name}.jpg", photo(16, 24))
        save(tmp_path / f"Kvasir-SEG/masks/{name}.jpg", np.repeat(polyp[..., None] * 255, 3, axis=2))
    stored = Image.open(tmp_path / "Kvasir-SEG/masks/cju1.jpg")
    assert (stored.mode, len(stored.convert("L").getcolors() or ()) > 2) == ("RGB", True)
    corpus = load_corpus("kvasir_seg", tmp_path)
    assert np.array_equal(ids(corpus, "train", "cju1"), polyp)


@pytest.mark.parametrize(
    ("name", "split", "image", "mask"),
    [
        ("isic2016", "train", "ISBI2016_ISIC_Part1_Training_Data", "ISBI2016_ISIC_Part1_Training_GroundTruth"),
        ("isic2016", "test", "ISBI2016_ISIC_Part1_Test_Data", "ISBI2016_ISIC_Part1_Test_GroundTruth"),
        ("isic2017", "train", "ISIC-2017_Training_Data", "ISIC-2017_Training_Part1_GroundTruth"),
        ("isic2017", "val", "ISIC-2017_Validation_Data", "ISIC-2017_Validation_Part1_GroundTruth"),
        ("isic2017", "test", "ISIC-2017_Test_v2_Data", "ISIC-2017_Test_v2_Part1_GroundTruth"),
        ("isic2018", "val", "ISIC2018_Task1-2_Validation_Input", "ISIC2018_Task1_Validation_GroundTruth"),
    ],
)
def test_isic_years_differ_in_folders_and_suffix(tmp_path: Path, name: str, split: str, image: str, mask: str) -> None:
    suffix = "_Segmentation" if name == "isic2016" else "_segmentation"
    save(tmp_path / image / "ISIC_0000003.jpg", photo(1, 3))
    save(tmp_path / image / "ISIC_0000003_superpixels.png", photo(1, 3))
    save(tmp_path / mask / f"ISIC_0000003{suffix}.png", [[0, 255, 255]])
    corpus = load_corpus(name, tmp_path)
    assert keys(corpus, split) == ["ISIC_0000003"]
    assert ids(corpus, split, "ISIC_0000003") == [[0, 1, 1]]


def test_chase_takes_the_first_observer_and_keeps_a_child_in_one_split(tmp_path: Path) -> None:
    for name in ("Image_01L", "Image_01R", "Image_10R", "Image_11L", "Image_14R"):
        save(tmp_path / f"{name}.jpg", photo(1, 3))
        save(tmp_path / f"{name}_1stHO.png", [[0, 255, 255]], mode="1")
        save(tmp_path / f"{name}_2ndHO.png", [[255, 0, 0]], mode="1")
    save(tmp_path / "Image_14R_1stHO.png", [[0, 1, 255]])
    corpus = load_corpus("chase_db1", tmp_path)
    assert keys(corpus, "train") == ["Image_01L", "Image_01R", "Image_10R"]
    assert keys(corpus, "test") == ["Image_11L", "Image_14R"]
    assert ids(corpus, "train", "Image_01R") == [[0, 1, 1]]
    assert ids(corpus, "test", "Image_14R") == [[0, 1, 1]]  # all that is not black


def test_isprs_crops_come_with_masks_of_colours_or_ids(tmp_path: Path) -> None:
    crop = "2_10_0_0_512_512"
    colours = [[WHITE, BLUE, CYAN, GREEN, YELLOW, RED, BLACK]]
    save(tmp_path / f"img_dir/train/{crop}.png", photo(1, 7))
    save(tmp_path / f"ann_dir/train/{crop}.png", colours)
    for name in ("isprs_potsdam", "isprs_vaihingen"):
        assert ids(load_corpus(name, tmp_path), "train", crop) == [[0, 1, 2, 3, 4, 5, 255]]
    save(tmp_path / f"ann_dir/train/{crop}.png", [[1, 2, 3, 4, 5, 6, 0]])
    for name in ("isprs_potsdam_ids", "isprs_vaihingen_ids"):
        assert ids(load_corpus(name, tmp_path), "train", crop) == [[0, 1, 2, 3, 4, 5, 255]]


def test_isprs_tiles_are_cut_whole_and_split_by_area(tmp_path: Path) -> None:
    mask = np.full((600, 1000, 3), 255)
    mask[300:, :500] = BLUE
    for area in ("2_10", "7_13"):
        save(tmp_path / f"2_Ortho_RGB/top_potsdam_{area}_RGB.tif", photo(600, 1000))
        save(tmp_path / f"5_Labels_all/top_potsdam_{area}_label.tif", mask)
    corpus = load_corpus("isprs_potsdam_tiles", tmp_path)
    assert keys(corpus, "train") == ["2_10_0", "2_10_1", "2_10_2", "2_10_3"]
    assert keys(corpus, "val")[0] == "7_13_0"
    contents = [corpus.read(ref) for ref in corpus.list("train")]
    assert {content.image.shape for content in contents} == {(300, 500, 3)}
    assert [np.unique(content.mask).tolist() for content in contents] == [[0], [0], [1], [0]]
    assert np.array_equal(contents[3].image, photo(600, 1000)[300:, 500:])

    truth = "ISPRS_semantic_labeling_Vaihingen_ground_truth_COMPLETE"
    save(tmp_path / "top/top_mosaic_09cm_area1.tif", photo(64, 64))
    save(tmp_path / f"{truth}/top_mosaic_09cm_area1.tif", mask[:64, :64])
    assert keys(load_corpus("isprs_vaihingen_tiles", tmp_path), "train") == ["area1_0"]


def test_isaid_reads_red_green_blue_and_covers_large_images_with_tiles(tmp_path: Path) -> None:
    mask = np.zeros((900, 1000, 3))
    mask[450:, 500:] = (0, 0, 63)
    mask[:10, :20] = (0, 100, 155)
    for name, colours in (("P0000", mask), ("P0001", mask[..., ::-1])):
        save(tmp_path / f"train/images/{name}.png", photo(900, 1000))
        save(tmp_path / f"train/Semantic_masks/{name}_instance_color_RGB.png", colours)
    save(tmp_path / "test/images/P0009.png", photo())
    corpus = load_corpus("isaid", tmp_path)
    assert corpus.splits == ("train", "val")
    refs = corpus.list("train")
    assert len(refs) == 8
    counts = sum(np.bincount(corpus.read(ref).mask.ravel(), minlength=16) for ref in refs[:4])
    assert counts.tolist() == [900 * 1000 - 450 * 500 - 200, 450 * 500, *[0] * 13, 200]
    assert (corpus.vocabulary[1], corpus.vocabulary[15]) == ("ship", "harbor")
    with pytest.raises(BadSample, match=r"tile at row 450, column 500: mask P0001\S+ has the colour \(63, 0, 0\)"):
        corpus.read(refs[7])
    assert 0 in corpus.read(refs[5]).mask  # the tiles without a wrong colour are sound


def test_deepglobe_rounds_channels_and_ignores_black(tmp_path: Path) -> None:
    colours = np.array([[CYAN, YELLOW, MAGENTA, GREEN, BLUE, WHITE, BLACK]])
    for name in ("119", "6399"):
        save(tmp_path / f"train/{name}_sat.jpg", photo(1, 7))
        save(tmp_path / f"train/{name}_mask.png", np.abs(colours - 100 * (name == "6399")))
    save(tmp_path / "valid/2334_sat.jpg", photo())
    corpus = load_corpus("deepglobe_land", tmp_path)
    assert keys(corpus, "train") + keys(corpus, "val") == ["6399", "119"]
    assert ids(corpus, "train", "6399") == [[0, 1, 2, 3, 4, 5, 255]]


def test_landcover_ai_reads_three_equal_channels_and_cuts_the_tiles_that_its_lists_name(tmp_path: Path) -> None:
    image, mask = photo(600, 1100), np.random.default_rng(1).integers(0, 5, (600, 1100), dtype=np.uint8)
    save(tmp_path / "images/M-33-20-D-c-4-2.tif", image)
    save(tmp_path / "masks/M-33-20-D-c-4-2.tif", mask)
    number = 0
    for y in range(0, 600, 512):  # as split.py goes through an orthophoto
        for x in range(0, 1100, 512):
            if y + 512 <= 600 and x + 512 <= 1100:
                save(tmp_path / f"output/M-33-20-D-c-4-2_{number}.jpg", image[y : y + 512, x : x + 512])
                tile = np.repeat(mask[y : y + 512, x : x + 512, None], 3, axis=2)
                save(tmp_path / f"output/M-33-20-D-c-4-2_{number}_m.png", tile)
            number += 1
    for split, names in {"train": ["M-33-20-D-c-4-2_1"], "val": ["M-33-20-D-c-4-2_0"], "test": []}.items():
        (tmp_path / f"{split}.txt").write_text("\n".join(names))
    cut, whole = load_corpus("landcover_ai", tmp_path), load_corpus("landcover_ai_orthophotos", tmp_path)
    for split in ("train", "val"):
        assert keys(cut, split) == keys(whole, split)
        first, second = (corpus.read(corpus.list(split)[0]) for corpus in (cut, whole))
        assert np.array_equal(first.mask, second.mask)
        assert first.mask.shape == (512, 512)
    assert np.array_equal(second.image, image[:512, :512])
    assert np.array_equal(second.mask, mask[:512, :512])


def test_landcover_ai_reports_a_listed_tile_that_is_cut_by_the_edge(tmp_path: Path) -> None:
    save(tmp_path / "images/N-33.tif", photo(512, 600))
    save(tmp_path / "masks/N-33.tif", np.zeros((512, 600)))
    for split, names in {"train": "N-33_0\nN-33_1", "val": "nonsense", "test": ""}.items():
        (tmp_path / f"{split}.txt").write_text(names)
    corpus = load_corpus("landcover_ai_orthophotos", tmp_path)
    sound, absent = corpus.list("train")
    assert (sound.key, sound.problem) == ("N-33_0", None)
    assert (absent.key, absent.problem) == ("N-33_1", "images/N-33.tif has no whole tile 1")
    with pytest.raises(DigSegError, match=r"val\.txt: the entry 'nonsense' is not of the form {image}_{tile}"):
        corpus.list("val")


def test_crop_and_weed_counts_vegetation_as_a_class_and_holds_back_whole_recordings(tmp_path: Path) -> None:
    for name in ("ave-0035-0001", "ave-0035-0002", "vwg-0040-0003", "vwg-0040-0001"):
        save(tmp_path / f"images/{name}.jpg", photo(1, 5))
        save(tmp_path / f"labelIds/CropAndWeed/{name}.png", [[0, 1, 54, 80, 255]])
    save(tmp_path / "images/vwg-0040-0001.jpg", photo(1, 5), orientation=3)
    save(tmp_path / "labelIds/CropOrWeed2/ave-0035-0001.png", [[2, 0, 1, 1, 2]])
    corpus = load_corpus("cropandweed", tmp_path)
    assert keys(corpus, "val") == ["ave-0035-0001", "ave-0035-0002"]
    assert keys(corpus, "train") == ["vwg-0040-0001", "vwg-0040-0003"]
    soil, maize, *hedge, vegetation = ids(corpus, "val", "ave-0035-0001")[0]
    assert [corpus.vocabulary[i] for i in (soil, maize, vegetation)] == ["soil", "maize", "vegetation"]
    assert {corpus.vocabulary[i] for i in hedge} == {"hedge mustard"}
    assert len(corpus.vocabulary) == 100
    upright, turned = (corpus.read(corpus.list(split)[0]) for split in ("val", "train"))
    assert np.array_equal(turned.image, upright.image[::-1, ::-1])  # by EXIF orientation; the mask is upright already
    assert np.array_equal(turned.mask, upright.mask)

    variant = load_corpus("cropandweed_crop_or_weed", tmp_path)
    assert ids(variant, "val", "ave-0035-0001") == [[0, 1, 2, 2, 0]]
    assert variant.list("val")[1].problem == "no mask labelIds/CropOrWeed2/ave-0035-0002.png"
