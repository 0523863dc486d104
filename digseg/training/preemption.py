"""Notices to stop, such as SIGTERM before a machine is taken: all ranks save after the same step, and end.

A notice comes to any rank, at any time; a checkpoint is written by all of them, so they have to agree on a step
after which. At each step every rank says whether it was given a notice, by reducing one number over a process group
on the CPU in the background (:class:`StopAgreement`). The answer is read when the step is taken: it has long been
there, so no rank waits for another nor for its device, and all ranks read the same. A notice is therefore followed
by the end of the step that is under way and of one more, a checkpoint, and :class:`RunStoppedError`.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType

import torch
import torch.distributed as dist

from digseg.errors import StoppedError
from digseg.training.world import World


class Notice(IntEnum):
    """What is asked of a process. Of several ranks' notices the largest counts."""

    NONE = 0
    LEAVE = 1  # this process' machine is going to be taken; the run may go on without it
    END = 2  # the run is to end


class RunStoppedError(StoppedError):
    """A notice was followed: the checkpoint is written."""

    def __init__(self, notice: Notice, run: str, step: int) -> None:
        super().__init__(notice, run, step)  # so that it can be pickled
        self.notice, self._run, self._step = notice, run, step

    def __str__(self) -> str:
        return (
            f"run {self._run!r} was asked to stop and did, with a checkpoint after step {self._step}; the same command "
            "goes on from there"
        )


_given = Notice.NONE  # to this process: signals know no other receiver


def give(notice: Notice) -> None:
    """Give this process a notice; the larger one stays."""
    global _given
    _given = max(_given, notice)


def listen(notice: Notice) -> None:
    """Let SIGTERM mean ``notice`` to this process from now on. In the main thread only."""

    def on_sigterm(signum: int, frame: FrameType | None) -> None:
        give(notice)

    signal.signal(signal.SIGTERM, on_sigterm)


@contextmanager
def listening(notice: Notice) -> Iterator[None]:
    """:func:`listen` for the duration of the block, after which a notice is forgotten."""
    global _given
    before = signal.getsignal(signal.SIGTERM)
    listen(notice)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _given = Notice.NONE


class StopAgreement:
    """Tells each rank, after the same step, what the ranks were asked. All ranks make one and call it alike."""

    def __init__(self, world: World) -> None:
        self._group = dist.new_group(backend="gloo") if world.world_size > 1 else None
        self._flag = torch.zeros(1, dtype=torch.int32)
        # The same memory: reading it is no reading of a tensor, which is counted against a step.
        self._value = self._flag.numpy()
        self._asked: dist.Work | None = None

    def ask(self) -> None:
        """Begin a step."""
        self.answer()  # of a step that broke off, if need be: until then the memory belongs to its reduction
        self._value[0] = _given
        if self._group is not None:
            self._asked = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def answer(self) -> Notice:
        """The largest notice that a rank had been given when it began the step."""
        if self._asked is not None:
            self._asked.wait()
            self._asked = None
        return Notice(int(self._value[0]))
