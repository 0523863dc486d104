"""Which samples each step took: a record for audits, one small file a rank, switched on by ``training.log_samples``.

::

    <run directory>/samples/rank-00000.jsonl    {"attempt": ..., "step": 7, "keys": ["camvid/train/0001", ...]}

Steps that were lost and taken again stand there more than once, with the attempts that took them; the last attempt's
are those that the weights have seen. Of the steps in ``skipped.json`` in the run's directory they have seen none; those
that are passed over stand here only with attempts from before the run went back.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from digseg.training.files import writing
from digseg.training.world import World


class SampleLog:
    """One rank's record. All ranks make one.

    Args:
        directory: of the records of all ranks.
    """

    def __init__(self, directory: Path, world: World) -> None:
        (self._attempt, *_) = world.gather(time.time_ns())
        self._path = directory / f"rank-{world.rank:05d}.jsonl"
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)

    def add(self, step: int, keys: Sequence[str]) -> None:
        """Note the samples of step ``step`` (0-based) of this rank."""
        line = json.dumps({"attempt": self._attempt, "step": step, "keys": list(keys)})
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def samples_of_steps(directory: Path) -> dict[int, list[str]]:
    """The samples of each step (0-based), over all ranks and sorted, as the last attempt at that step took them.

    A line that a kill cut short is left out.
    """
    attempts: defaultdict[int, defaultdict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(directory.glob("rank-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            attempts[entry["step"]][entry["attempt"]] += entry["keys"]
    return {step: sorted(taken[max(taken)]) for step, taken in sorted(attempts.items())}
