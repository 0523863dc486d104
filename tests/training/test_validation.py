"""Validation while training, against an evaluation of the exported model, in worlds of one and two."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memory import peak_of_python, peak_of_tensors
from mlflow.tracking import MlflowClient
from PIL import Image
from ranks import run_ranks
from runs import STEPS, loss_curve, run_config, train_until_killed
from safetensors.torch import load_file
from shard_writing import damage_samples, noise_samples, write_split
from small_world import VOCABULARY, write_squares

from digseg.config import Config
from digseg.data.corpus import ShardedCorpus
from digseg.errors import DigSegError
from digseg.evaluation.evaluate import Question, count_samples
from digseg.evaluation.inference import Predictor
from digseg.evaluation.metrics import ConfusionMatrix
from digseg.registry.tracking import MlflowRun
from digseg.training.checkpoint import best_checkpoint, published_steps
from digseg.training.engine import Engine
from digseg.training.logging import read_metrics
from digseg.training.run import RunDirectory, check_run, finished_result
from digseg.training.shares import gather_shares
from digseg.training.trained_model import TrainedModel
from digseg.training.trainer import Trainer
from digseg.training.validation import Validated, Validation
from digseg.training.world import World

SAMPLES = 11
_CORPORA = {"evaluation": {"corpora": [{"name": "squares", "split": "val"}]}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and the runs ``plain`` and ``validated``, which differ in nothing else."""
    folder = tmp_path_factory.mktemp("runs")
    write_squares(folder / "shards", "train", 10)
    write_squares(folder / "shards", "val", SAMPLES, seed=1)
    Trainer(run_config(folder, "plain", checkpoint_every=4), World()).train()
    Trainer(_config(folder, "validated"), World()).train()
    return folder


def test_losses_are_those_of_a_run_without_validation_bit_for_bit(folder: Path) -> None:
    plain, validated = loss_curve(folder, "plain"), loss_curve(folder, "validated")
    figures = [{name: line.pop(name) for name in list(line) if name.startswith("val/")} for line in validated]
    assert validated == plain
    assert [sorted(line) for line in figures] == [[], *3 * [["val/miou", "val/miou/squares"]]]
    seconds = read_metrics(folder / "runs/validated/metrics.jsonl")[-1]["ledger.validation_s"]
    assert seconds > 0


def test_figures_are_those_of_an_evaluation_of_the_exported_model(folder: Path) -> None:
    config = _config(folder, "validated")
    result = finished_result(config)
    assert result is not None
    corpus = ShardedCorpus(config.data.root, "squares", "val")
    question = Question(corpus.manifest.vocabulary)
    tally = count_samples(Predictor.load(Path(result.model_dir)), corpus, range(SAMPLES), question)
    expected = ConfusionMatrix(tally.num_classes, tally.confusion).mean_iou()
    last = loss_curve(folder, "validated")[-1]
    assert last["step"] == STEPS
    assert last["val/miou/squares"] == last["val/miou"] == expected


def test_best_checkpoint_is_kept_told_and_exported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.2, 0.9, 0.4])
    run = Validation.run

    def scored(validation: Validation, weights: Mapping[str, torch.Tensor]) -> Validated:
        return replace(run(validation, weights), figures={"val/miou": next(scores)})

    monkeypatch.setattr(Validation, "run", scored)
    config = _config(folder, "best", keep_checkpoints=1, export="best")
    tracked = MlflowRun(config)
    result = Trainer(config, World(), tracked).train()
    checkpoints = RunDirectory(config).checkpoints
    assert published_steps(checkpoints) == [8, 9]
    assert best_checkpoint(checkpoints) == {"step": 8, "checkpoint": "step-00000008", "val/miou": 0.9}
    assert (result.steps, Path(result.checkpoint_dir).name) == (STEPS, "step-00000008")
    saved = torch.load(checkpoints / "step-00000008/rank-00000.pt", weights_only=True)["weights"]["shares"]
    exported = load_file(Path(result.model_dir) / "unet/diffusion_pytorch_model.safetensors")
    for name, weight in exported.items():
        assert torch.equal(weight, saved[f"segmenter.unet.{name}"]["values"].view(weight.shape))
    tags = MlflowClient(tracked.tracking_uri).get_run(tracked.run_id).data.tags
    assert tags["best.checkpoint"] == str(checkpoints / "step-00000008")
    assert (tags["best.step"], tags["best.miou"]) == ("8", "0.9000")


def test_run_that_goes_on_validates_the_same_samples_with_the_same_result(folder: Path) -> None:
    config = _config(folder, "killed")
    train_until_killed(config, 6)
    Trainer(config, World()).train()
    assert loss_curve(folder, "killed") == loss_curve(folder, "validated")
    assert _pictures(folder, "killed") == ["step-00000004.png", "step-00000008.png", "step-00000009.png"]


def test_figures_and_pictures_reach_mlflow(folder: Path) -> None:
    config = _config(folder, "tracked", steps=4)
    run = MlflowRun(config)
    Trainer(config, World(), run).train()
    client = MlflowClient(run.tracking_uri)
    metrics = client.get_run(run.run_id).data.metrics
    assert metrics["val/miou/squares"] == loss_curve(folder, "tracked")[1]["val/miou/squares"]
    assert metrics["ledger.validation_s"] > 0
    (picture,) = client.list_artifacts(run.run_id, "validation")
    with Image.open(client.download_artifacts(run.run_id, picture.path)) as image:
        assert image.width > 900  # image, ground truth, prediction
    # A process that was killed before its picture was attached leaves that to the next.
    path = RunDirectory(config).validation
    (path / "step-00000003.png").write_bytes((path / "step-00000004.png").read_bytes())
    again = MlflowRun(config)
    again.start(config.model_dump(mode="json"), {})
    again.pictures(path)
    again.finish("finished")
    names = [Path(item.path).name for item in client.list_artifacts(run.run_id, "validation")]
    assert sorted(names) == ["step-00000003.png", "step-00000004.png"]


@pytest.mark.cluster
def test_two_ranks_find_what_one_finds_with_weights_that_are_sharded_over_them(tmp_path: Path) -> None:
    write_squares(tmp_path / "shards", "train", 10)
    write_squares(tmp_path / "shards", "val", SAMPLES, seed=1)
    run_ranks(_validate_sharded, 2, tmp_path, tmp_path)
    config = _config(tmp_path, "alone", samples=5, pictures=5)
    model = TrainedModel(config, VOCABULARY)
    alone = Validation(config, World(), model.as_loaded()).run(model.segmenter.state_dict())
    assert len(alone.rows) == 5
    for stage in (0, 3):
        assert json.loads((tmp_path / f"{stage}.json").read_text()) == _comparable(alone)


def test_samples_are_some_of_the_split_and_damaged_ones_are_left_out_and_told(tmp_path: Path) -> None:
    write_squares(tmp_path / "shards", "train", 10)
    write_squares(tmp_path / "shards", "val", SAMPLES, seed=1)
    config = _config(tmp_path, "damaged", samples=5, pictures=SAMPLES)
    model = TrainedModel(config, VOCABULARY)
    state = model.segmenter.state_dict()
    whole = Validation(config, World(), model.as_loaded()).run(state)
    assert len(whole.rows) == 5
    assert _comparable(Validation(config, World(), model.as_loaded()).run(state)) == _comparable(whole)
    corpus = ShardedCorpus(config.data.root, "squares", "val")
    images = [corpus.must_read(number).image for number in range(SAMPLES)]
    places = [next(n for n, image in enumerate(images) if np.array_equal(image, row.image)) for row in whole.rows]
    assert len(set(places)) == 5
    damage_samples(tmp_path / "shards", "squares", [places[1]], "val")
    found = Validation(config, World(), model.as_loaded()).run(state)
    assert len(found.rows) == 4
    assert list(found.unreadable) == [f"squares/val/val-{places[1]:03d}"]
    Trainer(_config(tmp_path, "damaged"), World()).train()
    assert loss_curve(tmp_path, "damaged")[-1]["unreadable_samples"] == 1


def test_weights_are_held_only_while_they_are_validated(folder: Path) -> None:
    model = TrainedModel(_config(folder, "held"), VOCABULARY)
    validation = Validation(_config(folder, "held"), World(), model.as_loaded())
    validation.run(model.segmenter.state_dict())
    assert {parameter.device.type for parameter in validation._model.segmenter.parameters()} == {"meta"}


def test_memory_is_that_of_one_image_whatever_the_number_of_samples(tmp_path: Path) -> None:
    peaks = {}
    for name, height, width in (("small", 192, 256), ("large", 384, 512)):
        for split, number in (("train", 2), ("val", 16)):
            samples = noise_samples(number, 3, size=(height, width))
            write_split(tmp_path / name / "shards", "squares", samples, VOCABULARY, split)
        for number in (4, 16):
            config = _config(tmp_path / name, "memory", samples=number, pictures=2)
            model = TrainedModel(config, VOCABULARY)
            validation, state = Validation(config, World(), model.as_loaded()), model.segmenter.state_dict()

            def run(validation: Validation = validation, state: Mapping[str, torch.Tensor] = state) -> None:
                validation.run(state)

            run()  # names are embedded once
            peaks[name, number] = peak_of_tensors(run), peak_of_python(run)
    image = 192 * 256 * 4  # with its mask
    for name in ("small", "large"):
        (few_tensors, few), (many_tensors, many) = peaks[name, 4], peaks[name, 16]
        assert many_tensors == few_tensors
        assert many < few + image
    # The network sees a larger image at the same working size: only pixels and scores are of its own, in bytes a pixel.
    added = sum(peaks["large", 16]) - sum(peaks["small", 16])
    assert added / (384 * 512 - 192 * 256) < 100


def test_corpora_to_validate_on_must_be_named_and_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"validation\.every is 3, but evaluation\.corpora is empty"):
        run_config(tmp_path, "unnamed", validation={"every": 3})
    with pytest.raises(ValueError, match="export is best, but nothing is validated"):
        run_config(tmp_path, "unknown", export="best")
    write_squares(tmp_path / "shards", "train", 10)
    with pytest.raises(DigSegError, match=r"corpus .squares., split .val."):
        check_run(_config(tmp_path, "missing"), 1)


def _config(folder: Path, name: str, samples: int = 100, pictures: int = 2, **training: Any) -> Config:
    validation = {"every": 4, "samples": samples, "pictures": pictures}
    return run_config(folder, name, _CORPORA, **{"validation": validation, "checkpoint_every": 4, **training})


def _validate_sharded(world: World, folder: Path) -> None:
    for stage in (0, 3):
        config = _config(folder, "sharded", samples=5, pictures=5, zero_stage=stage)
        model = TrainedModel(config, VOCABULARY)
        whole = {name: weight.clone() for name, weight in model.segmenter.state_dict().items()}
        validation = Validation(config, world, model.as_loaded())
        engine = Engine(model.with_loss(), config, world)
        gathered = model.state(gather_shares(engine.shares(), world))
        assert gathered.keys() == whole.keys()
        assert all(torch.equal(gathered[name], weight) for name, weight in whole.items())
        found = validation.run(gathered)
        engine.close()
        if world.is_main:
            (folder / f"{stage}.json").write_text(json.dumps(_comparable(found)))


def _comparable(found: Validated) -> dict[str, Any]:
    rows = [[row.title, row.image.tolist(), row.truth.tolist(), row.prediction.tolist()] for row in found.rows]
    return {"figures": found.figures, "rows": rows}


def _pictures(folder: Path, name: str) -> list[str]:
    return sorted(path.name for path in (folder / "runs" / name / "validation").iterdir())
