"""A run in a real MLflow store, read back through MLflow's own client."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from small_world import World, small_config

from digseg.config import Config
from digseg.errors import DigSegError
from digseg.registry import delivery
from digseg.registry.tracking import MlflowRun, flattened, log_evaluation, metric_name

DIGEST = "ab" * 32


@pytest.fixture
def config(tmp_path: Path, world: World) -> Config:
    """Another run in the world's store: making a database takes seconds."""
    return small_config(tmp_path, tracking={"uri": world.tracking_uri, "experiment": tmp_path.name})


@pytest.fixture
def client(world: World) -> MlflowClient:
    return MlflowClient(tracking_uri=world.tracking_uri, registry_uri=world.tracking_uri)


def _started(config: Config, **changes: object) -> MlflowRun:
    run = MlflowRun(config)
    run.start({**config.model_dump(mode="json"), **changes}, {"squares/train": DIGEST})
    return run


def test_a_run_says_what_it_was_made_from(config: Config, client: MlflowClient, tmp_path: Path) -> None:
    run = _started(config)
    run.finish("finished")
    stored = client.get_run(run.run_id)
    assert stored.info.run_name == "small"
    assert stored.info.status == "FINISHED"
    assert stored.data.params["training.steps"] == "2"
    assert stored.data.params["model.unet.block_out_channels"] == "[16, 32]"
    assert stored.data.tags["dataset.squares/train"] == DIGEST
    assert stored.data.tags["world_size"] == "2"
    assert len(stored.data.tags["config_sha256"]) == 64
    assert stored.data.tags["git_dirty"] in {"true", "false", "unknown"}
    (dataset,) = stored.inputs.dataset_inputs
    assert dataset.dataset.name == "squares/train"
    assert DIGEST.startswith(dataset.dataset.digest)
    resolved = yaml.safe_load(Path(client.download_artifacts(run.run_id, "config.yaml", str(tmp_path))).read_text())
    assert Config.model_validate(resolved) == config
    environment = json.loads(Path(client.download_artifacts(run.run_id, "environment.json", str(tmp_path))).read_text())
    assert environment["packages"]["torch"].startswith("2.")


def test_metrics_arrive_with_their_steps_and_the_caller_does_not_wait(
    config: Config, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _started(config)
    real, delivering, all_queued = MlflowClient.log_batch, threading.Event(), threading.Event()
    in_time = []

    def waiting(*arguments: object, **options: object) -> object:
        delivering.set()
        in_time.append(all_queued.wait(15))
        return real(*arguments, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", waiting)
    run.metrics(0, {"loss": 1.0, "learning_rate": 0.1})
    assert delivering.wait(60)
    for step in range(1, 300):
        run.metrics(step, {"loss": 1 / (step + 1), "learning_rate": 0.1})
    all_queued.set()
    run.finish("finished")
    assert all(in_time)
    history = client.get_metric_history(run.run_id, "loss")
    assert {(metric.step, metric.value) for metric in history} == {(step, 1 / (step + 1)) for step in range(300)}
    assert len(client.get_metric_history(run.run_id, "learning_rate")) == 300


def test_starting_again_continues_the_run_without_repeating_its_metrics(config: Config, client: MlflowClient) -> None:
    first = _started(config)
    for step in (10, 20, 30):
        first.metrics(step, {"loss": float(step)})
    first.finish("failed")
    assert client.get_run(first.run_id).info.status == "FAILED"

    # The process that comes next resumes from a checkpoint at step 15.
    second = _started(config)
    assert second.run_id == first.run_id
    assert client.get_run(first.run_id).info.status == "RUNNING"
    for step in (20, 30, 40):
        second.metrics(step, {"loss": float(step)})
    second.finish("finished")
    steps = [metric.step for metric in client.get_metric_history(first.run_id, "loss")]
    assert sorted(steps) == [10, 20, 30, 40]
    assert len(client.search_runs([client.get_run(first.run_id).info.experiment_id])) == 1


def test_figures_that_a_killed_process_did_not_deliver_are_delivered_by_the_next(
    config: Config, client: MlflowClient
) -> None:
    first = _started(config)
    first.metrics(10, {"loss": 10.0})
    first.finish("failed")
    # It also had 20 and 30, which nobody will ever send from there: the next process begins with all of them.
    second = _started(config)
    for step in (10, 20, 30, 40):
        second.metrics(step, {"loss": float(step), "gradient_norm": 1.0})
    second.finish("finished")
    assert [metric.step for metric in client.get_metric_history(first.run_id, "loss")] == [10, 20, 30, 40]
    assert [metric.step for metric in client.get_metric_history(first.run_id, "gradient_norm")] == [10, 20, 30, 40]


def test_changed_parameters_of_a_continued_run_are_noted(config: Config, client: MlflowClient) -> None:
    run = _started(config, cluster={"workers": 2})
    again = _started(config, cluster={"workers": 4})
    stored = client.get_run(again.run_id).data
    assert run.run_id == again.run_id
    assert stored.params["cluster.workers"] == "2"
    assert stored.tags["changed_on_resume"] == "cluster.workers=4"


def test_a_run_that_the_store_lost_is_made_anew(config: Config, client: MlflowClient) -> None:
    first = _started(config)
    client.delete_run(first.run_id)
    assert _started(config).run_id != first.run_id


def test_a_store_that_fails_in_between_costs_no_metric_and_no_time(
    config: Config, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _started(config)
    run.metrics(1, {"loss": 1.0})
    real, failures = MlflowClient.log_batch, []

    def failing(*arguments: object, **options: object) -> object:
        if len(failures) < 2:
            failures.append(1)
            raise MlflowException("database is locked")
        return real(*arguments, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", failing)
    run.metrics(2, {"loss": 0.5})
    run.finish("finished")
    assert len(failures) == 2
    assert sorted(metric.step for metric in client.get_metric_history(run.run_id, "loss")) == [1, 2]


def test_an_evaluation_becomes_a_child_run(config: Config, client: MlflowClient, tmp_path: Path) -> None:
    run = _started(config)
    part = dict.fromkeys(("mean_accuracy", "frequency_weighted_iou", "mean_dice", "boundary_iou", "boundary_f1"), 0.3)
    part |= {"split": "val", "pixel_accuracy": 0.9, "samples": 3, "calibration_error": None}
    result = {
        "model": {"uri": "models:/digseg/3"},
        "data": "shards",
        "protocol": "supervised",
        "oracle": False,
        "mean_iou": 0.5,
        "corpora": {"camvid": {**part, "miou": 0.5, "classes": {"car": 0.25, "sky": None}}},
        "synonyms": {"camvid": {"car": {"automobile": 0.2}}},
        "held_out": {"town": {**part, "miou": 0.125, "classes": {"flower bed (red)": 0.125}}},
    }
    child = client.get_run(log_evaluation(config.tracking.uri or "", run.run_id, result, {"report.html": "page"}))
    assert child.data.tags["mlflow.parentRunId"] == run.run_id
    assert child.data.tags["git_dirty"] in {"true", "false", "unknown"}
    assert child.data.params["protocol"] == "supervised"
    headline = {"eval.mean_iou": 0.5, "eval.camvid.miou": 0.5, "eval.town.miou": 0.125}
    assert client.get_run(run.run_id).data.metrics == headline
    metrics = child.data.metrics
    assert headline.items() <= metrics.items()
    assert metrics["eval.camvid.pixel_accuracy"] == 0.9
    assert metrics["eval.camvid.iou.car"] == 0.25
    assert metrics["eval.camvid.synonym.car.automobile"] == 0.2
    assert metrics["eval.town.iou.flower bed _red_"] == 0.125
    assert not {"eval.camvid.iou.sky", "eval.camvid.calibration_error"} & metrics.keys()
    folder = Path(client.download_artifacts(child.info.run_id, "", str(tmp_path / "stored")))
    assert json.loads((folder / "evaluation.json").read_text()) == result
    assert (folder / "report.html").read_text() == "page"

    log_evaluation(config.tracking.uri or "", run.run_id, {**result, "oracle": True, "mean_iou": 0.9})
    assert client.get_run(run.run_id).data.metrics == headline


def test_pictures_are_attached(config: Config, client: MlflowClient, tmp_path: Path) -> None:
    picture = tmp_path / "grid.png"
    picture.write_bytes(b"PNG")
    run = _started(config)
    run.log_images([picture])
    assert [item.path for item in client.list_artifacts(run.run_id, "pictures")] == ["pictures/grid.png"]


def test_a_picture_on_its_way_has_not_arrived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "_FLUSH_INTERVAL_S", 0.01)
    (tmp_path / "grid.png").write_bytes(b"PNG")
    begun, arrives = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        begun.set()
        assert arrives.wait(60)

    client = Mock(spec=MlflowClient, list_artifacts=Mock(return_value=[]), log_artifact=slow)
    sent = delivery.Delivery(lambda: delivery.Opened(client, "run", {}))
    sent.attach(tmp_path)
    assert begun.wait(60)
    assert not sent.close(0.05)
    arrives.set()
    assert sent.close(60)


def test_a_deleted_experiment_is_reported_with_the_way_back(config: Config, client: MlflowClient) -> None:
    run = _started(config)
    client.delete_experiment(client.get_run(run.run_id).info.experiment_id)
    (Path(config.run.storage) / config.run.name / "mlflow_run.json").unlink()
    with pytest.raises(DigSegError, match=r"was deleted .*mlflow experiments restore"):
        _started(config)


def test_nested_values_become_flat_parameters() -> None:
    nested = {"a": {"b": {"c": 1.5}, "d": None, "e": {}}, "f": [{"g": "h"}], "i": "text", "j": True}
    expected = {"a.b.c": "1.5", "a.d": "null", "a.e": "{}", "f": '[{"g": "h"}]', "i": "text", "j": "true"}
    assert flattened(nested) == expected


def test_metric_names_hold_what_mlflow_allows() -> None:
    assert metric_name("iou.caf\u00e9 (old), new/x:y-z") == "iou.caf_ _old__ new/x:y-z"
