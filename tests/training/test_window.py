"""A logging window that moves to another device, and one to which a run goes back."""

from __future__ import annotations

import pytest
import torch

from digseg.training import throughput
from digseg.training.window import MetricsWindow
from digseg.training.world import World


def test_losses_of_another_worlds_ranks_go_on_on_this_ones_device() -> None:
    saved = [{"losses": {"loss": torch.tensor(loss)}, "steps": 2} for loss in (1.0, 3.0)]
    window = MetricsWindow(torch.device("meta"))
    window.load_of_other_world(saved)
    assert window.state_dict()["losses"]["loss"].device.type == "meta"
    window = MetricsWindow(torch.device("cpu"))
    window.load_of_other_world(saved)
    assert window.state_dict() == {"losses": {"loss": torch.tensor(2.0)}, "steps": 2}


def test_times_of_steps_that_were_undone_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now)
    window = MetricsWindow(torch.device("cpu"))
    saved = window.state_dict()
    for seconds in (50.0, 2.0):
        window.load_state_dict(saved)  # before the second step: a rollback
        now += seconds
        window.add({"loss": torch.tensor(1.0)}, torch.tensor(False), 0.0)
    figures = window.close(World(), global_batch_size=4)
    assert (figures["step_time_p50_s"], figures["step_time_p95_s"], figures["step_time_s"]) == (2.0, 2.0, 2.0)
