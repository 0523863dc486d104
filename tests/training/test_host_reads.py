"""What a step reads on the host, which makes it wait for the device: in one process and in two."""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from runs import run_config
from small_world import write_squares

from digseg.config import Config
from digseg.training.trainer import Trainer
from digseg.training.world import World


@pytest.mark.parametrize("stage", range(4))
def test_no_step_outside_the_logging_interval_waits_for_the_device(tmp_path: Path, stage: int) -> None:
    write_squares(tmp_path / "shards", "train", 10)
    _assert_only_logged_steps_wait(stage, *_reads(World(), _config(tmp_path, stage)))


@pytest.mark.cluster
def test_no_step_of_two_ranks_outside_the_logging_interval_waits_for_the_device(tmp_path: Path) -> None:
    write_squares(tmp_path / "shards", "train", 10)
    run_ranks(_read_stages, 2, tmp_path, tmp_path)
    for stage in range(4):
        for rank in range(2):
            _assert_only_logged_steps_wait(stage, *json.loads((tmp_path / f"{stage}-{rank}.json").read_text()))


def test_offloading_reads_one_verdict_a_step_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_squares(tmp_path / "shards", "train", 10)
    config = run_config(tmp_path, "offloaded", steps=3, zero_stage=1, checkpoint_every=3, offload_optimizer=True)
    trainer = Trainer(config, World())
    reads = HostReads(monkeypatch)
    train_step = trainer.train_step

    def counted(batch: Any, step: int) -> dict[str, torch.Tensor]:
        reads.step = step + 1
        losses = train_step(batch, step)
        reads.step = 0
        return losses

    monkeypatch.setattr(trainer, "train_step", counted)
    trainer.train()
    assert reads.of_project == [(1, "cpu"), (2, "cpu"), (3, "cpu")]  # of two micro-batches each
    of_deepspeed = Counter(reads.of_deepspeed)
    parameters = sum(1 for _ in trainer.engine._deepspeed.module.parameters())
    assert of_deepspeed[3, "item"] == parameters + 1
    assert of_deepspeed[3, "__bool__"] == parameters + 2


class HostReads:
    """Notes the calls by which digseg and DeepSpeed, in the thread that trains, hand a tensor's values to the host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.step = 0
        self.of_project: list[tuple[int, str]] = []
        self.of_deepspeed: list[tuple[int, str]] = []
        for name in ("item", "cpu", "tolist", "numpy", "__float__", "__int__", "__bool__", "__index__", "nonzero"):
            monkeypatch.setattr(torch.Tensor, name, self._noting(name, getattr(torch.Tensor, name)))

    def _noting(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_globals["__name__"]
            if self.step and threading.current_thread() is threading.main_thread():
                if caller.startswith("digseg."):
                    self.of_project.append((self.step, name))
                elif caller.startswith("deepspeed."):
                    self.of_deepspeed.append((self.step, name))
            return original(tensor, *args, **kwargs)

        return call


def _config(folder: Path, stage: int) -> Config:
    return run_config(folder, f"async{stage}", steps=8, zero_stage=stage, checkpoint_every=8)


def _read_stages(world: World, folder: Path) -> None:
    for stage in range(4):
        reads = _reads(world, _config(folder, stage))
        (folder / f"{stage}-{world.rank}.json").write_text(json.dumps(reads))


def _reads(world: World, config: Config) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """What digseg and DeepSpeed read, from each step to the next."""
    trainer = Trainer(config, world)
    with pytest.MonkeyPatch.context() as patched:
        reads = HostReads(patched)
        train_step = trainer.train_step

        def counted(batch: Any, step: int) -> dict[str, torch.Tensor]:
            reads.step = step + 1
            return train_step(batch, step)

        patched.setattr(trainer, "train_step", counted)
        trainer.train()
    return reads.of_project, reads.of_deepspeed


def _assert_only_logged_steps_wait(
    stage: int, of_project: list[tuple[int, str]], of_deepspeed: list[tuple[int, str]]
) -> None:
    # Steps 1, 4 and 8 are logged, and the checkpoint follows step 8.
    assert {step for step, _ in of_project} == {1, 4, 8}
    assert {name for step, name in of_project if step < 8} <= {"tolist", "__float__"}
    # DeepSpeed's own, as docs/training.md says: what it asks of the gradient's norm.
    assert [name for step, name in of_deepspeed if step == 3] == ["__bool__"] * (0, 2, 2, 1)[stage]
