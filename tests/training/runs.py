"""Runs of the real trainer on a tiny model, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_world import small_config

from digseg.config import Config
from digseg.training.logging import read_metrics
from digseg.training.trainer import Trainer
from digseg.training.world import World

STEPS = 9
_TIMES = ("images_per_second", "step_time_s", "data_wait_share", "goodput", "ledger.")


class Killed(BaseException):
    """Stands for the loss of the process."""


def run_config(folder: Path, name: str, sections: dict[str, dict[str, Any]] | None = None, **training: Any) -> Config:
    """A run of one process that logs at steps 1, 4, 8 and 9 and saves every third."""
    return small_config(
        folder,
        run={"name": name},
        cluster={"backend": "local"},
        training={
            "steps": STEPS,
            "warmup_steps": 3,
            "checkpoint_every": 3,
            "keep_checkpoints": 5,
            "log_every": 4,
            "threads": 1,
            "precision": "fp32",
            "micro_batch_size": 4,
            **training,
        },
        **(sections or {}),
    )


def train_until_killed(config: Config, step: int) -> None:
    """Train, and lose the process when ``step`` steps were taken."""
    trainer = Trainer(config, World())
    train_step = trainer.train_step

    def step_or_die(batch: Any, number: int) -> dict[str, torch.Tensor]:
        if number == step:
            raise Killed
        return train_step(batch, number)

    trainer.train_step = step_or_die  # type: ignore[method-assign]
    with pytest.raises(Killed):
        trainer.train()


def loss_curve(folder: Path, name: str) -> list[dict[str, Any]]:
    """The loss curve without what depends on the clock."""
    lines = read_metrics(folder / "runs" / name / "metrics.jsonl")
    return [{key: value for key, value in line.items() if not key.startswith(_TIMES)} for line in lines]
