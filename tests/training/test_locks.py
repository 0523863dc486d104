"""One training of a run at a time, with processes that hold it and are lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from runs import run_config, train_until_killed
from small_world import write_squares

from digseg.config import Config, dump_config
from digseg.errors import DigSegError
from digseg.training.checkpoint import published_steps
from digseg.training.locks import exclusive, training_alone
from digseg.training.run import RunDirectory

# A worker that outlives its driver: it trains, and has not submitted.
_WORKER = """
import sys, yaml
from digseg.config import Config
from digseg.training.trainer import Trainer
from digseg.training.world import World
Trainer(Config.model_validate(yaml.safe_load(open(sys.argv[1]))), World(), show_progress=False).train()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_squares(folder / "shards", "train", 10)
    return folder


def test_second_process_with_a_run_of_the_same_name_is_refused(folder: Path) -> None:
    config = run_config(folder, "held")
    with (
        exclusive(config),
        pytest.raises(DigSegError, match=rf"'held' .* is being trained by process {os.getpid()} on"),
        exclusive(config),
    ):
        pass
    with exclusive(config):
        pass
    lock = folder / "runs/held/lock"
    lock.unlink()
    lock.mkdir()
    with pytest.raises(DigSegError, match=r"held/lock cannot be written and locked: Is a directory"), exclusive(config):
        pass


def test_worker_left_behind_by_another_submission_is_waited_for_and_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config(folder, "left", steps=1_000_000)
    directory = RunDirectory(config)
    with _left_behind(config) as worker:
        named = rf"'left' in .* is still being trained by process {worker.pid} on \S+"
        refused = rf"{named}, a worker of an earlier submission, which did not end within 0\.5 s; end that process"
        with pytest.raises(DigSegError, match=refused), exclusive(config, patience_s=0.5):
            pass
        # It was asked to end, by the file that workers look for.
        assert directory.stop.exists()
        capsys.readouterr()
        threading.Timer(0.5, worker.send_signal, [signal.SIGKILL]).start()
        with exclusive(config):
            assert not directory.stop.exists()
            assert worker.wait(timeout=60) == -signal.SIGKILL
            (told,) = capsys.readouterr().out.splitlines()
            assert f"is still being trained by process {worker.pid} on" in told
            # Whoever holds the submission may train at once.
            with training_alone(config, patience_s=0):
                pass


def test_training_that_ended_by_an_error_leaves_its_run_to_others(folder: Path) -> None:
    config = run_config(folder, "failed")
    train_until_killed(config, step=2)
    with training_alone(config, patience_s=0):
        pass


@contextmanager
def _left_behind(config: Config) -> Iterator[subprocess.Popen[bytes]]:
    """A process that trains the run, with the first checkpoint there."""
    path = Path(config.run.storage).parent / "left.yaml"
    path.write_text(dump_config(config))
    process = subprocess.Popen([sys.executable, "-c", _WORKER, str(path)], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not published_steps(RunDirectory(config).checkpoints):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()
