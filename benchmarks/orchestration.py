"""What starting, saving and losing workers cost under Ray, in seconds.

Runs of ``launch/train.py`` with two Ray workers on this machine, a small model:

- submit to first step: from the start of the command until step 1 is in the loss curve, with the shards at hand;
- checkpoint stall: what the ledger counts for checkpoints, by save;
- kill to next step: from SIGKILL of a worker until all workers have started anew and taken their first step, which is
  the one after the last checkpoint;
- notice to next step: the same from SIGTERM to a worker, on which all save before they start anew, and what is lost;
- hang to next step: the same from SIGSTOP of a worker, with a ``cluster.hang_timeout_s`` of 20 s (default: 600);
- goodput: the ledger's, of a run whose worker is killed every ``--kill-every`` seconds.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from shared import ROOT, add_json, configured, report, small_run

from digseg.config import Config, dump_config
from digseg.console import say
from digseg.errors import run_main
from digseg.training.checkpoint import published_steps
from digseg.training.logging import read_metrics
from digseg.training.run import RunDirectory
from launch.preparation import ensure_shards

LIMIT_S = 900.0  # for a start on a machine that is busy with other things
POLL_S = 0.02
CHECKPOINT_EVERY = 20
HANG_TIMEOUT_S = 20


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of the run whose workers are killed")
    parser.add_argument("--kill-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--starts", type=int, default=3, help="runs whose start is measured")
    add_json(parser)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that no run is left behind
    with tempfile.TemporaryDirectory(prefix="orchestration-") as folder:
        figures = _measure(Path(folder), options)
    report(figures, options.json)


def _measure(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    ensure_shards(_config(folder, "shards"))
    starts, stalls = [], []
    for number in range(options.starts):
        with _started(folder, f"start-{number}") as run:
            starts.append(run.wait_for_first_step())
            run.wait_for_saves(5)
        stalls.append(run.checkpoint_stall())
    _say("submit to first step", starts)
    _say("checkpoint stall, a save", stalls)
    with _started(folder, "disturbed") as run:
        run.wait_for_first_step()
        notices = [run.until_next_step(signal.SIGTERM) for _ in range(options.starts)]
        lost = run.ledger()["lost"]
        hang = run.until_next_step(signal.SIGSTOP)
    _say("notice to next step", notices)
    say(f"{'  steps lost by them':26} {lost:6.2f} s")
    _say(f"hang to next step, {HANG_TIMEOUT_S} s", [hang])
    say(f"killing a worker every {options.kill_every:.0f} s for {options.minutes:g} min")
    with _started(folder, "killed") as run:
        run.wait_for_first_step()
        recoveries = list(run.kill_workers(options.minutes * 60, options.kill_every))
    seconds = run.ledger()
    goodput = seconds["productive"] / sum(seconds.values())
    _say("kill to next step", recoveries)
    say(f"goodput with a worker killed every {options.kill_every:.0f} s for {options.minutes:g} min: {goodput:.3f}")
    return {
        "submit_to_first_step_s": starts,
        "checkpoint_stall_s": stalls,
        "notice_to_next_step_s": notices,
        "lost_by_notices_s": lost,
        "hang_to_next_step_s": hang,
        "kill_to_next_step_s": recoveries,
        "kills": len(recoveries),
        "goodput": goodput,
        "ledger_s": seconds,
    }


def _say(what: str, seconds: Sequence[float]) -> None:
    if seconds:
        median = statistics.median(seconds)
        say(f"{what:26} {median:6.2f} s (median of {len(seconds)}; {min(seconds):.2f} to {max(seconds):.2f})")


class _Run:
    """A submitted run, as one sees it from outside."""

    def __init__(self, config: Config, process: subprocess.Popen[bytes]) -> None:
        self._directory = RunDirectory(config)
        self._process = process
        self._submitted = time.monotonic()

    def wait_for_first_step(self) -> float:
        """Seconds from the submission on."""
        self._wait(lambda: bool(read_metrics(self._directory.metrics)))
        return time.monotonic() - self._submitted

    def wait_for_saves(self, number: int) -> None:
        """Until the run has saved so often."""
        self._wait(lambda: self._saves() >= number)

    def kill_workers(self, seconds: float, every_s: float) -> Iterator[float]:
        """SIGKILL to a worker every so often for so long; seconds until the next step, each time."""
        began = time.monotonic()
        for number in range(1, int(seconds / every_s) + 1):
            time.sleep(max(0.0, began + number * every_s - time.monotonic()))
            yield self.until_next_step(signal.SIGKILL)

    def until_next_step(self, sent: signal.Signals) -> float:
        """Send a worker a signal; seconds until all have started anew and taken a step."""
        workers = [worker for worker in psutil.Process(self._process.pid).children(recursive=True) if _trains(worker)]
        before, began = self._attempt(), time.monotonic()
        max(workers, key=lambda worker: worker.pid).send_signal(sent)
        self._wait(lambda: self._attempt() > before)
        return time.monotonic() - began

    def stop(self) -> None:
        """Ask the run to save and end."""
        self._process.send_signal(signal.SIGTERM)
        if self._process.wait(LIMIT_S) != 143:
            sys.exit(f"the run ended with {self._process.returncode} when it was asked to stop")

    def checkpoint_stall(self) -> float:
        """Seconds of a save."""
        return self.ledger()["checkpoint"] / self._saves()

    def ledger(self) -> dict[str, float]:
        """Seconds by category."""
        seconds: dict[str, float] = json.loads(self._directory.ledger.read_bytes())["seconds"]
        return seconds

    def _saves(self) -> int:
        steps = published_steps(self._directory.checkpoints)
        return steps[-1] // CHECKPOINT_EVERY if steps else 0

    def _attempt(self) -> int:
        """The last attempt that has taken a step: one that has begun two."""
        records = self._directory.samples / "rank-00000.jsonl"
        lines = records.read_text().splitlines()[-2:] if records.exists() else []
        attempts = [json.loads(line)["attempt"] for line in lines if line.endswith("}")]
        return min(attempts, default=0) if len(attempts) == 2 else 0

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            if self._process.poll() is not None or time.monotonic() > deadline:
                sys.exit("the run ended, or what was waited for did not come")
            time.sleep(POLL_S)


@contextmanager
def _started(folder: Path, name: str) -> Iterator[_Run]:
    """A run for the duration of the block; it is asked to stop then."""
    config = _config(folder, name)
    path = folder / f"{name}.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    with (folder / f"{name}.log").open("w") as log:
        command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(path)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    run = _Run(config, process)
    try:
        yield run
        run.stop()
    finally:
        process.kill()
        process.wait()


def _trains(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return "RayTrainWorker" in " ".join(process.cmdline())
    return False


def _config(folder: Path, name: str) -> Config:
    settings = {
        **small_run(folder, name),
        "data.crop_size": 64,
        "data.short_side": 64,
        "training.steps": 1_000_000,
        "training.checkpoint_every": CHECKPOINT_EVERY,
        "cluster.workers": 2,
        "cluster.max_failures": 1000,
        "cluster.hang_timeout_s": HANG_TIMEOUT_S,
    }
    return configured(settings)


if __name__ == "__main__":
    run_main(main)
