"""What a person sees while work goes on: a rich bar in a terminal, plain lines with rate and ETA elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PLAIN_INTERVAL_S = 10.0


class ProgressHandle(Protocol):
    """What :func:`progress` gives: count work and show a short note beside the bar."""

    def advance(self, n: int = 1) -> None: ...

    def note(self, text: str) -> None: ...


def say(text: str) -> None:
    """Print a line to stdout at once (worker and job logs are read while they grow)."""
    print(text, flush=True)


@contextmanager
def progress(
    description: str,
    total: int,
    unit: str = "",
    start: int = 0,
    interval_s: float = PLAIN_INTERVAL_S,
    shown: bool = True,
) -> Iterator[ProgressHandle]:
    """Show progress of ``total`` pieces of work, of which ``start`` are already done.

    In a terminal this is a rich bar; elsewhere a line every ``interval_s`` seconds and one at the end. Where it is not
    ``shown``, as by all ranks but one, nothing is printed.
    """
    if not shown:
        yield _SilentHandle()
    elif sys.stdout.isatty():
        with _rich_progress() as bar:
            yield _RichHandle(bar, description, total, start)
    else:
        handle = _PlainHandle(description, total, unit, start, interval_s)
        yield handle
        handle.finish()


class _RateColumn(ProgressColumn):
    """Pieces of work a second, over the last while."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f}/s", style="progress.data.speed")


def _rich_progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(),
    )


class _SilentHandle:
    def advance(self, n: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class _RichHandle:
    def __init__(self, bar: Progress, description: str, total: int, start: int) -> None:
        self._bar = bar
        self._task = bar.add_task(description, total=total, completed=start, note="")

    def advance(self, n: int = 1) -> None:
        self._bar.advance(self._task, n)

    def note(self, text: str) -> None:
        self._bar.update(self._task, note=text)


class _PlainHandle:
    def __init__(self, description: str, total: int, unit: str, start: int, interval_s: float) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._start, self._done, self._note = start, start, ""
        self._interval_s = interval_s
        self._began = self._printed = time.monotonic()

    def advance(self, n: int = 1) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._printed >= self._interval_s and self._done < self._total:
            self._printed = now
            self._line()

    def note(self, text: str) -> None:
        self._note = text

    def finish(self) -> None:
        self._line()

    def _line(self) -> None:
        elapsed_s = max(time.monotonic() - self._began, 1e-9)
        rate = (self._done - self._start) / elapsed_s
        left = f", {(self._total - self._done) / rate:.0f} s left" if rate > 0 and self._done < self._total else ""
        unit = f" {self._unit}" if self._unit else ""
        note = f" | {self._note}" if self._note else ""
        say(f"{self._description}: {self._done}/{self._total}{unit} ({rate:.1f}/s, {elapsed_s:.0f} s{left}){note}")
