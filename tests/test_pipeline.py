"""The exported model as a diffusers pipeline."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusion_checkpoint import write_checkpoint
from PIL import Image
from small_world import export_random_model, small_config

from digseg.config import PredictionConfig
from digseg.errors import DigSegError
from digseg.evaluation.classes import ClassQuery
from digseg.evaluation.images import read_image
from digseg.evaluation.inference import Predictor
from digseg.model.export import LoadedModel
from digseg.pipeline import DiGSegPipeline

CLASSES = ["background", "square"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on Stable Diffusion's own autoencoder and text encoder."""
    folder = tmp_path_factory.mktemp("pipeline")
    checkpoint = write_checkpoint(folder / "sd")
    config = small_config(folder, data={"crop_size": 64, "short_side": 64})
    model = config.model.model_validate({"pretrained": str(checkpoint)})
    return export_random_model(folder / "model", config.model_copy(update={"model": model}), ["square", "hole"])


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)


def test_a_round_trip_gives_the_same_files_and_predictions(exported: Path, tmp_path: Path, pixels: np.ndarray) -> None:
    first = DiGSegPipeline.from_pretrained(exported)
    first.save_pretrained(tmp_path / "again")
    files = {path.relative_to(exported) for path in exported.rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()}
    assert {path.parts[0] for path in files} >= {"unet", "vae", "text_encoder", "tokenizer", "scheduler", "pathway"}
    for path in files:
        assert (exported / path).read_bytes() == (tmp_path / "again" / path).read_bytes(), path
    before, after = first(pixels, CLASSES), DiGSegPipeline.from_pretrained(tmp_path / "again")(pixels, CLASSES)
    assert np.array_equal(before.probabilities, after.probabilities)
    assert before.mask.shape == (70, 90)


def test_it_predicts_as_everything_else_does_from_files_and_pictures(
    exported: Path, tmp_path: Path, pixels: np.ndarray
) -> None:
    pipeline = DiGSegPipeline.from_pretrained(exported)
    expected = Predictor.load(exported).predict(pixels, CLASSES)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "picture.png")
    for image in (pixels, picture, tmp_path / "picture.png", str(tmp_path / "picture.png")):
        assert np.array_equal(pipeline(image, CLASSES).probabilities, expected.probabilities)


def test_it_takes_synonyms_settings_and_pictures_of_sixteen_bits(exported: Path, tmp_path: Path) -> None:
    settings = PredictionConfig(classes_per_pass=1)
    asked = [ClassQuery("square", ("box",)), "hole"]
    deep = Image.fromarray((np.arange(70 * 90, dtype=np.uint16) * 3).reshape(70, 90))
    deep.save(tmp_path / "deep.png")
    expected = Predictor.load(exported, settings=settings).predict(read_image(tmp_path / "deep.png"), asked)
    given = DiGSegPipeline.from_pretrained(exported)(deep, asked, settings=settings)
    assert np.array_equal(given.probabilities, expected.probabilities)
    assert given.classes == ("square", "hole")


def test_names_are_embedded_once_for_all_images_asked_alike(
    exported: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, embed = [], LoadedModel.embed

    def noted(model: LoadedModel, classes: Sequence[Sequence[str]]) -> torch.Tensor:
        asked.append(classes)
        return embed(model, classes)

    monkeypatch.setattr(LoadedModel, "embed", noted)
    pipeline = DiGSegPipeline.from_pretrained(exported)
    first = pipeline(pixels, CLASSES)
    assert np.array_equal(pipeline(pixels, CLASSES, settings=PredictionConfig()).probabilities, first.probabilities)
    assert len(asked) == 1
    other = pipeline(pixels, CLASSES, settings=PredictionConfig(short_side=32))
    assert not np.array_equal(other.probabilities, first.probabilities)
    assert np.array_equal(pipeline(pixels, CLASSES).probabilities, first.probabilities)


def test_another_type_than_float32_is_refused(exported: Path, pixels: np.ndarray) -> None:
    pipeline = DiGSegPipeline.from_pretrained(exported).to(torch.bfloat16)
    with pytest.raises(
        DigSegError, match=r"predicts in float32, but was moved to torch.bfloat16; load the model again"
    ):
        pipeline(pixels, CLASSES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_it_moves_to_a_gpu_and_back(exported: Path, pixels: np.ndarray) -> None:
    pipeline = DiGSegPipeline.from_pretrained(exported)
    before = pipeline(pixels, CLASSES)
    moved = pipeline.to("cuda")(pixels, CLASSES)
    np.testing.assert_allclose(moved.probabilities, before.probabilities, atol=0.02)
    assert np.array_equal(pipeline.to("cpu")(pixels, CLASSES).probabilities, before.probabilities)


def test_diffusers_knows_the_components(exported: Path) -> None:
    pipeline = DiGSegPipeline.from_pretrained(exported)
    named = {name: type(component).__name__ for name, component in pipeline.components.items()}
    assert named == {
        "unet": "UNet2DConditionModel", "pathway": "Pathway", "scheduler": "DDIMScheduler", "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer",
    }  # fmt: skip
    assert pipeline.to("cpu").device.type == "cpu"


def test_the_page_of_a_model_says_what_it_came_from(exported: Path) -> None:
    page = (exported / "README.md").read_text()
    assert page.startswith("---\nlibrary_name: diffusers\n")
    for fact in ("fine-tuned from", "hole, square", "step: 0", "shorter side of an image: 64 px"):
        assert fact in page


def test_it_needs_nothing_of_a_cluster(exported: Path, tmp_path: Path, repository: Path) -> None:
    program = f"""
import sys
for library in ("ray", "deepspeed", "mlflow", "webdataset", "accelerate", "peft"):
    sys.modules[library] = None
import numpy as np
from digseg.pipeline import DiGSegPipeline
pipeline = DiGSegPipeline.from_pretrained({str(exported)!r})
prediction = pipeline(np.zeros((40, 50, 3), np.uint8), ["background", "square"])
assert prediction.mask.shape == (40, 50)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
