"""Training under Ray: the loss of a worker, errors of the user in a worker, and a submitted job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow.tracking import MlflowClient
from ray_head import start_head
from small_world import small_config, write_squares

from digseg.cluster.runtime import ray_session
from digseg.cluster.train import _raise_recorded, _record, run_training
from digseg.config import ClusterConfig, Config
from digseg.errors import DigSegError
from digseg.registry.tracking import MlflowRun
from digseg.training.checkpoint import published_steps
from digseg.training.logging import read_metrics

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    # Ray about its own settings when the trainer is made, MLflow's store about SQLAlchemy's.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

STEPS = 60
HANG_TIMEOUT_S = 5  # a save takes 0.1 s; a start on busy cores keeps a process from answering for 2 s
_TIMES = ("images_per_second", "step_time_", "data_wait_share", "tflops", "mfu", "memory_gb", "goodput", "ledger.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_squares(folder / "shards", "train", 10)
    return folder


@pytest.fixture(scope="module")
def ray_running() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # workers are not last where other processes are busy
        with ray_session(ClusterConfig(workers=2)):
            yield


@pytest.fixture(scope="module")
def undisturbed(ray_running: None, folder: Path) -> list[dict[str, Any]]:
    """The loss curve of a run that nothing happened to."""
    result = run_training(_config(folder, "undisturbed"))
    assert (result.steps, result.world_size) == (STEPS, 2)
    assert result.last_loss < result.first_loss
    curve = _curve(folder, "undisturbed")
    assert [line["step"] for line in curve] == [1, *range(7, STEPS, 7), STEPS]
    return curve


def test_run_that_loses_a_worker_ends_as_the_undisturbed_one(undisturbed: list[dict[str, Any]], folder: Path) -> None:
    config = _disturbed(folder, "killed", signal.SIGKILL)
    curve = _curve(folder, "killed")
    assert curve == undisturbed
    # One MLflow run, with each figure once.
    run = MlflowRun(config)
    client = MlflowClient(run.tracking_uri)
    assert client.get_run(run.run_id).info.status == "FINISHED"
    logged = [metric.step for metric in client.get_metric_history(run.run_id, "loss")]
    assert logged == [line["step"] for line in curve]


def test_worker_told_that_its_machine_goes_away_has_all_save_and_nothing_is_lost(
    undisturbed: list[dict[str, Any]], folder: Path
) -> None:
    _disturbed(folder, "noticed", signal.SIGTERM)
    assert _curve(folder, "noticed") == undisturbed
    ledger = json.loads((folder / "runs/noticed/ledger.json").read_bytes())
    assert ledger["seconds"]["lost"] == 0


def test_worker_that_hangs_is_ended_and_the_run_ends_as_the_undisturbed_one(
    undisturbed: list[dict[str, Any]], folder: Path
) -> None:
    _disturbed(folder, "hung", signal.SIGSTOP, hang_timeout_s=HANG_TIMEOUT_S)
    assert _curve(folder, "hung") == undisturbed


def test_users_mistake_found_in_a_worker_is_raised_here_and_not_tried_again(
    ray_running: None, folder: Path, tmp_path: Path
) -> None:
    manifest = write_squares(tmp_path / "shards", "train", 10)
    for shard in manifest.shards:
        path = tmp_path / "shards/squares/train" / shard.name
        path.write_bytes(bytes(path.stat().st_size))
    config = _config(tmp_path, "unreadable", workers=[1, 2])  # as many as there is room for
    with pytest.raises(DigSegError, match="cannot be read"):
        run_training(config)
    assert not (tmp_path / "runs/unreadable/checkpoints").exists()


def test_first_of_several_workers_errors_is_the_one_raised(tmp_path: Path) -> None:
    for text in ("no room", "what came of it"):
        _record(tmp_path / "failure.json", DigSegError(text))
    with pytest.raises(DigSegError, match="no room"):
        _raise_recorded(tmp_path / "failure.json")


def test_users_mistake_found_before_is_raised_before_workers_start(folder: Path) -> None:
    values = _config(folder, "undecided").model_dump(mode="json")
    values["training"]["deepspeed"] = {"train_batch_size": 4}
    with pytest.raises(DigSegError, match=r"training\.deepspeed\.train_batch_size: derived by DigSeg"):
        run_training(Config.model_validate(values))


def test_submitted_job_trains_the_demo_and_is_found_in_mlflow(tmp_path: Path, repository: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "DIGSEG_"))}
    overrides = [
        "run.name=submitted",
        "training.steps=20",
        f"run.storage={tmp_path}/runs",
        f"data.root={tmp_path}/shards",
        f"prepare.root={tmp_path}/corpora",
        "prepare.sample_corpora.images_per_domain=10",
        "prepare.sample_corpora.size=64",
        "data.crop_size=64",
        "data.short_side=64",
        "model.unet.block_out_channels=[16,16,16,32]",
        "model.unet.norm_num_groups=16",
    ]
    with start_head(tmp_path, kept, num_cpus=2) as head:
        submitted = subprocess.run(
            [
                str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", head.dashboard,
                "--working-dir", ".", "--", "python", "launch/train.py", "--config", "configs/demo.yaml", *overrides,
            ],
            cwd=repository, env={**kept, **head.environment}, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
    assert submitted.returncode == 0, submitted.stdout[-3000:] + submitted.stderr[-3000:]
    assert "succeeded" in submitted.stdout
    (run,) = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db").search_runs(["1"])
    assert (run.info.run_name, run.info.status) == ("submitted", "FINISHED")
    assert run.data.params["training.steps"] == "20"
    assert run.info.run_id in submitted.stdout


def _disturbed(folder: Path, name: str, sent: signal.Signals, **cluster: Any) -> Config:
    """Train, and send one worker a signal as soon as the first checkpoint is there; it is gone at the end."""
    config = _config(folder, name, **cluster)
    with _sending(folder / "runs" / name / "checkpoints", sent) as sender:
        result = run_training(config)
        sender.join()
        assert sender.steps_before is not None
        assert sender.steps_before[-1] < STEPS
        assert sender.worker is not None
        assert not sender.worker.is_running()
    assert (result.steps, result.world_size) == (STEPS, 2)
    return config


class _Sender(threading.Thread):
    """Sends a training worker a signal as soon as the first checkpoint is there."""

    def __init__(self, checkpoints: Path, sent: signal.Signals) -> None:
        super().__init__(daemon=True)
        self._checkpoints, self._sent = checkpoints, sent
        self.worker: psutil.Process | None = None
        self.steps_before: list[int] | None = None

    def run(self) -> None:
        while not published_steps(self._checkpoints):
            time.sleep(0.01)
        workers = [process for process in psutil.Process().children(recursive=True) if _trains(process)]
        self.worker = max(workers, key=lambda process: process.pid)
        self.worker.send_signal(self._sent)
        self.steps_before = published_steps(self._checkpoints)


@contextmanager
def _sending(checkpoints: Path, sent: signal.Signals) -> Iterator[_Sender]:
    """Have a worker sent a signal; it does not outlive the block."""
    sender = _Sender(checkpoints, sent)
    sender.start()
    try:
        yield sender
    finally:
        if sender.worker is not None:
            with suppress(psutil.NoSuchProcess):
                sender.worker.kill()


def _trains(process: psutil.Process) -> bool:
    """Whether it is a training worker; a process that has just ended is none."""
    with suppress(psutil.NoSuchProcess):
        return "RayTrainWorker" in " ".join(process.cmdline())
    return False


def _config(folder: Path, name: str, **cluster: Any) -> Config:
    return small_config(
        folder,
        run={"name": name},
        cluster={"workers": 2, **cluster},
        training={
            "steps": STEPS,
            "warmup_steps": 3,
            "checkpoint_every": 10,
            "log_every": 7,
            "threads": 1,
            "precision": "fp32",
        },
    )


def _curve(folder: Path, name: str) -> list[dict[str, Any]]:
    """The loss curve without what depends on the clock."""
    lines = read_metrics(folder / "runs" / name / "metrics.jsonl")
    return [{key: value for key, value in line.items() if not key.startswith(_TIMES)} for line in lines]
