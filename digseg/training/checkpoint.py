"""Checkpoints that are there whole or not at all, and are believed only after their sums were checked.

::

    checkpoints/step-00000200/deepspeed/*.pt       every rank's weights and optimizer state
                              rank-00000.pt ...    every rank's averaged weights, unlogged losses, RNG
                              state.json           step, world size, ZeRO stage, configuration, data digests
                              manifest.json        size and sha256 of each file above
    checkpoints/step-00000400.damaged/             found damaged when it was to be loaded; put aside

All ranks see the same directory (a local disk on one machine, a shared file system on several).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from digseg.console import say
from digseg.training.world import World

MANIFEST = "manifest.json"
STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL = ".partial-"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A published checkpoint."""

    path: Path
    step: int
    state: dict[str, Any]
    digest: str  # sha256 of the manifest: names the whole content


class CheckpointStore:
    """The checkpoints of one run. ``save`` and ``newest_intact`` are collective."""

    def __init__(self, root: Path, world: World, keep: int) -> None:
        self._root, self._world, self._keep = root, world, keep

    def save(self, step: int, write: Callable[[Path], None], state: Mapping[str, Any]) -> Checkpoint:
        """Publish a checkpoint: every rank's ``write(directory)``, then the manifest, then the name.

        A process that dies before the last rename leaves only a partial directory, which the next save
        removes.
        """
        partial, final = self._root / f"{_PARTIAL}{_name(step)}", self._root / _name(step)
        if self._world.is_main:
            for stale in self._root.glob(f"{_PARTIAL}*"):
                shutil.rmtree(stale)
            partial.mkdir(parents=True)
            _write_json(partial / STATE, {**state, "step": step, "world_size": self._world.world_size})
        self._world.barrier()
        write(partial)
        self._world.barrier()
        sums = self._sums(partial)
        if self._world.is_main:
            _write_json(partial / MANIFEST, {"step": step, "files": sums})
            _sync(partial)
            if final.exists():  # left by a run that was stopped between publishing and going on
                shutil.rmtree(final)
            partial.rename(final)
            _sync(self._root)
            self._remove_old()
        self._world.barrier()
        return _read(final)

    def newest_intact(self) -> Checkpoint | None:
        """The newest checkpoint whose files all match their sums, or None where there is none.

        Damaged ones are put aside and reported, and the one before is tried.
        """
        (steps, *_) = self._world.gather(published_steps(self._root))
        for step in reversed(steps):
            path = self._root / _name(step)
            problems = [problem for part in self._world.gather(self._problems(path)) for problem in part]
            if not problems:
                return _read(path)
            if self._world.is_main:
                aside = path.with_name(f"{path.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                say(f"checkpoint {path.name} is damaged and put aside: {'; '.join(problems)}")
            self._world.barrier()
        if steps and self._world.is_main:
            say(f"no intact checkpoint is left in {self._root}: training starts from the beginning")
        return None

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A directory that all ranks see, for what is computed from a checkpoint; gone afterwards.

        Where a process dies meanwhile, the next save removes it.
        """
        directory = self._root / f"{_PARTIAL}scratch"
        if self._world.is_main:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
        self._world.barrier()
        yield directory
        self._world.barrier()
        if self._world.is_main:
            shutil.rmtree(directory)

    def _sums(self, directory: Path) -> dict[str, dict[str, Any]]:
        """Size and sha256 of every file; each rank reads its part of them and makes them durable."""
        paths = sorted(path for path in directory.rglob("*") if path.is_file())
        own: dict[str, dict[str, Any]] = {}
        for path in paths[self._world.rank :: self._world.world_size]:
            _sync(path)
            own[path.relative_to(directory).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": file_sha256(path),
            }
        merged = {name: entry for part in self._world.gather(own) for name, entry in part.items()}
        return dict(sorted(merged.items()))

    def _problems(self, path: Path) -> list[str]:
        """What is wrong with this rank's part of the files."""
        try:
            files = json.loads((path / MANIFEST).read_bytes())["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            return [f"{MANIFEST} is unreadable ({error})"] if self._world.is_main else []
        names = sorted(files)[self._world.rank :: self._world.world_size]
        return [problem for name in names if (problem := _file_problem(path / name, name, files[name]))]

    def _remove_old(self) -> None:
        for step in published_steps(self._root)[: -self._keep]:
            # By rename first: what is half removed must not look like a checkpoint.
            doomed = self._root / f"{_PARTIAL}remove-{_name(step)}"
            (self._root / _name(step)).rename(doomed)
            shutil.rmtree(doomed)


def published_steps(root: Path) -> list[int]:
    """Steps of the published checkpoints below ``root``, ascending; their content is not checked."""
    if not root.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in root.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def published_state(root: Path) -> dict[str, Any] | None:
    """The state of the newest published checkpoint, or None where there is none or it is unreadable."""
    steps = published_steps(root)
    try:
        return _read(root / _name(steps[-1])).state if steps else None
    except (OSError, ValueError):
        return None


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _read(path: Path) -> Checkpoint:
    state = json.loads((path / STATE).read_bytes())
    return Checkpoint(path, state["step"], state, file_sha256(path / MANIFEST))


def _file_problem(path: Path, name: str, entry: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{name} has {size} bytes instead of {entry['bytes']}"
    return None if file_sha256(path) == entry["sha256"] else f"{name} differs from its sha256"


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
