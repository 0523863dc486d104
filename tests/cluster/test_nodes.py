"""Loss of whole nodes, and of the head: clusters of several `ray start` on this machine, taken away by SIGKILL."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow.tracking import MlflowClient
from ray_head import RayHead, kill_node, start_head, start_node
from small_world import small_config, write_squares

from digseg.config import Config, dump_config
from digseg.data.training_data import TrainingData
from digseg.registry.tracking import MlflowRun
from digseg.training.checkpoint import published_state, published_steps
from digseg.training.logging import read_metrics
from digseg.training.run import RunDirectory
from digseg.training.sample_log import samples_of_steps

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's store about SQLAlchemy's
]

CHANGE_TIMEOUT_S = 400
GLOBAL_BATCH = 4


def test_run_goes_on_when_a_node_is_lost_when_one_comes_and_when_it_is_announced_to_go(
    tmp_path: Path, repository: Path, environment: dict[str, str]
) -> None:
    config = _endless_config(tmp_path, workers=[1, 2], resize_interval_s=2)
    with ExitStack() as nodes:
        head = nodes.enter_context(start_head(tmp_path, environment, num_cpus=0))
        nodes.enter_context(start_node(tmp_path, head, environment))
        lost = nodes.enter_context(start_node(tmp_path, head, environment))
        with _submitted(config, tmp_path, repository, environment, head) as run:
            run.wait_until(lambda: run.world_size() == 2)
            kill_node(lost)
            run.wait_until(lambda: run.world_size() == 1)
            known = _node_ids(head, environment)
            nodes.enter_context(start_node(tmp_path, head, environment))
            run.wait_until(lambda: run.world_size() == 2)
            (added,) = _node_ids(head, environment) - known
            before = run.steps()[-1]
            _drain(head, environment, added)
            run.wait_until(lambda: run.world_size() == 1)
            run.stop()
    # The announcement was followed by a checkpoint of its own, which the run went on from.
    resumed = [int(step) for step in re.findall(r"run 'small' goes on after step (\d+)", run.output())]
    assert resumed[-1] >= before
    assert f"run 'small' was asked to stop and did, with a checkpoint after step {resumed[-1]};" in run.output()
    _check_steps_and_samples(config)


def test_run_submitted_again_after_the_head_was_lost_with_its_worker_and_after_it_was_lost_alone_goes_on(
    tmp_path: Path, repository: Path, environment: dict[str, str]
) -> None:
    config = _endless_config(tmp_path, workers=1)
    with start_head(tmp_path, environment) as head, _submitted(config, tmp_path, repository, environment, head) as run:
        run.wait_until(lambda: bool(run.steps()))
        # The job runs on the head's machine, and is gone with it.
        kill_node(head.process)
        run.process.kill()
    (saved,) = run.steps()[-1:]
    # By default Ray ends a node a minute after its head was lost, which on busy cores is before the next is there.
    patient = {**environment, "RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
    with ExitStack() as nodes:
        head = nodes.enter_context(start_head(tmp_path, environment, num_cpus=0))
        nodes.enter_context(start_node(tmp_path, head, patient))
        with _submitted(config, tmp_path, repository, environment, head) as run:
            run.wait_until(lambda: run.steps()[-1] > saved)
            assert f"run 'small' goes on after step {saved}" in run.output()
            kill_node(head.process)
            run.process.kill()
        # The worker lives on: the next submission waits for it, and goes on where it ends.
        worker = int(RunDirectory(config).trained.read_text().split()[1])
        (before,) = run.steps()[-1:]
        assert psutil.pid_exists(worker)
        head = nodes.enter_context(start_head(tmp_path, environment))
        with _submitted(config, tmp_path, repository, environment, head) as run:
            run.wait_until(lambda: "goes on after step" in run.output())
            assert f"is still being trained by process {worker} on" in run.output()
            (resumed,) = map(int, re.findall(r"run 'small' goes on after step (\d+)", run.output()))
            assert resumed > before
            run.wait_until(lambda: run.steps()[-1] > resumed)
            run.stop()
    logged = _check_steps_and_samples(config)
    tracked = MlflowRun(config)
    client = MlflowClient(tracked.tracking_uri)
    (found,) = client.search_runs([client.get_run(tracked.run_id).info.experiment_id])
    assert (found.info.run_id, found.info.status) == (tracked.run_id, "KILLED")
    assert [metric.step for metric in client.get_metric_history(tracked.run_id, "loss")] == logged


class _Submitted:
    """A started `launch/train.py`, what it has printed, and what its run has saved."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, checkpoints: Path) -> None:
        self.process, self._log, self._checkpoints = process, log, checkpoints

    def output(self) -> str:
        return self._log.read_text()

    def steps(self) -> list[int]:
        """Those of the checkpoints that are there."""
        return published_steps(self._checkpoints)

    def world_size(self) -> int:
        """Number of workers that saved the newest checkpoint; 0 where there is none."""
        return (published_state(self._checkpoints) or {"world_size": 0})["world_size"]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + CHANGE_TIMEOUT_S
        while not condition():
            assert self.process.poll() is None, self.output()[-4000:]
            assert time.monotonic() < deadline, self.output()[-4000:]
            time.sleep(0.1)

    def stop(self) -> None:
        """Have it save and end."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(CHANGE_TIMEOUT_S) == 143, self.output()[-4000:]
        assert f"with a checkpoint after step {self.steps()[-1]}; the same command goes on from there" in self.output()


@contextmanager
def _submitted(
    config: Config, folder: Path, repository: Path, environment: dict[str, str], head: RayHead
) -> Iterator[_Submitted]:
    (folder / "run.yaml").write_text(dump_config(config))
    log = folder / f"train-{head.process.pid}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "launch/train.py", "--config", str(folder / "run.yaml")],
            cwd=repository,
            env={**environment, **head.environment, "RAY_ADDRESS": head.address},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield _Submitted(process, log, RunDirectory(config).checkpoints)
    finally:
        process.kill()
        process.wait()


def _check_steps_and_samples(config: Config) -> list[int]:
    """Each step is in the loss curve once, and was taken with its own samples; the steps."""
    directory = RunDirectory(config)
    (last,) = published_steps(directory.checkpoints)[-1:]
    logged = [line["step"] for line in read_metrics(directory.metrics)]
    assert logged == [*range(1, last + 1)]
    data, taken = TrainingData(config.data, config.run.seed), samples_of_steps(directory.samples)
    for step in range(last):
        positions = range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
        assert taken[step] == sorted(sample.key for sample in data.samples(positions))
    return logged


def _node_ids(head: RayHead, environment: dict[str, str]) -> set[str]:
    """The nodes that are alive."""
    program = "import ray; ray.init(log_to_driver=False); print(*[n['NodeID'] for n in ray.nodes() if n['Alive']])"
    return set(_run(head, environment, sys.executable, "-c", program).split())


def _drain(head: RayHead, environment: dict[str, str], node: str) -> None:
    """Announce that a node goes away, as an autoscaler does when a spot machine is to be taken."""
    ray = str(Path(sys.executable).with_name("ray"))
    _run(
        head, environment, ray, "drain-node", f"--address={head.address}", f"--node-id={node}",
        "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=a test", "--deadline-remaining-seconds=600",
    )  # fmt: skip


def _run(head: RayHead, environment: dict[str, str], *command: str) -> str:
    variables = {**environment, **head.environment, "RAY_ADDRESS": head.address}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _endless_config(folder: Path, **cluster: Any) -> Config:
    """A run that does not end by itself while the test lasts, and notes its samples."""
    write_squares(folder / "shards", "train", 10)
    return small_config(
        folder,
        cluster=cluster,
        training={
            "steps": 1_000_000,
            "global_batch_size": GLOBAL_BATCH,
            "checkpoint_every": 10,
            "log_every": 1,
            "log_samples": True,
            "threads": 1,
            "precision": "fp32",
        },
    )


@pytest.fixture
def environment(repository: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "DIGSEG_"))}
    # Ray's workers are not last where other processes are busy; a lost node's place is given up sooner than by default.
    ray = {"RAY_worker_niceness": "0", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"}
    return {**kept, **ray, "PYTHONPATH": str(repository)}
