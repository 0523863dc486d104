"""What a user is told where a run ends because its workers were lost and none may be started anew."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from digseg.config import Config
from digseg.errors import DigSegError
from digseg.training.checkpoint import published_steps
from digseg.training.logging import read_metrics
from digseg.training.preemption import RunStoppedError
from digseg.training.run import RunDirectory


class ConnectionLostError(Exception):
    """Raised by a worker that waited in vain for another one, which is the one that was lost."""


def explanation(failures: Mapping[int, Exception], config: Config) -> DigSegError | None:
    """What was lost, how far the run is saved, and how it goes on.

    Args:
        failures: by rank, as :class:`ray.train.WorkerGroupError` has them.

    Returns:
        None where a worker failed by itself: that is a defect, and its traceback is needed.
    """
    losses = {rank: _loss(error, config) for rank, error in failures.items()}
    if not losses or None in losses.values():
        return None
    # What only follows from another loss is told where that one is not known.
    first = [rank for rank, error in failures.items() if not isinstance(error, ConnectionLostError)]
    told = "; ".join(f"the worker of rank {rank} {losses[rank]}" for rank in sorted(first or failures))
    return DigSegError(
        f"run {config.run.name!r} in {config.run.storage} has ended, as {told}; and no restart is left "
        f"(cluster.max_failures: {config.cluster.max_failures}). "
        f"{_saved(config, all(isinstance(error, RunStoppedError) for error in failures.values()))}"
    )


def _loss(error: Exception, config: Config) -> str | None:
    """What happened to a worker; None where it was not lost."""
    if isinstance(error, WorkerHealthCheckFailedError):
        return f"died{_place(error)}"
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return f"did not answer for {config.cluster.hang_timeout_s:g} s (cluster.hang_timeout_s){_place(error)}"
    if isinstance(error, RunStoppedError):
        return "saved and left, as its machine or another one was announced to be taken"
    return str(error) if isinstance(error, ConnectionLostError) else None


def _place(error: Exception) -> str:
    """Process and machine of a lost worker, which Ray only tells in words."""
    host, process = (re.search(pattern, str(error)) for pattern in (r"hostname='([^']*)'", r"\bpid=(\d+)"))
    return f" (process {process[1]} on {host[1]})" if host and process else ""


def _saved(config: Config, in_time: bool) -> str:
    """How far the run is saved, which is all of it where that was done ``in_time``."""
    directory = RunDirectory(config)
    steps, lines = published_steps(directory.checkpoints), read_metrics(directory.metrics)
    if not steps:
        return "It has no checkpoint yet: the same command again starts it from the beginning"
    last = lines[-1]["step"] if lines else 0
    ahead = f", although its loss curve went on to step {last}" if last > steps[-1] else ""
    lost = "" if in_time else f"; the steps after that are lost{ahead}"
    saved = f"It is saved up to step {steps[-1]} of {config.training.steps}{lost}"
    return f"{saved}. The same command again goes on from there"
