"""Where the wall time of a run went, over all its attempts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from digseg.training.files import write_whole

_CATEGORIES = ("productive", "start_up", "data_wait", "validation", "checkpoint", "export", "lost")
_REPEATED = ("productive", "data_wait", "validation")  # what is done again after a return to a checkpoint


class Ledger:
    """Seconds by category: ``ledger.json`` in the run's directory.

    Every second belongs to one category: the time since the last lap is what a lap counts. ``start_up`` runs
    from the submission, or after a loss from the last entry, to the first step; the steps that a loss takes
    with it are ``lost`` as far as they were entered, the rest of that time counts as start-up. ``export`` ends with
    the exported model.

    Args:
        submitted_at: when this attempt was asked for (Unix time, s).
        clock: Unix time in s.
    """

    def __init__(self, path: Path, submitted_at: float, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock
        saved = _saved(path)
        self._seconds = {name: saved.get("seconds", {}).get(name, 0.0) for name in _CATEGORIES}
        self._lap = max(submitted_at, saved.get("entered_at", 0.0))
        self._waited = 0.0

    def wait(self, seconds: float) -> None:
        """Take out of the current lap what was waited for data."""
        self._waited += seconds

    def lap(self, category: str) -> None:
        """Count the time since the last lap, less the waiting, as ``category``."""
        now = self._clock()
        self._seconds[category] += max(0.0, now - self._lap - self._waited)
        self._seconds["data_wait"] += self._waited
        self._lap, self._waited = now, 0.0

    def kept(self) -> dict[str, float]:
        """What is not lost once a checkpoint of now is published, for that checkpoint."""
        return {name: self._seconds[name] for name in _REPEATED}

    def lose(self, kept: Mapping[str, float]) -> None:
        """The run goes on from a checkpoint, with what it has kept (nothing where there is none): the rest is lost."""
        for name in _REPEATED:
            left = min(self._seconds[name], kept.get(name, 0.0))
            self._seconds["lost"] += self._seconds[name] - left
            self._seconds[name] = left

    def write(self) -> None:
        """Enter everything in the file."""
        entry = {"seconds": self._seconds, "entered_at": self._lap}
        write_whole(self._path, json.dumps(entry, indent=1) + "\n")

    def figures(self) -> dict[str, float]:
        """Seconds by category, and ``goodput``: the productive share of the whole."""
        whole = sum(self._seconds.values())
        goodput = self._seconds["productive"] / whole if whole else 0.0
        return {"goodput": goodput, **{f"ledger.{name}_s": seconds for name, seconds in self._seconds.items()}}


def _saved(path: Path) -> dict[str, Any]:
    """What was entered; nothing where the file is missing or damaged, for which no run should end."""
    try:
        saved = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return saved if isinstance(saved, dict) else {}


def ledger_summary(path: Path) -> str:
    """The ledger of a run in one line, ``productive 91 % of 812 s (start_up 20 s, ...)``."""
    seconds = json.loads(path.read_bytes())["seconds"]
    whole = sum(seconds.values())
    rest = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items() if name != "productive")
    return f"productive {100 * seconds['productive'] / max(whole, 1e-9):.0f} % of {whole:.0f} s ({rest})"
