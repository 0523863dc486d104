"""Evaluation of a registered model on a real Ray cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from shard_writing import noise_samples, write_split
from small_world import VOCABULARY, World, write_squares

from digseg.cluster.evaluate import evaluate_model
from digseg.cluster.runtime import ray_session
from digseg.config.schema import ClusterConfig
from digseg.data.corpus import ShardedCorpus
from digseg.errors import DigSegError
from digseg.evaluation.evaluate import evaluate_corpus, renamed
from digseg.evaluation.inference import Predictor
from launch.evaluate import choose_splits, main

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One local Ray for all tests here; what they start joins it."""
    with ray_session(ClusterConfig(workers=2)):
        yield


@pytest.fixture(scope="module")
def predictor(world: World) -> Predictor:
    return Predictor.load(world.model_dir)


def test_tasks_give_the_figures_of_one_process(world: World, predictor: Predictor) -> None:
    synonyms = {"squares": {"square": ["box", "banana"]}}
    result = evaluate_model(world.model_dir, world.shards, [("squares", "val")], synonyms)
    corpus = ShardedCorpus(world.shards, "squares", "val")
    expected = evaluate_corpus(predictor, corpus)
    assert result["corpora"] == {
        "squares": {
            "split": "val",
            "miou": expected.miou,
            "pixel_accuracy": expected.pixel_accuracy,
            "samples": 11,
            "digest": corpus.manifest.digest,
            "classes": expected.classes,
        }
    }
    assert result["mean_iou"] == expected.miou
    box = evaluate_corpus(predictor, corpus, renamed(VOCABULARY, "square", "box")).classes["square"]
    assert result["synonyms"]["squares"]["square"]["box"] == box
    assert list(result["synonyms"]["squares"]["square"]) == ["box", "banana"]


def test_several_splits_of_a_corpus_are_told_apart(world: World) -> None:
    result = evaluate_model(world.model_dir, world.shards, [("squares", "val"), ("squares", "train")])
    assert list(result["corpora"]) == ["squares/val", "squares/train"]
    both = [corpus["miou"] for corpus in result["corpora"].values()]
    assert result["mean_iou"] == pytest.approx(sum(both) / 2)


def test_the_command_writes_logs_and_moves_the_alias(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    store = ["--tracking-uri", world.tracking_uri]
    extra = ["--synonyms", "squares:square=box", "--set-alias", "evaluated", "--out", str(out)]
    main(["--model", "models:/digseg@challenger", "--data", str(world.shards), *store, *extra])
    result = json.loads(out.read_text())
    # Training splits are left out by default.
    assert {name: corpus["split"] for name, corpus in result["corpora"].items()} == {"squares": "val"}
    assert result["model"]["version"] == 1
    shown = capsys.readouterr().out
    assert f"{result['corpora']['squares']['miou']:.3f}" in shown
    for name in VOCABULARY:
        assert name in shown
    client = MlflowClient(tracking_uri=world.tracking_uri, registry_uri=world.tracking_uri)
    metrics = client.get_run(world.run_id).data.metrics
    assert metrics["eval.squares.miou"] == result["corpora"]["squares"]["miou"]
    assert "eval.squares.synonym.square.box" in metrics
    assert int(client.get_model_version_by_alias("digseg", "evaluated").version) == 1
    client.delete_registered_model_alias("digseg", "evaluated")  # other tests share this registry
    assert float(client.get_model_version("digseg", "1").tags["mean_iou"]) == pytest.approx(
        result["mean_iou"], abs=1e-4
    )


def test_a_damaged_shard_stops_the_command_before_anything_is_written(world: World, tmp_path: Path) -> None:
    write_squares(tmp_path / "shards", "val", 3)
    shard = tmp_path / "shards" / "squares" / "val" / "squares-val-000000.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 0xFF
    shard.write_bytes(content)
    out = tmp_path / "result.json"
    with pytest.raises(DigSegError, match=r"val-000.*shard\.py again"):
        main(["--model", str(world.model_dir), "--data", str(tmp_path / "shards"), "--out", str(out)])
    assert not out.exists()


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
        (["--model", model, "--data", shards, "--set-alias", "x"], "only registered models have aliases"),
        (["--model", model, "--data", shards, "--out", str(tmp_path / "no" / "x.json")], "there is no folder"),
        (["--model", model, "--data", shards, "training.steps=1"], "overrides a configuration"),
    ):
        with pytest.raises(DigSegError, match=message):
            main(arguments)


def test_splits_are_chosen_by_name_or_by_not_being_for_training(tmp_path: Path) -> None:
    for corpus, split in (("a", "train"), ("a", "val"), ("b", "test"), ("b", "val")):
        write_split(tmp_path, corpus, noise_samples(1, 2), ("x", "y"), split)
    assert choose_splits(str(tmp_path)) == [("a", "val"), ("b", "test"), ("b", "val")]
    assert choose_splits(str(tmp_path), "val") == [("a", "val"), ("b", "val")]
    assert choose_splits(str(tmp_path), "train") == [("a", "train")]
    assert choose_splits(str(tmp_path), None, ["b"]) == [("b", "test"), ("b", "val")]
