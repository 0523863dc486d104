"""The ledger over losses and restarts, by a clock of the test's own, and of runs of the trainer."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from runs import run_config, train_until_killed
from small_world import write_squares

from digseg.training.ledger import Ledger, ledger_summary
from digseg.training.locks import exclusive
from digseg.training.logging import read_metrics
from digseg.training.trainer import Trainer
from digseg.training.world import World

UNCOUNTED_S = 1.0  # at most: before the run is held, and between its last entry and its return


class Clock:
    """A clock that goes when it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def go(self, seconds: float) -> None:
        self.now += seconds


def test_every_second_since_the_submission_is_in_one_category(tmp_path: Path) -> None:
    clock = Clock()
    ledger = Ledger(tmp_path / "ledger.json", submitted_at=990.0, clock=clock)
    clock.go(5)
    ledger.lap("start_up")
    clock.go(40)
    ledger.wait(10)
    ledger.lap("productive")
    clock.go(3)
    ledger.lap("checkpoint")
    clock.go(2)
    ledger.lap("validation")
    assert ledger.figures() == {
        "goodput": pytest.approx(30 / 60),
        "ledger.productive_s": 30,
        "ledger.start_up_s": 15,
        "ledger.data_wait_s": 10,
        "ledger.validation_s": 2,
        "ledger.checkpoint_s": 3,
        "ledger.export_s": 0,
        "ledger.lost_s": 0,
    }
    ledger.write()
    assert ledger_summary(tmp_path / "ledger.json").startswith("productive 50 % of 60 s (start_up 15 s, data_wait 10 s")


def test_work_since_the_checkpoint_is_lost_with_the_process(tmp_path: Path) -> None:
    clock = Clock()
    ledger = Ledger(tmp_path / "ledger.json", submitted_at=1000.0, clock=clock)
    for seconds in (20, 30):
        clock.go(seconds)
        ledger.wait(5)
        ledger.lap("productive")
        if seconds == 20:
            kept = ledger.kept()
    ledger.write()
    clock.go(7)  # steps that nobody entered, the loss, and the way back
    restarted = Ledger(tmp_path / "ledger.json", submitted_at=1000.0, clock=clock)
    restarted.lap("start_up")
    restarted.lose(kept)
    figures = restarted.figures()
    assert (figures["ledger.productive_s"], figures["ledger.data_wait_s"]) == (15, 5)
    assert (figures["ledger.lost_s"], figures["ledger.start_up_s"]) == (30, 7)
    assert sum(value for name, value in figures.items() if name != "goodput") == clock.now - 1000


def test_damaged_ledger_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "ledger.json").write_text('{"seconds": {"productive": 4')
    clock = Clock()
    ledger = Ledger(tmp_path / "ledger.json", submitted_at=990.0, clock=clock)
    ledger.lap("start_up")
    assert ledger.figures()["ledger.start_up_s"] == 10


def test_time_between_two_submissions_is_nobodys(tmp_path: Path) -> None:
    clock = Clock()
    first = Ledger(tmp_path / "ledger.json", submitted_at=1000.0, clock=clock)
    clock.go(10)
    first.lap("productive")
    first.write()
    clock.go(86400)
    second = Ledger(tmp_path / "ledger.json", submitted_at=clock.now, clock=clock)
    clock.go(4)
    second.lap("start_up")
    assert second.figures()["goodput"] == pytest.approx(10 / 14)


def test_categories_of_a_run_that_was_lost_once_sum_to_its_wall_time(tmp_path: Path) -> None:
    write_squares(tmp_path / "shards", "train", 10)
    config = run_config(tmp_path, "lost")
    began = time.time()
    with exclusive(config):  # one submission, as Ray's driver holds a run whose workers it starts anew
        train_until_killed(config, 5)
        Trainer(config, World()).train()
    whole = time.time() - began
    run = tmp_path / "runs/lost"
    ledger = json.loads((run / "ledger.json").read_bytes())
    seconds = ledger["seconds"]
    assert sum(seconds.values()) == pytest.approx(ledger["entered_at"] - (run / "lock").stat().st_mtime)
    assert whole - UNCOUNTED_S < sum(seconds.values()) < whole + 0.01  # a file's time may lag by a tick
    # Step 4 was logged, and taken again after the checkpoint of step 3.
    assert all(seconds[name] > 0 for name in ("productive", "start_up", "data_wait", "checkpoint", "export", "lost"))
    written = max(file.stat().st_mtime for file in (run / "model").rglob("*") if file.is_file())
    assert ledger["entered_at"] >= written
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert {name: last[f"ledger.{name}_s"] for name in seconds} == seconds
    assert last["goodput"] == seconds["productive"] / sum(seconds.values())
