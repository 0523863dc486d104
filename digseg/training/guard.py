"""Losses that would spoil the weights: found on the device, left out, and undone where they come in numbers."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digseg.config.schema import GuardConfig
from digseg.errors import DigSegError
from digseg.training.files import write_whole
from digseg.training.world import World

_MEMORY = 50  # steps that the running mean of the loss looks back


@dataclass(frozen=True, slots=True)
class BadStep:
    """A step (0-based) that was left out, and the samples of all ranks in it."""

    step: int
    keys: tuple[str, ...]


class TooManyBadStepsError(Exception):
    """The guard wants the run to go back to a checkpoint from before these steps."""

    def __init__(self, steps: Sequence[BadStep]) -> None:
        super().__init__(f"{len(steps)} bad steps")
        self.steps = steps


class Guard:
    """Tells bad steps from good ones without making the host wait.

    A step is bad if its loss, averaged over all ranks, or its gradient is not finite, or if the loss is more
    than ``spike_ratio`` times its running mean. Every rank comes to the same verdict.
    """

    def __init__(self, config: GuardConfig, world: World) -> None:
        self._config, self._world = config, world
        self._mean = torch.zeros((), device=world.device)
        self._good = torch.zeros((), device=world.device)
        self._open: list[tuple[int, list[str], Tensor]] = []

    def judge(self, loss: Tensor) -> Tensor:
        """Whether a step of this loss (this rank's) must change no weight: a boolean scalar on the device."""
        loss = self._world.mean(loss.detach().float().clone())
        settled = self._good >= self._config.settle_steps
        bad = ~torch.isfinite(loss) | (settled & (loss > self._config.spike_ratio * self._mean))
        weight = torch.clamp(1.0 / (self._good + 1.0), min=1.0 / _MEMORY)
        self._mean = torch.where(bad, self._mean, torch.lerp(self._mean, loss, weight))
        self._good = self._good + (~bad).float()
        return bad

    def note(self, step: int, keys: list[str], bad: Tensor) -> None:
        """Keep the verdict on a step, and this rank's samples in it, until :meth:`close`."""
        self._open.append((step, keys, bad))

    def close(self) -> list[BadStep]:
        """The bad steps since the last call. Waits for the device.

        Raises:
            TooManyBadStepsError: there are ``bad_steps`` of them, or no good one.
        """
        noted, self._open = self._open, []
        if not noted:
            return []
        verdicts = torch.stack([bad for _, _, bad in noted]).tolist()
        found = []
        for (step, keys, _), bad in zip(noted, verdicts, strict=True):
            if bad:
                of_all = tuple(key for part in self._world.gather(keys) for key in part)
                found.append(BadStep(step, of_all))
        if len(found) >= self._config.bad_steps or (found and len(found) == len(noted)):
            raise TooManyBadStepsError(found)
        return found

    def state_dict(self) -> dict[str, Any]:
        """The running mean and the verdicts that were not closed, for a checkpoint."""
        return {"mean": self._mean, "good": self._good, "open": [list(noted) for noted in self._open]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the same rank of the same world."""
        self._load(state, [keys for _, keys, _ in state["open"]])

    def load_of_other_world(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on with what the ranks of another world size saved; rank 0 takes the samples of all."""
        samples = zip(*([keys for _, keys, _ in state["open"]] for state in states), strict=True)
        self._load(states[0], [[key for keys in step for key in keys if self._world.is_main] for step in samples])

    def _load(self, state: Mapping[str, Any], samples: Sequence[list[str]]) -> None:
        device = self._world.device
        self._mean, self._good = (state[name].to(device) for name in ("mean", "good"))
        verdicts = zip(state["open"], samples, strict=True)
        self._open = [(step, keys, bad.to(device)) for (step, _, bad), keys in verdicts]


class SkippedSteps:
    """The steps of a run whose samples its weights have not seen: ``skipped.json`` in its directory.

    A bad step is left out when it is taken. One that the run went back for is passed over from then on: every attempt
    at the run reads the file, so that it passes over the same steps wherever it starts.

    Args:
        writes: whether this process writes the file; one of them does.

    Raises:
        DigSegError: the file is damaged.
    """

    def __init__(self, path: Path, writes: bool = False) -> None:
        self._path, self._writes = path, writes
        try:
            entries = json.loads(path.read_bytes()) if path.exists() else []
            self._keys = {entry["step"]: list(entry["keys"]) for entry in entries}
            # An earlier version noted no others than those.
            self._passed_over = {entry["step"] for entry in entries if entry.get("passed_over", True)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DigSegError(
                f"{path} is unreadable ({error}); mend it, or delete it to take the steps again that it names"
            ) from error

    def __contains__(self, step: int) -> bool:
        """Whether the step is to be passed over."""
        return step in self._passed_over

    def count(self, steps: int) -> int:
        """How many of a run's first ``steps`` steps were left out or passed over."""
        return sum(step < steps for step in self._keys)

    def tag(self) -> str:
        """All of them for a run's tags, counted from 1 as in its metrics: ``5, 7``."""
        return textwrap.shorten(", ".join(str(step + 1) for step in sorted(self._keys)), 4000) or "none"

    def leave_out(self, steps: Sequence[BadStep]) -> None:
        """Note steps that were left out; one that is noted already, of which a run that goes on learns again, stays."""
        if any(bad.step not in self._keys for bad in steps):
            self._note(steps)

    def pass_over(self, steps: Sequence[BadStep]) -> None:
        """Pass over these steps from now on."""
        self._passed_over |= {bad.step for bad in steps}
        self._note(steps)

    def cut_after(self, steps: int) -> None:
        """Forget what was left out after the first ``steps`` steps: the run goes on from there and finds it again."""
        kept = {step: keys for step, keys in self._keys.items() if step < steps or step in self}
        if kept != self._keys:
            self._keys = kept
            self._write()

    def _note(self, steps: Sequence[BadStep]) -> None:
        self._keys |= {bad.step: list(bad.keys) for bad in steps}
        self._write()

    def _write(self) -> None:
        if self._writes:
            entries = [
                {"step": step, "keys": self._keys[step], "passed_over": step in self} for step in sorted(self._keys)
            ]
            write_whole(self._path, json.dumps(entries, indent=1) + "\n", durable=True)
