"""Notices to stop, as real signals to real processes: one checkpoint on all ranks, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from small_world import small_config, write_squares

from digseg.config import Config, dump_config
from digseg.training.checkpoint import published_steps
from digseg.training.logging import read_metrics
from digseg.training.preemption import Notice, RunStoppedError, StopAgreement, listening
from digseg.training.trainer import Trainer
from digseg.training.world import World

pytestmark = pytest.mark.cluster

STEPS = 9
NOTICED = 4  # the step (0-based) in which the signal comes
START_TIMEOUT_S, END_TIMEOUT_S = 240, 120


def test_signal_to_one_rank_stops_all_after_the_next_step_and_nothing_is_lost(tmp_path: Path) -> None:
    write_squares(tmp_path / "shards", "train", 10)
    run_ranks(_train_whole_and_stopped, 2, tmp_path, tmp_path)
    assert _curve(tmp_path, "stopped") == _curve(tmp_path, "whole")
    ledger = json.loads((tmp_path / "runs/stopped/ledger.json").read_bytes())
    assert ledger["seconds"]["lost"] == 0
    assert ledger["seconds"]["productive"] > 0


def _train_whole_and_stopped(world: World, folder: Path) -> None:
    Trainer(_config(folder, "whole"), world).train()
    stopped = Trainer(_config(folder, "stopped"), world, logger := _Statuses())
    train_step = stopped.train_step

    def noticed_step(batch: Any, step: int) -> dict[str, torch.Tensor]:
        if step == NOTICED and world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(batch, step)

    stopped.train_step = noticed_step  # type: ignore[method-assign]
    with listening(Notice.END), pytest.raises(RunStoppedError, match=rf"'stopped' .* after step {NOTICED + 2};"):
        stopped.train()
    assert logger.statuses == (["stopped"] if world.is_main else [])
    assert published_steps(folder / "runs/stopped/checkpoints") == [NOTICED + 2]
    again = Trainer(_config(folder, "stopped"), world, logger)
    assert again.train().steps == STEPS


@pytest.mark.parametrize("launcher", ["alone", "torchrun"])
def test_terminated_program_saves_says_so_and_ends(tmp_path: Path, repository: Path, launcher: str) -> None:
    write_squares(tmp_path / "shards", "train", 10)
    config = _config(tmp_path, launcher, steps=1_000_000, log_every=1, checkpoint_every=1_000_000)
    config_file = tmp_path / "run.yaml"
    config_file.write_text(dump_config(config))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, "launch/train.py", "--config", str(config_file)]
    process = subprocess.Popen(
        [sys.executable, *torchrun, *command[1:]] if launcher == "torchrun" else command,
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not read_metrics(tmp_path / f"runs/{launcher}/metrics.jsonl"):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if launcher == "alone":
            second = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=240, check=False)
            assert (second.returncode, process.poll()) == (2, None), second.stderr
            assert f"run 'alone' in {tmp_path / 'runs'} is being trained by process {process.pid} on" in second.stderr
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=END_TIMEOUT_S)
    finally:
        process.kill()
    (saved,) = published_steps(tmp_path / f"runs/{launcher}/checkpoints")
    assert f"run {launcher!r} was asked to stop and did, with a checkpoint after step {saved};" in output, errors
    if launcher == "alone":
        assert process.returncode == 143
        assert "Traceback" not in errors


def test_ranks_agree_on_the_largest_notice_of_the_same_step(tmp_path: Path) -> None:
    run_ranks(_agree, 3, tmp_path)


def _agree(world: World) -> None:
    agreement = StopAgreement(world)
    answers = []
    with listening((Notice.NONE, Notice.LEAVE, Notice.END)[world.rank]):
        for step in range(4):
            if step == world.rank:  # rank 1 in step 1, rank 2 in step 2
                os.kill(os.getpid(), signal.SIGTERM)
            agreement.ask()
            answers.append(agreement.answer())
    assert answers == [Notice.NONE, Notice.LEAVE, Notice.END, Notice.END]


class _Statuses:
    """A run logger that keeps how runs ended."""

    def __init__(self) -> None:
        self.statuses: list[str] = []

    def start(self, config: Mapping[str, Any], dataset_digests: Mapping[str, str], facts: Mapping[str, str]) -> None:
        pass

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def finish(self, status: str) -> None:
        self.statuses.append(status)


def _config(folder: Path, name: str, **training: Any) -> Config:
    return small_config(
        folder,
        run={"name": name},
        cluster={"backend": "local"},
        tracking={"enabled": False},
        training={
            "steps": STEPS,
            "warmup_steps": 3,
            "checkpoint_every": 100,
            "log_every": 4,
            "threads": 1,
            "precision": "fp32",
            "micro_batch_size": 4,
            **training,
        },
    )


def _curve(folder: Path, name: str) -> list[tuple[int, float, float]]:
    lines = read_metrics(folder / "runs" / name / "metrics.jsonl")
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in lines]
