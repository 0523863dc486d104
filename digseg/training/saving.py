"""Checkpoints written while training goes on."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from digseg.training.checkpoint import Checkpoint, CheckpointStore


class BackgroundSaver:
    """Saves in a thread, one checkpoint at a time. Its methods are collective.

    A save that fails raises what :meth:`CheckpointStore.save` raises, at the next call of any method. On the way out of
    the context a save that is under way ends.

    Args:
        store: of a world of its own (:meth:`digseg.training.world.World.apart`): its collective calls are made while
            training makes others.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._pending: Future[Checkpoint] | None = None

    def start(self, step: int, write: Callable[[Path], None], state: Mapping[str, Any]) -> None:
        """Begin :meth:`CheckpointStore.save`, after the save before has ended; ``write`` runs in the thread."""
        self.wait()
        pending: Future[Checkpoint] = Future()
        self._pending = pending

        def save() -> None:
            try:
                pending.set_result(self._store.save(step, write, state))
            except BaseException as error:
                pending.set_exception(error)

        # Not one that an exit of the process would wait for: other ranks may be lost.
        threading.Thread(target=save, name=f"save-{step}", daemon=True).start()

    def check(self) -> None:
        """Raise the error of a save that has failed; does not wait."""
        if self._pending is not None and self._pending.done():
            self._pending.result()

    def wait(self) -> Checkpoint | None:
        """The checkpoint that was begun last, once it is published; None where none was begun."""
        return None if self._pending is None else self._pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pending is not None:
            self._pending.exception()


def host_copy(value: Any) -> Any:
    """``value`` with all tensors in its dictionaries, lists and tuples copied to the CPU's memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, host_copy(part)) for key, part in value.items())
    if type(value) in (list, tuple):
        return type(value)(host_copy(part) for part in value)
    return copy.deepcopy(value)


def write_files(files: Mapping[str, Any], directory: Path) -> None:
    """Write what was copied of a process' state, name -> content, below ``directory``."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
