"""The figures of a logging window, gathered without making the host wait for the device."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from digseg.training.throughput import StepClock
from digseg.training.world import World

_LEFT_OUT = "steps_left_out"


class MetricsWindow:
    """Sums over the steps since figures were last logged.

    Losses stay tensors until :meth:`close`, which is the only place that waits for the device. The sums
    belong to the checkpoint, so that a curve is the same whether or not the run was interrupted inside a
    window; the times do not.

    Args:
        device: where the losses are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._losses: dict[str, Tensor] = {}
        self._steps = 0
        self._restart_clock()

    @property
    def is_empty(self) -> bool:
        """Whether no step was counted yet."""
        return self._steps == 0

    def add(self, losses: Mapping[str, Tensor], left_out: Tensor, data_wait_s: float) -> None:
        """Count one step with its losses (scalars) and the time it waited for data.

        The losses of a step that was left out (a boolean scalar on the device) do not count.
        """
        figures = {name: torch.where(left_out, 0.0, loss) for name, loss in losses.items()}
        for name, figure in {**figures, _LEFT_OUT: left_out.float()}.items():
            self._losses[name] = self._losses[name] + figure if name in self._losses else figure
        self._steps += 1
        self._timed_steps += 1
        self._clock.step()
        self._data_wait_s += data_wait_s

    def leave_out(self, seconds: float) -> None:
        """Take time that was not training (a checkpoint) out of the window."""
        self._start += seconds
        self._clock.start()

    def close(self, world: World, global_batch_size: int) -> dict[str, float]:
        """Mean losses over the window's steps and all ranks, and this rank's rates; starts a new window.

        The losses are NaN where all steps were left out; rate and step time are 0 where the steps were all taken
        before the run was interrupted.
        """
        names = sorted(self._losses.keys() - {_LEFT_OUT})
        sums = world.mean(torch.stack([self._losses[name].float() for name in (*names, _LEFT_OUT)]))
        *means, left_out = torch.cat([sums[:-1] / (self._steps - sums[-1]), sums[-1:]]).tolist()
        elapsed_s = time.perf_counter() - self._start
        figures = dict(zip(names, means, strict=True))
        figures[_LEFT_OUT] = left_out
        figures["images_per_second"] = global_batch_size * self._timed_steps / elapsed_s
        figures["step_time_s"] = elapsed_s / self._timed_steps if self._timed_steps else 0.0
        figures["data_wait_share"] = self._data_wait_s / elapsed_s
        figures |= self._clock.percentiles()
        self._losses, self._steps = {}, 0
        self._restart_clock()
        return figures

    def state_dict(self) -> dict[str, Any]:
        """The open window's sums, for a checkpoint."""
        return {"losses": dict(self._losses), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a saved window; its clock starts now."""
        self._losses = {name: loss.to(self._device) for name, loss in state["losses"].items()}
        self._steps = state["steps"]
        self._restart_clock()

    def load_of_other_world(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on with the windows that the ranks of another world size saved: each rank takes their mean."""
        losses = {
            name: torch.stack([state["losses"][name] for state in states]).mean(0) for name in states[0]["losses"]
        }
        self.load_state_dict({"losses": losses, "steps": states[0]["steps"]})

    def _restart_clock(self) -> None:
        self._start = time.perf_counter()
        self._clock = StepClock(self._device)
        self._timed_steps = 0
        self._data_wait_s = 0.0
