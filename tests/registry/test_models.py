"""Registered models: packaged, found again, loaded by MLflow alone, served."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.scoring_server import infer_and_parse_data
from mlflow.tracking import MlflowClient
from mlflow_server import MlflowServer
from PIL import Image
from plain_mlflow import said_elsewhere
from small_world import VOCABULARY, World, picture_bytes

from digseg.config import PredictionConfig, TrackingConfig
from digseg.errors import DigSegError
from digseg.evaluation.classes import ClassQuery
from digseg.evaluation.images import decode_image
from digseg.evaluation.inference import Predictor
from digseg.registry.aliases import roll_back
from digseg.registry.describe import describe, trace
from digseg.registry.lineage import directory_digest, mapping_digest
from digseg.registry.models import list_versions, resolve, set_alias, tag_evaluation
from digseg.registry.package import register_model
from digseg.registry.store import connect, fluent
from digseg.registry.tracking import MlflowRun

PICTURE = picture_bytes()

# What a user of MLflow who knows nothing of this repository would write.
LOADER = """
import base64, io, sys
import mlflow, pandas
from PIL import Image

mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/digseg@champion")
table = pandas.DataFrame({"image": [open(sys.argv[2], "rb").read()], "classes": ["road, car"]})
answer = model.predict(table, params={"background": True})
Image.open(io.BytesIO(base64.b64decode(answer["mask_png"][0]))).save(sys.argv[3])
import digseg
print(list(answer["classes"][0]))
print(digseg.__file__)
print([name for name in ("launch", "data_prep", "ray", "deepspeed") if name in sys.modules])
"""


def test_a_version_carries_its_lineage(world: World) -> None:
    client = MlflowClient(tracking_uri=world.tracking_uri, registry_uri=world.tracking_uri)
    version = client.get_model_version("digseg", "2")
    assert version.run_id == world.run_id
    manifest = json.loads((world.shards / "squares" / "train" / "manifest.json").read_text())
    assert version.tags["dataset.squares/train"] == manifest["digest"]
    assert version.tags["config_sha256"] == mapping_digest(world.config.model_dump(mode="json"))
    assert version.tags["model_sha256"] == directory_digest(world.model_dir)
    assert version.tags["git_revision"]
    aliases = client.get_registered_model("digseg").aliases
    assert {alias: int(number) for alias, number in aliases.items()} == {"challenger": 1, "champion": 2}
    assert client.get_run(world.run_id).info.status == "FINISHED"
    assert "| squares | train |" in version.description
    assert version.description.endswith(f"## Class names trained on\n{', '.join(sorted(VOCABULARY))}")


@pytest.mark.parametrize(
    ("uri", "version"), [("models:/digseg@challenger", 1), ("models:/digseg@champion", 2), ("models:/digseg/1", 1)]
)
def test_uris_lead_to_the_registered_files(world: World, uri: str, version: int) -> None:
    directory, model = resolve(uri, world.tracking_uri)
    assert directory_digest(directory) == directory_digest(world.model_dir)
    assert (model.name, model.version, model.run_id) == ("digseg", version, world.run_id)
    assert model.uri == f"models:/digseg/{version}"


def test_an_exported_directory_is_a_model_too(world: World) -> None:
    directory, model = resolve(str(world.model_dir), "sqlite:////nowhere")
    assert directory == world.model_dir
    assert (model.version, model.tracking_uri) == (None, None)


def test_what_is_not_there_is_answered_with_what_is(world: World, tmp_path: Path) -> None:
    for uri, message in (
        ("models:/digseg@champoin", r"no alias 'champoin'; its aliases: challenger \(version 1\), champion \(version"),
        ("models:/digseg/7", r"no version 7; its versions: 1, 2"),
        ("models:/digsec@champion", r"no registered model 'digsec' .*did you mean 'digseg'"),
        ("models:/digseg", r"not understood; expected models:/NAME@ALIAS"),
        (str(tmp_path / "gone"), r"no model directory .*gone"),
        (str(tmp_path), r"not an exported model"),
    ):
        with pytest.raises(DigSegError, match=message):
            resolve(uri, world.tracking_uri)


def test_a_store_that_fails_does_not_make_things_absent(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise MlflowException("the database is locked")

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "get_run", failing)
        for ask in (describe, trace):
            with pytest.raises(DigSegError, match=r"cannot be asked for run \w+: the database is locked"):
                ask("models:/digseg/1", store)
    set_alias("digseg", 1, "champion", store)
    monkeypatch.setattr(MlflowClient, "get_model_version", failing)
    with pytest.raises(DigSegError, match="models:/digseg/2 cannot be asked for: the database is locked"):
        resolve("models:/digseg/2", store)
    with pytest.raises(DigSegError, match="does not move aliases of 'digseg': the database is locked"):
        roll_back(store, "digseg", "champion")


def test_an_empty_registry_says_so(tmp_path: Path, world: World) -> None:
    # An empty copy of a database: making one takes seconds.
    database = tmp_path / "mlflow.db"
    shutil.copy(world.tracking_uri.removeprefix("sqlite:///"), database)
    client = connect(f"sqlite:///{database}")
    client.delete_registered_model("digseg")
    with pytest.raises(DigSegError, match=r"no model is registered in .*train and register one first"):
        resolve("models:/digseg@champion", f"sqlite:///{database}")
    assert list_versions(f"sqlite:///{database}") == []


def test_aliases_move_and_are_listed(tmp_path: Path, world: World) -> None:
    database = tmp_path / "mlflow.db"
    shutil.copy(world.tracking_uri.removeprefix("sqlite:///"), database)
    store = f"sqlite:///{database}"
    set_alias("digseg", 1, "champion", store)
    assert [(row.version, row.aliases) for row in list_versions(store)] == [(2, ()), (1, ("challenger", "champion"))]
    with pytest.raises(DigSegError, match="no version 9"):
        set_alias("digseg", 9, "champion", store)
    with pytest.raises(DigSegError, match="alias 'v3' cannot be set"):
        set_alias("digseg", 1, "v3", store)


def test_the_mean_of_a_version_is_over_all_corpora_that_it_was_evaluated_on(store: str) -> None:
    _, model = resolve("models:/digseg/1", store)
    for figures in ({"squares": 0.5, "cells": 0.75, "empty": None}, {"cells": 0.25}):
        known = [miou for miou in figures.values() if miou is not None]
        corpora = {name: {"miou": miou} for name, miou in figures.items()}
        tag_evaluation(model, {"mean_iou": sum(known) / len(known), "corpora": corpora})
    tags = connect(store).get_model_version("digseg", "1").tags
    assert {key: tags[key] for key in tags if key == "mean_iou" or key.startswith("miou.")} == {
        "miou.squares": "0.5000",
        "miou.cells": "0.2500",
        "mean_iou": "0.3750",
    }
    assert list_versions(store)[1].mean_iou == "0.3750"


def test_files_that_were_moved_away_are_reported(tmp_path: Path, world: World) -> None:
    files = resolve("models:/digseg/1", world.tracking_uri)[0].parents[1]
    hidden = files.with_name("hidden")
    files.rename(hidden)
    try:
        with pytest.raises(DigSegError, match=r"models:/digseg/1: its files should be in .* moved or deleted"):
            resolve("models:/digseg/1", world.tracking_uri)
    finally:
        hidden.rename(files)


def test_files_that_were_changed_are_refused(tmp_path: Path, world: World) -> None:
    directory = resolve("models:/digseg/1", world.tracking_uri)[0]
    weights = next(directory.rglob("*.safetensors"))
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    try:
        for uri in ("models:/digseg@challenger", "models:/digseg/1"):
            with pytest.raises(DigSegError, match=r"models:/digseg/1: the files in .* not those that were registered"):
                resolve(uri, world.tracking_uri)
    finally:
        weights.write_bytes(original)
    assert resolve("models:/digseg/1", world.tracking_uri)[1].sha256 == directory_digest(world.model_dir)


def test_a_version_that_holds_no_model_says_so(tmp_path: Path, world: World) -> None:
    shutil.copy(world.tracking_uri.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    client = connect(store)
    client.create_registered_model("nothing")
    with pytest.raises(DigSegError, match="'nothing' has no version 1; it has none"):
        resolve("models:/nothing/1", store)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "MLmodel").write_text("flavors: {sklearn: {}}")
    for number, (folder, message) in enumerate(
        (
            ("gone", "should be in .*gone"),
            ("empty", "holds no model: it has no file MLmodel"),
            ("other", "not one that DigSeg"),
        )
    ):
        client.create_model_version("nothing", str(tmp_path / folder))
        with pytest.raises(DigSegError, match=message):
            resolve(f"models:/nothing/{number + 1}", store)


def test_only_exported_models_are_registered(tmp_path: Path, world: World) -> None:
    with pytest.raises(DigSegError, match="not an exported model"):
        register_model(tmp_path, world.config)


def test_a_store_that_fails_in_the_middle_of_a_registration_is_a_clear_error(
    store: str, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise MlflowException("the disk is full")

    monkeypatch.setattr(MlflowClient, "update_model_version", full)
    config = world.config.model_copy(update={"tracking": TrackingConfig(uri=store, experiment=tmp_path.name)})
    with pytest.raises(DigSegError, match="does not take the model: the disk is full"):
        register_model(world.model_dir, config)
    # What is there is known by its digest.
    tags = connect(store).get_model_version("digseg", "3").tags
    assert tags["model_sha256"] == directory_digest(world.model_dir)


def test_plain_mlflow_loads_the_champion_and_predicts_as_the_predictor_does(world: World, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(PICTURE)
    arguments = [world.tracking_uri, str(tmp_path / "picture.png"), str(tmp_path / "mask.png")]
    classes, source, loaded = said_elsewhere(LOADER, arguments, tmp_path)[-3:]
    assert classes == "['background', 'road', 'car']"
    assert loaded == "[]"
    # The code is that of the registered version, not of whatever is installed.
    assert "mlartifacts" in source
    expected = Predictor.load(world.model_dir).predict(decode_image(PICTURE, "x"), ["road", "car"], background=True)
    with Image.open(tmp_path / "mask.png") as mask:
        np.testing.assert_array_equal(np.array(mask), expected.mask)


@pytest.fixture(scope="module")
def model(world: World) -> mlflow.pyfunc.PyFuncModel:
    with fluent(world.tracking_uri):
        return mlflow.pyfunc.load_model("models:/digseg@champion")


def test_requests_of_the_scoring_server_are_understood(world: World, model: mlflow.pyfunc.PyFuncModel) -> None:
    request = {
        "dataframe_split": {
            "columns": ["image", "classes"],
            "data": [[base64.b64encode(PICTURE).decode(), "road, car"]],
        }
    }
    table = infer_and_parse_data(request, model.metadata.get_input_schema())
    in_json = model.predict(table)
    in_python = model.predict(pd.DataFrame({"image": [PICTURE], "classes": ["road, car"]}))
    assert in_json["mask_png"][0] == in_python["mask_png"][0]


def test_probabilities_come_when_asked_for(world: World, model: mlflow.pyfunc.PyFuncModel) -> None:
    table = pd.DataFrame({"image": [PICTURE, picture_bytes(20, 30, "JPEG")], "classes": ["road, car", "square"]})
    plain, full = model.predict(table), model.predict(table, params={"probabilities": True})
    assert list(plain.columns) == ["mask_png", "classes"]
    probabilities = [np.load(io.BytesIO(base64.b64decode(text))) for text in full["probabilities"]]
    assert [array.shape for array in probabilities] == [(2, 50, 70), (1, 20, 30)]
    with Image.open(io.BytesIO(base64.b64decode(full["mask_png"][0]))) as mask:
        agreement = (np.array(mask) == probabilities[0].argmax(0)).mean()
    assert agreement > 0.99  # float16 may tie


def test_the_way_of_asking_is_a_parameter(world: World, model: mlflow.pyfunc.PyFuncModel) -> None:
    table = pd.DataFrame({"image": [PICTURE], "classes": ["road=street, car, sky"]})
    answer = model.predict(table, params={"prediction": '{"classes_per_pass": 1}'})
    predictor = Predictor.load(world.model_dir, settings=PredictionConfig(classes_per_pass=1))
    expected = predictor.predict(decode_image(PICTURE, "x"), [ClassQuery("road", ("street",)), "car", "sky"])
    assert answer["classes"][0] == ["road", "car", "sky"]
    with Image.open(io.BytesIO(base64.b64decode(answer["mask_png"][0]))) as mask:
        np.testing.assert_array_equal(np.array(mask), expected.mask)
    for text, message in (("{", "not JSON"), ("[]", "expected a JSON object"), ('{"a": 1}', "a: unknown key")):
        with pytest.raises(DigSegError, match=message):
            model.predict(table, params={"prediction": text})


def test_bad_rows_are_named(model: mlflow.pyfunc.PyFuncModel) -> None:
    for image, classes, message in (
        (PICTURE, "", "row 1: no classes given"),
        (PICTURE, "road, Road", "row 1: class names given twice"),
        (b"not an image", "road", "row 1: not an image"),
    ):
        table = pd.DataFrame({"image": [PICTURE, image], "classes": ["road", classes]})
        with pytest.raises(DigSegError, match=message):
            model.predict(table)


def test_a_tracking_server_keeps_runs_and_models(
    server: MlflowServer, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIGSEG_CACHE", str(tmp_path / "cache"))
    server.start()
    with pytest.raises(DigSegError, match="no model is registered"):
        resolve("models:/digseg@champion", server.uri)
    values = world.config.model_dump(mode="json")
    config = type(world.config).model_validate(
        {**values, "run": {**values["run"], "storage": str(tmp_path)}, "tracking": {"uri": server.uri}}
    )
    run = MlflowRun(config)
    run.start(config.model_dump(mode="json"), {})
    run.metrics(1, {"loss": 0.5})
    run.finish("finished")
    model = register_model(world.model_dir, config, run_id=run.run_id, alias="champion")
    assert (model.version, model.alias) == (1, "champion")

    first, _ = resolve("models:/digseg@champion", server.uri)
    assert first.is_relative_to(tmp_path / "cache")
    assert directory_digest(first) == directory_digest(world.model_dir)
    again, _ = resolve("models:/digseg/1", server.uri)
    assert again == first
    assert Predictor.load(first).predict(decode_image(PICTURE, "x"), VOCABULARY).classes == VOCABULARY
