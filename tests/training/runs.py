"""Runs of the real trainer on a tiny model, for tests."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_world import small_config

from digseg.config import Config
from digseg.data.loader import Batch
from digseg.training.logging import RunLogger, read_metrics
from digseg.training.trainer import Trainer
from digseg.training.world import World

STEPS = 9
_TIMES = ("images_per_second", "step_time_", "data_wait_share", "tflops", "mfu", "memory_gb", "goodput", "ledger.")


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


def train_until_killed(config: Config, step: int, poisoned: Collection[int] = (), world: World | None = None) -> None:
    """Train, and lose the process when ``step`` steps were taken; for ``poisoned`` see :func:`train_poisoned`."""
    trainer = Trainer(config, world or World())
    _poison(trainer, poisoned)
    train_step = trainer.train_step

    def step_or_die(batch: Batch, number: int) -> dict[str, torch.Tensor]:
        if number == step:
            raise Killed
        return train_step(batch, number)

    trainer.train_step = step_or_die  # type: ignore[method-assign]
    with pytest.raises(Killed):
        trainer.train()
    trainer.engine.close()  # as what DeepSpeed changes in a process ends with it


def train_poisoned(
    config: Config,
    steps: Collection[int],
    logger: RunLogger | None = None,
    world: World | None = None,
    ranks: Collection[int] = (0,),
) -> str:
    """Train on batches whose last sample, on some ranks, has no finite loss at these steps; the key of the first, on
    such a rank."""
    world = world or World()
    trainer = Trainer(config, world, logger)
    keys = _poison(trainer, steps if world.rank in ranks else ())
    trainer.train()
    return keys.get(min(steps), "")


def _poison(trainer: Trainer, steps: Collection[int]) -> dict[int, str]:
    """Spoil samples of these steps; their keys, as they come."""
    train_step, keys = trainer.train_step, {}

    def poisoned_step(batch: Batch, step: int) -> dict[str, torch.Tensor]:
        if step in steps:
            keys[step] = batch.keys[-1]
            weights = batch.class_weights.clone()
            weights[-1] = math.nan
            batch = replace(batch, class_weights=weights)
        return train_step(batch, step)

    trainer.train_step = poisoned_step  # type: ignore[method-assign]
    return keys


def loss_curve(folder: Path, name: str) -> list[dict[str, Any]]:
    """The loss curve without what depends on the clock."""
    lines = read_metrics(folder / "runs" / name / "metrics.jsonl")
    return [{key: value for key, value in line.items() if not key.startswith(_TIMES)} for line in lines]
