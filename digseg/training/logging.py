"""Where a run's figures go: the protocol a logger fulfils, and the run's own ``metrics.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, Literal, Protocol

from digseg.training.files import write_whole, writing

RunStatus = Literal["finished", "stopped", "failed"]


class RunLogger(Protocol):
    """A destination of a run's parameters and metrics. Only rank 0 owns one.

    ``start`` may be called several times in the life of a run (every restart of the training process calls
    it again); a logger that keeps state outside the process continues the same run then.
    """

    def start(self, config: Mapping[str, Any], dataset_digests: Mapping[str, str], facts: Mapping[str, str]) -> None:
        """Open or continue the run. ``config`` is the resolved configuration as plain JSON values,
        ``dataset_digests`` maps ``corpus/split`` to its manifest's digest, ``facts`` say what the run really uses
        (device, attention kernel)."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record figures of the window that ended with ``step`` (the number of optimizer steps taken).

        After a restart the figures up to the checkpoint come once more, before new ones; a logger leaves out
        the steps that it has.
        """

    def pictures(self, folder: Path) -> None:
        """Attach the picture files of ``folder`` that the run does not have yet; returns at once."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run, in place of former ones of the same name; returns at once."""

    def finish(self, status: RunStatus) -> None:
        """Close the run: ``finished`` once all steps are taken, ``stopped`` after a notice (it can be continued),
        ``failed`` when training raised."""


class NullLogger:
    """A logger that keeps nothing: for other ranks than 0, and for runs without tracking."""

    def start(self, config: Mapping[str, Any], dataset_digests: Mapping[str, str], facts: Mapping[str, str]) -> None:
        pass

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def pictures(self, folder: Path) -> None:
        pass

    def tags(self, values: Mapping[str, str]) -> None:
        pass

    def finish(self, status: RunStatus) -> None:
        pass


class MetricsFile:
    """The loss curve of a run as JSON lines ``{"step": s, name: value, ...}``, one line a logging window."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def cut_after(self, step: int) -> None:
        """Drop the lines of later steps than ``step``: the run goes on from there and will write them again.

        A last line that a killed process left unfinished is dropped too.
        """
        kept = [line for line in read_metrics(self._path) if line["step"] <= step]
        write_whole(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def complete(self, values: Mapping[str, float]) -> None:
        """Add to the last line what the run knows only at its end, in place of what it said of that before."""
        *lines, last = read_metrics(self._path)
        write_whole(self._path, "".join(json.dumps(line) + "\n" for line in [*lines, {**last, **values}]))

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Add the line of one logging window."""
        with writing(self._path), self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, less a last line never finished; none if it is missing."""
    if not path.exists():
        return []
    complete, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in complete.splitlines()]


def throughput_summary(lines: Iterable[Mapping[str, Any]]) -> str:
    """The speed of a run in one line, by the medians of its ``metrics.jsonl`` (without step 1, which pays for the
    start); empty where there is nothing to say."""
    timed = [line for line in lines if line.get("mfu")]
    timed = [line for line in timed if line["step"] > 1] or timed
    if not timed:
        return ""
    figure = {name: median(line[name] for line in timed) for name in timed[0] if name in _SUMMARISED}
    return (
        f"{figure['images_per_second']:.1f} images/s, {figure['step_time_p50_s']:.3f} s a step (95 %: "
        f"{figure['step_time_p95_s']:.3f} s), {figure['tflops']:.3f} TFLOP/s, {100 * figure['mfu']:.0f} % of the "
        f"device's peak, {100 * figure['data_wait_share']:.0f} % waiting for data, {figure['memory_gb']:.1f} GB"
    )


_SUMMARISED = {
    "images_per_second", "step_time_p50_s", "step_time_p95_s", "tflops", "mfu", "data_wait_share", "memory_gb",
}  # fmt: skip
