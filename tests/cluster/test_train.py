"""Training under Ray: the loss of a worker, errors of the user in a worker, and a submitted job."""

from __future__ import annotations

import json
import os
import re
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
from digseg.training.run import RunDirectory

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
    config = _config(folder, "killed")
    wall_s = _disturbed(config, signal.SIGKILL)
    assert _curve(folder, "killed") == undisturbed
    _check_mlflow_run(config)
    _check_ledger(config, wall_s)


def test_run_that_loses_a_worker_with_no_restart_left_says_so_and_goes_on_when_submitted_again(
    undisturbed: list[dict[str, Any]], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = _config(folder, "lost", max_failures=0)
    with _sending(config, signal.SIGKILL, main=True) as sender, pytest.raises(DigSegError) as raised:
        run_training(config)
    assert sender.worker is not None
    (saved,) = published_steps(RunDirectory(config).checkpoints)[-1:]
    assert f"the worker of rank 0 died (process {sender.worker.pid} on" in str(raised.value)
    assert "no restart is left (cluster.max_failures: 0). " in str(raised.value)
    assert f"saved up to step {saved} of {STEPS}; the steps after that are lost" in str(raised.value)
    assert "The same command again goes on from there" in str(raised.value)
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out + printed.err
    run = MlflowRun(config)
    assert MlflowClient(run.tracking_uri).get_run(run.run_id).info.status == "FAILED"
    assert run_training(config).steps == STEPS
    assert f"run 'lost' goes on after step {saved}" in capfd.readouterr().out
    assert _curve(folder, "lost") == undisturbed
    _check_mlflow_run(config)


def test_finished_run_submitted_again_says_so_and_does_nothing(
    undisturbed: list[dict[str, Any]], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = _config(folder, "undisturbed")
    before = _all_of(config)
    capfd.readouterr()
    assert run_training(config) == RunDirectory(config).result()
    assert capfd.readouterr() == (f"run 'undisturbed' is finished: all {STEPS} steps are taken\n", "")
    assert not any(_trains(process) for process in psutil.Process().children(recursive=True))
    assert _all_of(config) == before


def test_worker_told_that_its_machine_goes_away_has_all_save_and_nothing_is_lost(
    undisturbed: list[dict[str, Any]], folder: Path
) -> None:
    _disturbed(_config(folder, "noticed"), signal.SIGTERM)
    assert _curve(folder, "noticed") == undisturbed
    ledger = json.loads((folder / "runs/noticed/ledger.json").read_bytes())
    assert ledger["seconds"]["lost"] == 0


def test_worker_that_hangs_is_ended_and_the_run_ends_as_the_undisturbed_one(
    undisturbed: list[dict[str, Any]], folder: Path
) -> None:
    _disturbed(_config(folder, "hung", hang_timeout_s=HANG_TIMEOUT_S), signal.SIGSTOP, main=True)
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
    assert re.search(r"time: +productive \d+ % of \d+ s \(start_up \d+ s, .*lost 0 s\)", submitted.stdout)


def _disturbed(config: Config, sent: signal.Signals, main: bool = False) -> float:
    """Train, and send a worker a signal meanwhile; it is gone at the end. The seconds that it took."""
    began = time.time()
    with _sending(config, sent, main) as sender:
        result = run_training(config)
        wall_s = time.time() - began
        sender.join()
        assert sender.steps_before is not None
        assert sender.steps_before[-1] < STEPS
        assert sender.worker is not None
        assert not sender.worker.is_running()
    assert (result.steps, result.world_size) == (STEPS, 2)
    return wall_s


class _Sender(threading.Thread):
    """Sends a training worker, rank 0's or the other, a signal as soon as steps after the first checkpoint are in the
    loss curve."""

    def __init__(self, config: Config, sent: signal.Signals, main: bool) -> None:
        super().__init__(daemon=True)
        self._directory, self._sent, self._main = RunDirectory(config), sent, main
        self.worker: psutil.Process | None = None
        self.steps_before: list[int] | None = None

    def run(self) -> None:
        while not self._is_time():
            time.sleep(0.01)
        main = int(self._directory.trained.read_text().split()[1])
        workers = [process for process in psutil.Process().children(recursive=True) if _trains(process)]
        (self.worker,) = (process for process in workers if (process.pid == main) == self._main)
        self.worker.send_signal(self._sent)
        self.steps_before = published_steps(self._directory.checkpoints)

    def _is_time(self) -> bool:
        saved, logged = published_steps(self._directory.checkpoints), read_metrics(self._directory.metrics)
        return bool(saved) and logged[-1]["step"] > saved[-1]


@contextmanager
def _sending(config: Config, sent: signal.Signals, main: bool) -> Iterator[_Sender]:
    """Have a worker sent a signal; it does not outlive the block."""
    sender = _Sender(config, sent, main)
    sender.start()
    try:
        yield sender
    finally:
        if sender.worker is not None:
            with suppress(psutil.NoSuchProcess):
                sender.worker.kill()


def _all_of(config: Config) -> tuple[dict[Path, tuple[int, bytes]], dict[str, Any]]:
    """All files of a run with the time of their last change, and the run in MLflow."""
    files = (path for path in RunDirectory(config).path.rglob("*") if path.is_file())
    run = MlflowRun(config)
    tracked = MlflowClient(run.tracking_uri).get_run(run.run_id).to_dictionary()
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}, tracked


def _check_mlflow_run(config: Config) -> None:
    """One run in MLflow, with each figure once."""
    run = MlflowRun(config)
    client = MlflowClient(run.tracking_uri)
    found = client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    named = client.search_runs([found.info.experiment_id], f"attributes.run_name = '{config.run.name}'")
    assert [other.info.run_id for other in named] == [run.run_id]
    logged = [metric.step for metric in client.get_metric_history(run.run_id, "loss")]
    assert logged == [line["step"] for line in read_metrics(RunDirectory(config).metrics)]


def _check_ledger(config: Config, wall_s: float) -> None:
    """The ledger of a run that lost steps accounts for the time from its submission to its end."""
    directory = RunDirectory(config)
    seconds = json.loads(directory.ledger.read_bytes())["seconds"]
    assert seconds["lost"] > 0
    # What is not in it is the end of the workers.
    assert sum(seconds.values()) == pytest.approx(wall_s, abs=3)
    last = read_metrics(directory.metrics)[-1]
    figures = {name: value for name, value in last.items() if name.startswith(("goodput", "ledger."))}
    assert figures.keys() == {"goodput", *(f"ledger.{name}_s" for name in seconds)}
    run = MlflowRun(config)
    logged = MlflowClient(run.tracking_uri).get_run(run.run_id).data.metrics
    assert figures.items() <= logged.items()


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
            "checkpoint_every": 20,
            "log_every": 7,
            "threads": 1,
            "precision": "fp32",
        },
    )


def _curve(folder: Path, name: str) -> list[dict[str, Any]]:
    """The loss curve without what depends on the clock."""
    lines = read_metrics(folder / "runs" / name / "metrics.jsonl")
    return [{key: value for key, value in line.items() if not key.startswith(_TIMES)} for line in lines]
