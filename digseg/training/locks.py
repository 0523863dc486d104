"""One training of a run at a time: who submitted it holds one file of its directory, who trains it another.

Both are one process, but under Ray: there the workers may outlive the driver, where its machine is lost. The operating
system lets go of a file when its process ends, however it ends. On a shared file system that holds across machines
where it has locks (NFS 4, Lustre with flock).
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from digseg.config import Config
from digseg.console import say
from digseg.errors import DigSegError
from digseg.training.run import RunDirectory

PATIENCE_S = 120.0  # Ray ends the workers of a head that is lost after about a minute
_POLL_S = 0.1


@contextmanager
def exclusive(config: Config, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Hold the run's directory, so that no other process submits a run of this name at the same time.

    Workers that an earlier submission left behind are asked to save and end, and waited for.

    Raises:
        DigSegError: another process holds it, or a worker did not end within ``patience_s``, and the text says which;
            or the directory cannot be written and locked.
    """
    directory = RunDirectory(config)
    with ExitStack() as stack:
        holder = _lock(directory.lock, stack)
        if holder is not None:
            raise DigSegError(
                f"run {config.run.name!r} in {config.run.storage} is being trained by {holder}; wait for "
                "it, stop it, or choose another run.name"
            )
        with training_alone(config, patience_s, ask=True):
            directory.stop.unlink(missing_ok=True)  # also that of a process that was killed while it waited for workers
        yield


@contextmanager
def training_alone(config: Config, patience_s: float = PATIENCE_S, ask: bool = False) -> Iterator[None]:
    """Be the process that speaks for the run while it is trained, once a former one has ended.

    Args:
        ask: whether a former one is asked to save and end, which workers under Ray look for.

    Raises:
        DigSegError: a former one did not end within ``patience_s``, and the text says which; or the directory cannot be
            written and locked.
    """
    directory = RunDirectory(config)
    name = f"run {config.run.name!r} in {config.run.storage}"
    waiting, deadline = False, time.monotonic() + patience_s
    with ExitStack() as stack:
        while (holder := _lock(directory.trained, stack)) is not None:
            if time.monotonic() > deadline:
                raise DigSegError(
                    f"{name} is still being trained by {holder}, a worker of an earlier submission, which did not end "
                    f"within {patience_s:g} s; end that process, or choose another run.name"
                )
            if not waiting:
                waiting = True
                if ask:
                    directory.stop.touch()
                say(f"{name} is still being trained by {holder}: waiting up to {patience_s:g} s for it to end")
            time.sleep(_POLL_S)
        yield


def _lock(path: Path, stack: ExitStack) -> str | None:
    """Hold a file until ``stack`` ends, and write into it who does; where another process does, what it wrote."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            file = opened.enter_context(path.open("a+"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                return file.read().strip() or "another process"
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            stack.push(opened.pop_all())
    except OSError as error:
        raise DigSegError(
            f"{path} cannot be written and locked: {error.strerror}; point run.storage at a place that "
            "can be written and has file locks"
        ) from error
    return None
