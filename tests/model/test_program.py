"""A model as a program of torch.export, and what a process with PyTorch alone makes of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusion_checkpoint import write_checkpoint
from small_world import export_random_model, small_config

from digseg.cli import main
from digseg.config import PredictionConfig
from digseg.errors import DigSegError
from digseg.evaluation.classes import ClassQuery
from digseg.evaluation.inference import Predictor
from digseg.model import program
from digseg.model.export import load_model
from digseg.model.program import ProgramShape, export_program

CLASSES = (ClassQuery("background"), ClassQuery("square", ("block",)), ClassQuery("hole"))
# What a user writes where nothing of this project is installed; each image is asked for other classes.
USER = """
import json, sys
for library in ("digseg", "diffusers", "transformers", "ray", "mlflow"):
    sys.modules[library] = None
import torch

file, images, result = sys.argv[1:]
files = {"digseg.json": ""}
program = torch.export.load(file, extra_files=files).module()
facts = json.loads(files["digseg.json"])
embeddings = torch.tensor(facts["embeddings"])
text = torch.zeros(facts["inputs"]["text"]["shape"])
mask = torch.zeros(facts["inputs"]["mask"]["shape"], dtype=torch.bool)
for number, asked in enumerate(([0, 1, 2], [2, 0])):
    text[number, : len(asked)] = embeddings[asked]
    mask[number, : len(asked)] = True
assert [one["name"] for one in facts["classes"]] == ["background", "square", "hole"]
torch.save(program(torch.load(images).float() / 127.5 - 1, text, mask), result)
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    return export_random_model(folder / "model", small_config(folder))


def test_a_process_with_torch_alone_predicts_as_the_model_does(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    named = ["--model", str(small), "--classes", "square=block, hole", "--background"]
    main(["export", *named, "--size", "48x56", "--slots", "5", "--batch", "2", "--out", str(file)])
    _check_as_predicted(file, small, 48, 56)


def test_the_structure_of_stable_diffusion_is_one_program_too(tmp_path: Path) -> None:
    config = small_config(tmp_path, data={"crop_size": 64, "short_side": 64})
    model = config.model.model_validate({"pretrained": str(write_checkpoint(tmp_path / "sd"))})
    folder = export_random_model(tmp_path / "m", config.model_copy(update={"model": model}), ["square", "hole"])
    file, shape = tmp_path / "model.pt2", ProgramShape(64, 128, slots=5, batch=2)
    assert export_program(file, load_model(folder), [query.wordings for query in CLASSES], shape) < 1e-5
    _check_as_predicted(file, folder, 64, 128)


def _check_as_predicted(file: Path, folder: Path, height: int, width: int) -> None:
    """Two images of the working size, so that prediction resizes nothing, through a process with PyTorch alone."""
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    inputs, result = file.with_name("images.pt"), file.with_name("result.pt")
    torch.save(torch.from_numpy(images).permute(0, 3, 1, 2), inputs)
    command = [sys.executable, "-c", USER, str(file), str(inputs), str(result)]
    done = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    predictor = Predictor.load(folder, settings=PredictionConfig(short_side=min(height, width)))
    for said, image, asked in zip(torch.load(result), images, (CLASSES, (CLASSES[2], CLASSES[0])), strict=True):
        expected = predictor.predict(image, asked).probabilities
        np.testing.assert_allclose(said[: len(asked)], expected, atol=1e-4)
        assert not said[len(asked) :].any()


def test_a_program_that_computes_something_else_is_not_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "_TOLERANCE", -1.0)  # which nothing keeps to
    file = tmp_path / "model.pt2"
    with pytest.raises(DigSegError, match=r"model.pt2 was not written: the exported program's probabilities differ"):
        export_program(file, load_model(small), [("square",)], ProgramShape(16, 16, slots=1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (ProgramShape(50, 56, 2), "the height of 50 px is no multiple of 8, .*; the next one is 56"),
        (ProgramShape(48, 0, 2), "the width of 0 px is no multiple of 8, .*; the next one is 8"),
        (ProgramShape(48, 48, 2, batch=0), "a batch of 0 images holds none"),
        (ProgramShape(48, 48, 1), "with 1 slots for 2 classes: a slot for each is needed"),
        (ProgramShape(48, 48, 9), "with 9 slots for 2 classes: .* holds at most 8"),
    ],
)
def test_a_shape_that_the_model_cannot_take_is_refused(
    small: Path, tmp_path: Path, shape: ProgramShape, message: str
) -> None:
    with pytest.raises(DigSegError, match=message):
        export_program(tmp_path / "model.pt2", load_model(small), [("square",), ("hole",)], shape)


def test_a_model_of_the_multi_step_objective_is_refused(tmp_path: Path) -> None:
    folder = export_random_model(tmp_path / "model", small_config(tmp_path, objective={"type": "multi_step"}))
    with pytest.raises(DigSegError, match=r"samples its masks in a loop; only a model of the one-step objective"):
        export_program(tmp_path / "model.pt2", load_model(folder), [("square",)], ProgramShape(48, 48, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "model.onnx"], r"--out model.onnx: the name of a program of torch.export ends with .pt2"),
        (["--out", "nowhere/model.pt2"], "give the name of a file in a folder that exists"),
        (["--out", "model.pt2", "--size", "256"], "--size '256': give height and width in pixels, such as 256x384"),
    ],
)
def test_mistakes_on_the_command_line_are_said_before_a_model_is_looked_for(options: list[str], message: str) -> None:
    with pytest.raises(DigSegError, match=message):
        main(["export", "--model", "nowhere", "--classes", "road", *options])
