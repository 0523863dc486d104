"""A run whose MLflow server goes away and comes back, with a real server."""

from __future__ import annotations

import json
import time
from http import HTTPStatus
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from mlflow_server import MlflowServer, answering
from small_world import small_config

from digseg.config import Config
from digseg.registry import delivery, tracking
from digseg.registry.store import StoreAwayError
from digseg.registry.tracking import MlflowRun

LOG_S = 15.0  # what logging of many steps may take on a busy machine; MLflow's retries take seconds for each


def _started(config: Config) -> MlflowRun:
    run = MlflowRun(config)
    run.start(config.model_dump(mode="json"), {}, {"device": "cpu"})
    return run


def _log(run: MlflowRun, steps: range, lines: list[dict[str, float]]) -> None:
    """Log losses as training does, noting them as its `metrics.jsonl` does; nobody waits."""
    before = time.monotonic()
    for step in steps:
        run.metrics(step, {"loss": float(step)})
        lines.append({"step": step, "loss": float(step)})
    assert time.monotonic() - before < LOG_S


def _steps(client: MlflowClient, run_id: str) -> list[int]:
    """The steps of the losses in the order of the store, each value checked."""
    history = client.get_metric_history(run_id, "loss")
    assert all(metric.value == metric.step for metric in history)
    return [metric.step for metric in history]


@pytest.mark.cluster
def test_nothing_is_lost_and_nobody_waits_while_the_server_is_away(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(delivery, "_FLUSH_INTERVAL_S", 0.2)
    monkeypatch.setattr(delivery, "_SYSTEM_INTERVAL_S", 0.5)
    config = small_config(tmp_path, tracking={"uri": server.uri})
    with pytest.raises(StoreAwayError, match="does not answer"):
        _started(config)  # a server that never was there is a mistake of the user's

    server.start()
    lines: list[dict[str, float]] = []
    run = _started(config)
    run_id = run.run_id
    _log(run, range(1, 200), lines)
    server.stop()  # in the middle of the delivery
    _log(run, range(200, 400), lines)
    server.start()
    run.finish("failed")
    client = MlflowClient(server.uri)
    assert client.get_run(run_id).info.status == "FAILED"
    assert _steps(client, run_id) == list(range(1, 400))

    # The run is started again while the server is away, and says once more what it knows of its past.
    server.stop()
    successor = _started(config)
    assert "the run goes on, and what it logs is delivered later" in caplog.text
    for line in list(lines):
        successor.metrics(int(line["step"]), {"loss": line["loss"]})
    _log(successor, range(400, 450), lines)
    server.start()
    _log(successor, range(450, 500), lines)
    successor.finish("finished")
    stored = client.get_run(run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.tags["device"] == "cpu"
    assert _steps(client, run_id) == list(range(1, 500))
    assert 0 <= stored.data.metrics["system/cpu_utilization_percentage"] <= 100
    assert stored.data.metrics["system/process_memory_megabytes"] > 10

    # Away at the very end: the next start of the same, finished run delivers the rest.
    monkeypatch.setattr(tracking, "_FINISH_TIMEOUT_S", 1.0)
    last = _started(config)
    server.stop()
    _log(last, range(500, 520), lines)
    pictures = tmp_path / "validation"
    pictures.mkdir()
    (pictures / "step-00000500.png").write_bytes(b"PNG")
    last.pictures(pictures)
    tags = {"best.step": "500"}
    last.tags(tags)
    last.finish("finished")
    assert "the same command again delivers them" in caplog.text
    assert not MlflowRun(config).settle(lines, pictures, tags)
    server.start()
    assert MlflowRun(config).settle(lines, pictures, tags)
    assert [item.path for item in client.list_artifacts(run_id, "validation")] == ["validation/step-00000500.png"]
    assert client.get_run(run_id).data.tags["best.step"] == "500"
    assert _steps(client, run_id) == list(range(1, 520))
    assert client.get_run(run_id).info.status == "FINISHED"
    assert MlflowRun(config).run_id == run_id


def test_a_server_that_answers_but_fails_counts_as_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "_FINISH_TIMEOUT_S", 0.1)
    with answering(HTTPStatus.SERVICE_UNAVAILABLE) as uri:
        config = small_config(tmp_path, tracking={"uri": uri})
        with pytest.raises(StoreAwayError, match="cannot be used"):
            _started(config)
        record = tmp_path / "runs" / config.run.name / tracking.RECORD_NAME
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({"run_id": "known", "tracking_uri": uri}))
        assert not MlflowRun(config).settle([], tmp_path / "validation", {})
        run = _started(config)
        assert "the run goes on, and what it logs is delivered later" in caplog.text
        run.finish("finished")
    assert json.loads(record.read_text())["ended"] == "finished"
