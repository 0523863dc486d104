"""Checkpoints that are there whole or not at all, and are believed only after their sums were checked.

::

    checkpoints/step-00000200/deepspeed/*.pt       every rank's weights and optimizer state
                              rank-00000.pt ...    every rank's averaged weights, unlogged losses, RNG
                              state.json           step, world size, ZeRO stage, configuration, data digests
                              manifest.json        size and sha256 of each file above
    checkpoints/best.json                          which has the highest mIoU, where some were validated
    checkpoints/step-00000400.damaged/             found damaged when it was to be loaded; put aside

All ranks see the same directory (a local disk on one machine, a shared file system on several).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from digseg.console import say
from digseg.errors import DigSegError
from digseg.training.files import write_whole
from digseg.training.world import World

MANIFEST = "manifest.json"
STATE = "state.json"
BEST = "best.json"
SCORE = "val/miou"
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
    """The checkpoints of one run. Its public methods are collective.

    Args:
        keep: the newest so many are kept,
        keep_every: and those of steps that are multiples of this,
        keep_best: and so many with the highest score: ``val/miou`` of the state's ``validation``.
        reached: told the name of each point that a save reaches, after what it names was done; a test of
            faults strikes there.
    """

    def __init__(
        self,
        root: Path,
        world: World,
        keep: int,
        keep_every: int | None = None,
        keep_best: int = 0,
        reached: Callable[[str], None] = lambda point: None,
    ) -> None:
        self._root, self._world, self._keep, self._keep_every = root, world, keep, keep_every
        self._keep_best = keep_best
        self._reached = reached

    def save(self, step: int, write: Callable[[Path], None], state: Mapping[str, Any]) -> Checkpoint:
        """Publish a checkpoint: every rank's ``write(directory)``, then the manifest, then the name.

        A process that dies before the last rename leaves only a partial directory, which the next save
        removes.

        Raises:
            DigSegError: a file cannot be written, for want of space for instance.
        """
        partial, final = self._root / f"{_PARTIAL}{_name(step)}", self._root / _name(step)
        try:
            self._write(partial, write, {**state, "step": step, "world_size": self._world.world_size})
            sums = self._sums(partial)
            self._reached("files synced")
            if self._world.is_main:
                self._publish(partial, final, {"step": step, "files": sums})
        except (OSError, RuntimeError) as error:
            if not _is_of_the_disk(error):
                raise
            before = [published for published in published_steps(self._root) if published < step]
            raise DigSegError(
                f"the checkpoint of step {step} cannot be written to {self._root}: {error}; make room, or point "
                f"run.storage at another place. Started again, the run goes on from step {max(before, default=0)}"
            ) from error
        self._world.barrier()
        return _read(final)

    def _write(self, partial: Path, write: Callable[[Path], None], state: Mapping[str, Any]) -> None:
        if self._world.is_main:
            for stale in self._root.glob(f"{_PARTIAL}*"):
                shutil.rmtree(stale)
            self._reached("stale directories removed")
            partial.mkdir(parents=True)
            _write_json(partial / STATE, state)
            self._reached("state written")
        self._world.barrier()
        write(partial)
        self._reached("ranks written")
        self._world.barrier()

    def _publish(self, partial: Path, final: Path, manifest: Mapping[str, Any]) -> None:
        _write_json(partial / MANIFEST, manifest)
        self._reached("manifest written")
        _sync(partial)
        if final.exists():  # left by a run that was stopped between publishing and going on
            self._remove(final)
        partial.rename(final)
        self._reached("published")
        _sync(self._root)
        self._reached("name synced")
        self._note_best()
        self._remove_old(saved=manifest["step"])

    def newest_intact(self, until: int | None = None) -> Checkpoint | None:
        """The newest checkpoint whose files all match their sums, or None where there is none.

        Damaged ones are put aside and reported, and the one before is tried. Those of later steps than
        ``until`` do not count.
        """
        (steps, *_) = self._world.gather(published_steps(self._root))
        steps = [step for step in steps if until is None or step <= until]
        intact = self._first_intact(reversed(steps))
        if intact is None and steps and until is None and self._world.is_main:
            say(f"no intact checkpoint is left in {self._root}: training starts from the beginning")
        return intact

    def best_intact(self) -> Checkpoint | None:
        """The checkpoint with the highest score whose files all match their sums; None where none has a score."""
        (ranking, *_) = self._world.gather(_ranking(self._root))
        return self._first_intact(step for step, _ in ranking)

    def _first_intact(self, steps: Iterable[int]) -> Checkpoint | None:
        for step in steps:
            path = self._root / _name(step)
            problems = [problem for part in self._world.gather(self._problems(path)) for problem in part]
            if not problems:
                return _read(path)
            if self._world.is_main:
                aside = path.with_name(f"{path.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                self._note_best()
                say(f"checkpoint {path.name} is damaged and put aside: {'; '.join(problems)}")
            self._world.barrier()
        return None

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints of later steps than ``step``, to which the run went back."""
        if self._world.is_main:
            for later in published_steps(self._root):
                if later > step:
                    self._remove(self._root / _name(later))
            self._note_best()
        self._world.barrier()

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
        paths = _files(directory)
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
            step, files = _manifest(path)
        except (OSError, ValueError) as error:
            return [f"{MANIFEST} is unreadable ({error})"] if self._world.is_main else []
        names = sorted(files)[self._world.rank :: self._world.world_size]
        problems = [problem for name in names if (problem := _file_problem(path / name, name, *files[name]))]
        if self._world.is_main:
            if path.name != _name(step):
                problems.append(f"{MANIFEST} is that of step {step}")
            # DeepSpeed finds its files by their names: one too many would be read as well.
            strange = {file.relative_to(path).as_posix() for file in _files(path)} - files.keys() - {MANIFEST}
            problems += [f"{name} is of another checkpoint" for name in sorted(strange)]
        return problems

    def _remove_old(self, saved: int) -> None:
        best = {step for step, _ in _ranking(self._root)[: self._keep_best]}
        for step in published_steps(self._root)[: -self._keep]:
            if step not in {saved, *best} and not (self._keep_every and step % self._keep_every == 0):
                self._remove(self._root / _name(step))
        self._note_best()  # without keep_best it may have gone

    def _note_best(self) -> None:
        """Say in a file which checkpoint is the best, for people and tools; the states themselves decide."""
        path = self._root / BEST
        if ranking := _ranking(self._root):
            step, figures = ranking[0]
            write_whole(path, json.dumps({"step": step, "checkpoint": _name(step), **figures}, indent=1) + "\n")
        else:
            path.unlink(missing_ok=True)

    def _remove(self, path: Path) -> None:
        # By rename first: what is half removed must not look like a checkpoint.
        doomed = self._root / f"{_PARTIAL}remove-{path.name}"
        path.rename(doomed)
        self._reached("old one renamed")
        shutil.rmtree(doomed)
        self._reached("old one removed")


def published_steps(root: Path) -> list[int]:
    """Steps of the published checkpoints below ``root``, ascending; their content is not checked."""
    if not root.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in root.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def _ranking(root: Path) -> list[tuple[int, dict[str, float]]]:
    """Step and validation of the published checkpoints that have a score, the highest first, of equals the newest."""
    scored = []
    for step in published_steps(root):
        try:
            figures = json.loads((root / _name(step) / STATE).read_bytes()).get("validation", {})
        except (OSError, ValueError):
            continue  # damaged, as will be said when it is loaded
        if SCORE in figures:
            scored.append((step, figures))
    return sorted(scored, key=lambda entry: (entry[1][SCORE], entry[0]), reverse=True)


def best_checkpoint(root: Path) -> dict[str, Any]:
    """What ``best.json`` says: ``step``, ``checkpoint`` (its name), and the figures of its validation; empty where no
    checkpoint was validated."""
    try:
        found: dict[str, Any] = json.loads((root / BEST).read_bytes())
    except (OSError, ValueError):
        return {}
    return found


def published_state(root: Path) -> dict[str, Any] | None:
    """The state of the newest published checkpoint, or None where there is none or it is damaged."""
    steps = published_steps(root)
    if not steps:
        return None
    path = root / _name(steps[-1])
    try:
        _, files = _manifest(path)
        damaged = STATE not in files or _file_problem(path / STATE, STATE, *files[STATE])
        return None if damaged else _read(path).state
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


def _is_of_the_disk(error: OSError | RuntimeError) -> bool:
    """Whether a file could not be written; other RuntimeErrors tell of the loss of another rank."""
    of_torch_save = "PytorchStreamWriter" in str(error) or "inline_container" in str(error)
    return isinstance(error, OSError) or of_torch_save


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _manifest(path: Path) -> tuple[int, dict[str, tuple[int, str]]]:
    """The step, and every file's size and sha256, by the manifest of a checkpoint.

    Raises:
        OSError, ValueError: it is missing or damaged.
    """
    content = json.loads((path / MANIFEST).read_bytes())
    try:
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()}
        return int(content["step"]), files
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(repr(error)) from error


def _file_problem(path: Path, name: str, expected_size: int, sha256: str) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != expected_size:
        return f"{name} has {size} bytes instead of {expected_size}"
    return None if file_sha256(path) == sha256 else f"{name} differs from its sha256"


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
