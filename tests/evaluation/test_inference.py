"""Prediction with an exported model: passes, wordings, sizes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image
from small_world import export_random_model, small_config

from digseg.config import PredictionConfig, section_of_options
from digseg.errors import DigSegError
from digseg.evaluation.classes import ClassQuery
from digseg.evaluation.inference import Predictor
from digseg.evaluation.pixels import ArrayPixels
from digseg.model.export import load_model

NAMES = ("road", "car", "sky", "tree", "person")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inference")
    pathway = {"dim": 16, "head_dim": 5, "query_layers": 0, "gate": 0.0}
    return export_random_model(folder / "model", small_config(folder, model={"pathway": pathway}))


@pytest.fixture(scope="module")
def predictor(model_dir: Path) -> Predictor:
    return Predictor.load(model_dir)


@pytest.fixture(scope="module")
def image() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)


def independent(model_dir: Path) -> Predictor:
    """A model whose score of a class does not depend on what else is asked: no name reaches the U-Net, and the names
    do not see each other."""
    model = load_model(model_dir)
    for name, module in model.segmenter.unet.named_modules():
        if name.endswith("attn2.to_out.0"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return Predictor(model)


@pytest.mark.parametrize("names", [NAMES, ("background", *NAMES)])
@pytest.mark.parametrize("per_pass", [1, 2])
def test_several_passes_give_what_one_pass_gives(
    model_dir: Path, image: NDArray[np.uint8], names: tuple[str, ...], per_pass: int
) -> None:
    whole = independent(model_dir)
    parted = whole.with_settings(PredictionConfig(classes_per_pass=per_pass))
    assert len(parted.passes([ClassQuery(name) for name in names])) == -(-5 // per_pass)
    one, several = (predictor.predict(image, names) for predictor in (whole, parted))
    np.testing.assert_allclose(several.probabilities, one.probabilities, atol=1e-5)
    assert one.probabilities.std() > 1e-3


def test_a_vocabulary_beyond_the_palette_has_a_mask_and_probabilities(
    predictor: Predictor, image: NDArray[np.uint8]
) -> None:
    names = [f"kind {number}" for number in range(256)]
    assert len(predictor.passes([ClassQuery(name) for name in names])) == 37  # a pass of this model holds 8
    prediction = predictor.predict(image[:20, :20], names)
    assert prediction.mask.dtype == np.uint16
    assert prediction.probabilities.shape == (256, 20, 20)
    np.testing.assert_allclose(prediction.probabilities.sum(0), 1, atol=1e-4)
    np.testing.assert_array_equal(prediction.mask, prediction.probabilities.argmax(0))


def test_a_perfect_mask_survives_many_classes(predictor: Predictor) -> None:
    mask = np.arange(48 * 48).reshape(48, 48) // 144  # 16 classes; a pass of this model holds 8
    np.testing.assert_array_equal(predictor.round_trip(mask, 16), mask)


def test_synonyms_and_templates_are_averaged(predictor: Predictor, image: NDArray[np.uint8]) -> None:
    encoder = predictor._model.text_encoder
    asked = ClassQuery("road", ("street",))
    wordings = ["a photo of road", "road", "a photo of street", "street"]
    templates = PredictionConfig(templates=("a photo of {}", "{}"))
    embedded = predictor.with_settings(templates)._embed([asked])[0]
    mean = encoder.encode(wordings).mean(0)
    centred = mean / mean.norm() - predictor._model.segmenter.pathway.text_mean
    torch.testing.assert_close(embedded, centred / centred.norm() * len(centred) ** 0.5)
    plain = predictor.predict(image, ["road", "car"]).probabilities
    averaged = predictor.predict(image, [asked, "car"]).probabilities
    assert np.abs(plain - averaged).max() > 1e-5
    assert predictor.predict(image, [asked, "car"]).classes == ("road", "car")


@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (3, 2), (301, 20)])
def test_images_of_any_size_are_segmented(predictor: Predictor, shape: tuple[int, int]) -> None:
    prediction = predictor.predict(np.full((*shape, 3), 90, np.uint8), NAMES)
    assert prediction.mask.shape == shape
    assert np.isfinite(prediction.probabilities).all()


def test_arrays_that_are_no_rgb_image_are_refused(predictor: Predictor) -> None:
    for wrong in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3))):
        with pytest.raises(DigSegError, match="expected an RGB image"):
            predictor.predict(wrong, NAMES)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"short_side": 5}, "short_side: got 5; input should be greater than or equal to 16"),
        ({"classes_per_pass": 0}, "classes_per_pass: got 0"),
        ({"templates": ["a photo"]}, r"'a photo' needs one \{\}"),
        ({"templates": ["{} {}"]}, r"needs one \{\}"),
        ({"tempaltes": ["{}"]}, "did you mean 'templates'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(DigSegError, match=message):
        section_of_options(PredictionConfig, values)


def test_more_classes_a_pass_than_colours_are_refused(predictor: Predictor) -> None:
    with pytest.raises(DigSegError, match="a pass of this model holds 8 classes, the background included; use 7"):
        predictor.with_settings(PredictionConfig(classes_per_pass=8))


def test_windows_that_cover_the_image_change_nothing(predictor: Predictor, image: NDArray[np.uint8]) -> None:
    whole = predictor.predict(image, NAMES)
    covered = predictor.with_settings(PredictionConfig(window=70)).predict(image, NAMES)
    np.testing.assert_array_equal(covered.probabilities, whole.probabilities)
    windowed = predictor.with_settings(PredictionConfig(window=32))
    parted = windowed.predict(image, NAMES)
    np.testing.assert_allclose(parted.probabilities.sum(0), 1, atol=1e-4)
    assert (parted.mask != whole.mask).any()
    streamed, shares = np.zeros((50, 70), np.uint8), list[float]()
    windowed.predict_mask(ArrayPixels(image), NAMES, streamed, shares.append)
    np.testing.assert_array_equal(streamed, parted.mask)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert len(shares) == 2 * 3  # windows


def test_the_memory_of_a_large_image_is_that_of_its_windows(model_dir: Path, tmp_path: Path) -> None:
    """Four times the pixels of a tiled TIFF, 24 classes: whole, their probabilities would take another 288 MB."""
    for side in (1000, 2000):
        tiles = np.zeros((side, side, 3), np.uint8)
        tifffile.imwrite(tmp_path / f"{side}.tif", tiles, tile=(256, 256), photometric="rgb")
    program = (
        "import resource, sys\nfrom digseg.cli import main\n"
        "for image in sys.argv[-2:]:\n"
        "    main([*sys.argv[1:-2], image])\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    names = ",".join(f"kind {number}" for number in range(24))
    command = ["predict", "--model", str(model_dir), "--classes", names, "--window", "500", "--overlap", "0.1"]
    images = [str(tmp_path / f"{side}.tif") for side in (1000, 2000)]
    arguments = [*command, "--out", str(tmp_path / "out"), *images]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    small, large = (float(line) for line in done.stdout.splitlines() if line[0].isdigit())
    assert large - small < 144
    with Image.open(tmp_path / "out" / "2000.mask.png") as mask:
        assert mask.size == (2000, 2000)


def test_a_multi_step_model_is_sampled_and_the_seed_decides(
    model_dir: Path, image: NDArray[np.uint8], tmp_path: Path
) -> None:
    config = small_config(tmp_path, objective={"type": "multi_step"})
    sampled = Predictor.load(export_random_model(tmp_path / "model", config))
    masks = {
        name: sampled.with_settings(PredictionConfig(**options)).predict(image, NAMES).probabilities
        for name, options in {
            "default": {},
            "ten": {"steps": 10},
            "one": {"steps": 1},
            "other seed": {"seed": 1},
            "two": {"ensemble": 2},
        }.items()
    }
    np.testing.assert_array_equal(masks["default"], masks["ten"])
    for name in ("one", "other seed", "two"):
        assert np.abs(masks[name] - masks["default"]).max() > 1e-6, name
    np.testing.assert_allclose(masks["two"], (masks["default"] + masks["other seed"]) / 2, atol=1e-3)
    for options in ({"steps": 4}, {"seed": 1}, {"ensemble": 2}):
        with pytest.raises(DigSegError, match="for models of the multi-step objective"):
            Predictor.load(model_dir, settings=PredictionConfig(**options))
