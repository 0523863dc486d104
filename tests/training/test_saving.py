"""Checkpoints written while training goes on: the order of things, errors, and copies that training does not change."""

from __future__ import annotations

import errno
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from runs import STEPS, loss_curve, run_config
from small_world import write_squares

from digseg.errors import DigSegError
from digseg.training import state
from digseg.training.checkpoint import CheckpointStore, published_steps
from digseg.training.saving import BackgroundSaver, host_copy, write_files
from digseg.training.trainer import Trainer
from digseg.training.world import World

LONG_S = 120.0


def test_save_goes_on_in_the_background_and_the_next_one_waits_for_it(tmp_path: Path) -> None:
    begun, free = threading.Event(), threading.Event()

    def slow(directory: Path) -> None:
        begun.set()
        assert free.wait(LONG_S)
        (directory / "file").write_bytes(b"slow")

    with BackgroundSaver(CheckpointStore(tmp_path, World(), keep=5)) as saver:
        assert saver.wait() is None
        saver.start(1, slow, {})
        assert begun.wait(LONG_S)
        saver.check()
        assert published_steps(tmp_path) == []
        threading.Timer(0.05, free.set).start()
        saver.start(2, lambda directory: None, {"note": "two"})
        assert published_steps(tmp_path)[0] == 1
        second = saver.wait()
    assert second is not None
    assert (second.step, second.state["note"]) == (2, "two")


def test_save_that_fails_raises_at_the_next_look(tmp_path: Path) -> None:
    def full(directory: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    saver = BackgroundSaver(CheckpointStore(tmp_path, World(), keep=5))
    with saver:
        saver.start(3, full, {})
    for look in (saver.check, saver.wait, lambda: saver.start(4, full, {})):
        with pytest.raises(DigSegError, match=r"step 3 cannot be written .*No space left"):
            look()


def test_save_under_way_is_finished_where_training_ends_with_an_error(tmp_path: Path) -> None:
    free = threading.Event()
    saver = BackgroundSaver(CheckpointStore(tmp_path, World(), keep=5))

    def fail() -> None:
        with saver:
            saver.start(1, lambda directory: free.wait(LONG_S) and None, {})
            threading.Timer(0.05, free.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert published_steps(tmp_path) == [1]


def test_copy_of_a_state_is_not_changed_with_it(tmp_path: Path) -> None:
    weight = torch.arange(6.0)
    whole = {"a": [weight[2:4], (weight[:1], "text")], "b": OrderedDict(c=weight, d=torch.Size([2])), "e": {1, 2}}
    copied = host_copy(whole)
    weight += 100
    whole["e"].add(3)  # type: ignore[attr-defined]
    assert copied["a"][0].tolist() == [2, 3]
    assert copied["a"][1][0].tolist() == [0]
    assert copied["b"]["c"].tolist() == [0, 1, 2, 3, 4, 5]
    assert (type(copied["b"]), copied["b"]["d"], copied["e"]) == (OrderedDict, torch.Size([2]), {1, 2})
    write_files({"a/b.pt": copied["a"][0]}, tmp_path)
    assert torch.load(tmp_path / "a/b.pt", weights_only=True).tolist() == [2, 3]


@pytest.mark.cluster
def test_two_ranks_save_together_while_they_talk_of_other_things(tmp_path: Path) -> None:
    run_ranks(_save_while_talking, 2, tmp_path, tmp_path)
    newest = CheckpointStore(tmp_path / "checkpoints", World(), keep=5).newest_intact()
    assert newest is not None
    assert newest.step == 3
    assert sorted(path.name for path in newest.path.iterdir()) == ["0.pt", "1.pt", "manifest.json", "state.json"]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    write_squares(tmp_path / "shards", "train", 10)
    Trainer(run_config(tmp_path, "plain", zero_stage=stage), World()).train()
    trainer = Trainer(run_config(tmp_path, "held-up", zero_stage=stage), World())
    train_step, two_more = trainer.train_step, threading.Event()
    taken_when_written = []

    def step(batch: Any, number: int) -> dict[str, torch.Tensor]:
        if number == 5:
            two_more.set()
        return train_step(batch, number)

    def held_up(files: Any, directory: Path) -> None:
        if "00000003" in directory.name:
            assert two_more.wait(LONG_S)
            taken_when_written.append(3)
        write_files(files, directory)

    monkeypatch.setattr(trainer, "train_step", step)
    monkeypatch.setattr(state, "write_files", held_up)
    trainer.train()
    assert taken_when_written == [3]
    assert loss_curve(tmp_path, "held-up") == loss_curve(tmp_path, "plain")
    for step_number in (3, STEPS):
        files = [
            tmp_path / f"runs/{name}/checkpoints/step-{step_number:08d}/rank-00000.pt" for name in ("plain", "held-up")
        ]
        plain, other = (torch.load(file, weights_only=True) for file in files)
        for name, share in plain["weights"]["shares"].items():
            assert torch.equal(share["values"], other["weights"]["shares"][name]["values"])


def test_disk_that_is_full_ends_the_run_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_squares(tmp_path / "shards", "train", 10)

    def full(files: Any, directory: Path) -> None:
        if "00000006" in directory.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_files(files, directory)

    monkeypatch.setattr(state, "write_files", full)
    with pytest.raises(DigSegError, match=r"step 6 cannot be written to .*goes on from step 3"):
        Trainer(run_config(tmp_path, "full"), World()).train()
    assert published_steps(tmp_path / "runs/full/checkpoints") == [3]


def _save_while_talking(world: World, folder: Path) -> None:
    with BackgroundSaver(CheckpointStore(folder / "checkpoints", world.apart(), keep=2)) as saver:
        for step in (1, 2, 3):
            saver.start(step, lambda directory: (directory / f"{world.rank}.pt").write_bytes(bytes(1000)) and None, {})
            for number in range(20):
                assert world.sum(torch.tensor([float(number)])).item() == 2 * number
        assert saver.wait() is not None
