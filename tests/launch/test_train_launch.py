"""launch/train.py as a user starts it, in one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from small_world import small_config, write_squares

from digseg.config import dump_config


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    config = small_config(
        tmp_path, cluster={"backend": "local"}, training={"steps": 3, "threads": 1, "precision": "fp32"}
    )
    path = tmp_path / "small.yaml"
    path.write_text(dump_config(config))
    return path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of SQLAlchemy, by MLflow's store
def test_local_run_trains_without_ray_and_says_where_everything_is(
    config_file: Path, tmp_path: Path, repository: Path
) -> None:
    write_squares(tmp_path / "shards", "train", 8)
    program = (
        "import sys; from launch.train import main; main(sys.argv[1:]); "
        "assert 'ray' not in sys.modules, 'a local run imported Ray'"
    )
    command = [sys.executable, "-c", program, "--config", str(config_file), "run.name=alone"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db").search_runs(["1"])
    assert run.info.run_name == "alone"
    for expected in (str(tmp_path / "runs/alone"), run.info.run_id, "at step 3", "images/s"):
        assert expected in done.stdout


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.step=3", "training.step"),
        ("training.deepspeed={optimizer: {type: Adam}}", "training.deepspeed.optimizer: derived by DigSeg"),
        ("data.root=/nowhere", "/nowhere"),
    ],
)
def test_mistake_ends_with_its_message_and_exit_code_2(
    config_file: Path, tmp_path: Path, repository: Path, override: str, message: str
) -> None:
    write_squares(tmp_path / "shards", "train", 8)
    command = [sys.executable, "launch/train.py", "--config", str(config_file), override]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "runs").glob("*/checkpoints"))
