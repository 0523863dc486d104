"""Evaluation of registered models on a real Ray cluster."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from latent_writing import write_latents
from mlflow.tracking import MlflowClient
from shard_writing import data_config, noise_samples, write_split
from small_world import VOCABULARY, World, export_random_model, write_squares

from digseg.cluster.evaluate import evaluate_models
from digseg.config import Config, PredictionConfig, Protocol
from digseg.data.corpus import ShardedCorpus
from digseg.errors import DigSegError
from digseg.evaluation.evaluate import Question, count_samples, renamed
from digseg.evaluation.figures import class_figure, corpus_figures
from digseg.evaluation.inference import Predictor
from digseg.evaluation.protocol import choose_splits
from digseg.evaluation.stored import StoredTallies
from digseg.model.card import read_card
from launch.evaluate import main

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def predictor(world: World) -> Predictor:
    return Predictor.load(world.model_dir)


@pytest.fixture(scope="module")
def other_model(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with other weights."""
    values = world.config.model_dump(mode="json")
    config = Config.model_validate({**values, "run": {**values["run"], "seed": 5}})
    return export_random_model(tmp_path_factory.mktemp("other") / "model", config)


def test_tasks_give_the_figures_of_one_process(world: World, predictor: Predictor) -> None:
    synonyms = {"squares": {"square": ["box", "banana"]}}
    (evaluation,) = evaluate_models([world.model_dir], world.shards, [("squares", "val")], synonyms=synonyms)
    result = evaluation.result
    corpus = ShardedCorpus(world.shards, "squares", "val")
    expected = count_samples(predictor, corpus, range(11), Question(VOCABULARY))
    assert result["corpora"] == {"squares": corpus_figures(corpus.manifest, expected, VOCABULARY)}
    assert result["mean_iou"] == result["corpora"]["squares"]["miou"]
    box = count_samples(predictor, corpus, range(11), Question(renamed(VOCABULARY, "square", "box")))
    assert result["synonyms"]["squares"]["square"]["box"] == class_figure(box, 1)
    assert list(result["synonyms"]["squares"]["square"]) == ["box", "banana"]


def test_models_are_asked_as_the_settings_say(world: World, predictor: Predictor) -> None:
    alone = PredictionConfig(classes_per_pass=1)
    (evaluation,) = evaluate_models([world.model_dir], world.shards, [("squares", "val")], prediction=alone)
    assert evaluation.result["prediction"]["classes_per_pass"] == 1
    corpus = ShardedCorpus(world.shards, "squares", "val")
    asked = predictor.with_settings(alone)
    expected = count_samples(asked, corpus, range(11), Question(VOCABULARY))
    assert evaluation.result["corpora"] == {"squares": corpus_figures(corpus.manifest, expected, VOCABULARY)}
    plain = count_samples(predictor, corpus, range(11), Question(VOCABULARY))
    assert (expected.confusion != plain.confusion).any()


def test_a_folder_is_calibrated_and_a_registered_version_is_not(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(world.model_dir, folder)
    rest = ["--data", str(world.shards), "--kept", str(tmp_path / "kept"), "--calibrate"]
    main(["--model", str(folder), *rest])
    assert f"temperature {read_card(folder).temperature:.3f}, fitted on 6 images" in capsys.readouterr().out
    with pytest.raises(DigSegError, match="models:/digseg/2 is registered, and a version does not change"):
        main(["--model", "models:/digseg@champion", "--tracking-uri", world.tracking_uri, *rest])


def test_several_splits_of_a_corpus_are_told_apart(world: World) -> None:
    splits = [("squares", "val"), ("squares", "train")]
    result = evaluate_models([world.model_dir], world.shards, splits)[0].result
    assert list(result["corpora"]) == ["squares/val", "squares/train"]
    both = [corpus["miou"] for corpus in result["corpora"].values()]
    assert result["mean_iou"] == pytest.approx(sum(both) / 2)


def test_what_was_counted_is_not_counted_again(
    world: World, other_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world.shards, tmp_path / "shards")
    shards, kept = tmp_path / "shards", StoredTallies(tmp_path / "kept")
    splits = [("squares", "val")]
    (first,) = evaluate_models([world.model_dir], shards, splits, kept=kept)
    files = sorted(kept.folder.rglob("*.npz"))
    assert len(files) == len(first.splits["squares"].manifest.shards) == 3

    # As after an evaluation that was cut short, with one result damaged: both are done, the third is not.
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:50])
    capsys.readouterr()
    both = evaluate_models([world.model_dir, other_model], shards, splits, kept=kept)
    assert "1 of 6 pieces were counted before" in capsys.readouterr().out
    assert both[0].result == first.result
    assert both[1].result["corpora"] != first.result["corpora"]

    # Nothing is left to be read: the shards may be gone, only their manifest is needed.
    for shard in (shards / "squares" / "val").glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    assert evaluate_models([other_model], shards, splits, kept=kept)[0].result == both[1].result
    for changed in ({"oracle": True}, {"synonyms": {"squares": {"square": ["box"]}}}):
        with pytest.raises(DigSegError, match=r"shard\.py again"):
            evaluate_models([other_model], shards, splits, kept=kept, **changed)


def test_an_oracle_is_labelled(world: World) -> None:
    result = evaluate_models([world.model_dir], world.shards, [("squares", "val")], oracle=True)[0].result
    assert result["oracle"] is True
    assert evaluate_models([world.model_dir], world.shards, [("squares", "val")])[0].result["oracle"] is False


def test_a_model_that_does_not_say_its_corpora_cannot_be_split_by_them(world: World) -> None:
    with pytest.raises(DigSegError, match="does not say what it was trained on"):
        evaluate_models([world.model_dir], world.shards, [("squares", "val")], Protocol(name="x", corpora="untrained"))


def test_the_command_writes_and_logs(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    store = ["--tracking-uri", world.tracking_uri, "--kept", str(tmp_path / "kept")]
    extra = ["--synonyms", "squares:square=box", "--out", str(out), "--report", str(tmp_path / "report.html")]
    main(["--model", "models:/digseg@challenger", "--data", str(world.shards), *store, *extra])
    (result,) = json.loads(out.read_text())["evaluations"]
    # Training splits are left out by default.
    assert {name: corpus["split"] for name, corpus in result["corpora"].items()} == {"squares": "val"}
    assert result["model"]["version"] == 1
    shown = capsys.readouterr().out
    assert f"{result['corpora']['squares']['miou']:.3f}" in shown
    for name in VOCABULARY:
        assert name in shown
    client = MlflowClient(tracking_uri=world.tracking_uri, registry_uri=world.tracking_uri)
    parent = client.get_run(world.run_id)
    assert parent.data.metrics["eval.squares.miou"] == result["corpora"]["squares"]["miou"]
    (child,) = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{world.run_id}'")
    assert child.info.status == "FINISHED"
    assert child.data.params["model"] == "models:/digseg/1"
    assert "eval.squares.synonym.square.box" in child.data.metrics
    (tmp_path / "logged").mkdir()
    page = client.download_artifacts(child.info.run_id, "report.html", str(tmp_path / "logged"))
    assert Path(page).read_text() == (tmp_path / "report.html").read_text()
    client.delete_run(child.info.run_id)  # other tests share this store
    assert float(client.get_model_version("digseg", "1").tags["mean_iou"]) == pytest.approx(
        result["mean_iou"], abs=1e-4
    )


def test_two_models_are_compared(
    world: World, other_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    data = ["--data", str(world.shards), "--kept", str(tmp_path / "kept"), "--out", str(out)]
    main(["--model", str(world.model_dir), "--model", str(other_model), *data])
    written = json.loads(out.read_text())
    first, second = written["evaluations"]
    (comparison,) = written["comparisons"]
    assert (comparison["first"], comparison["second"]) == (str(world.model_dir), str(other_model))
    assert comparison["mean"]["difference"] == pytest.approx(second["mean_iou"] - first["mean_iou"])
    assert f"{comparison['mean']['difference']:+.3f}" in capsys.readouterr().out


def test_a_damaged_shard_stops_the_command_before_anything_is_written(world: World, tmp_path: Path) -> None:
    write_squares(tmp_path / "shards", "val", 3)
    shard = tmp_path / "shards" / "squares" / "val" / "squares-val-000000.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 0xFF
    shard.write_bytes(content)
    out, kept = tmp_path / "result.json", tmp_path / "kept"
    where = ["--data", str(tmp_path / "shards"), "--out", str(out), "--kept", str(kept)]
    with pytest.raises(DigSegError, match=r"val-000.*shard\.py again"):
        main(["--model", str(world.model_dir), *where])
    assert not out.exists()
    assert not list(kept.rglob("*.npz"))


def test_wrong_arguments_are_refused_with_what_exists(world: World, tmp_path: Path) -> None:
    shards, model = str(world.shards), str(world.model_dir)
    for arguments, message in (
        (["--model", model, "--data", str(tmp_path)], "no shards below"),
        (["--model", model], "--data is missing"),
        (["--model", model, "--data", shards, "--split", "test"], "no split 'test' .*squares/train, squares/val"),
        (["--model", model, "--data", shards, "--corpora", "sqares"], "did you mean 'squares'"),
        (["--model", model, "--data", shards, "--synonyms", "squares"], "write CORPUS:CLASS=WORDING"),
        (["--model", model, "--data", shards, "--synonyms", "squares:sqare=box"], "did you mean 'square'"),
        (["--model", model, "--data", shards, "--synonyms", "town:square=box"], "'town' is not among"),
        (["--model", model, "--data", shards, "--out", str(tmp_path / "no" / "x.json")], "in a folder that exists"),
        (["--model", model, "--data", shards, "training.steps=1"], "overrides a configuration"),
    ):
        with pytest.raises(DigSegError, match=message):
            main([*arguments, *(["--kept", str(tmp_path / "kept")] if len(arguments) > 2 else [])])


def test_splits_are_chosen_by_name_or_by_not_being_for_training(tmp_path: Path) -> None:
    for corpus, split in (("a", "train"), ("a", "val"), ("b", "test"), ("b", "val")):
        write_split(tmp_path, corpus, noise_samples(1, 2), ("x", "y"), split)
    assert choose_splits(str(tmp_path)) == [("a", "val"), ("b", "test"), ("b", "val")]
    assert choose_splits(str(tmp_path), "val") == [("a", "val"), ("b", "val")]
    assert choose_splits(str(tmp_path), "train") == [("a", "train")]
    assert choose_splits(str(tmp_path), None, ["b"]) == [("b", "test"), ("b", "val")]


def test_latents_are_no_images_to_evaluate_on(tmp_path: Path) -> None:
    write_split(tmp_path, "a", noise_samples(1, 2), ("x", "y"), "train")
    write_latents(data_config(tmp_path, [{"name": "a"}]), tmp_path / "latents")
    with pytest.raises(DigSegError, match="holds latents of augmented views; evaluate on the shards"):
        choose_splits(str(tmp_path / "latents"), "train")
