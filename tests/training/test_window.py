"""A logging window that moves to another device."""

from __future__ import annotations

import torch

from digseg.training.window import MetricsWindow


def test_losses_of_another_worlds_ranks_go_on_on_this_ones_device() -> None:
    saved = [{"losses": {"loss": torch.tensor(loss)}, "steps": 2} for loss in (1.0, 3.0)]
    window = MetricsWindow(torch.device("meta"))
    window.load_of_other_world(saved)
    assert window.state_dict()["losses"]["loss"].device.type == "meta"
    window = MetricsWindow(torch.device("cpu"))
    window.load_of_other_world(saved)
    assert window.state_dict() == {"losses": {"loss": torch.tensor(2.0)}, "steps": 2}
