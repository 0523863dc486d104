"""A save of two ranks of which one is killed, at every point of it and inside of every file that it writes."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from ranks import run_ranks, start_ranks

from digseg.training.checkpoint import CheckpointStore, best_checkpoint, published_steps
from digseg.training.saving import BackgroundSaver, write_files
from digseg.training.world import World

RANKS = 2
VALUES = 2000  # in every file
LIMIT_S = 60.0  # for a rank to notice that the other one is lost


@pytest.mark.cluster
def test_save_of_two_ranks_of_which_one_is_killed_leaves_an_intact_checkpoint(tmp_path: Path) -> None:
    before = tmp_path / "before"
    run_ranks(_save_three, RANKS, tmp_path, before)
    points = _points_of_each_rank(tmp_path, before)
    assert len(points[0]) >= 15
    assert {"half of state.json", "half of manifest.json", "half of .best.json.tmp", "published"} < {*points[0]}
    for rank, names in enumerate(points):
        assert f"half of rank-0000{rank}.pt" in names
        for number, point in enumerate(names):
            root = tmp_path / f"{rank}-{number}"
            shutil.copytree(before, root)
            ranks = start_ranks(_save_fourth, RANKS, tmp_path, root, tmp_path / "points", (rank, number))
            case = f"rank {rank} killed: {point}"
            assert _exit_codes(ranks) == [-signal.SIGKILL if one == rank else 0 for one in range(RANKS)], case
            reached = {*names[: number + 1]}
            assert best_checkpoint(root)["step"] in (10, 15), case
            _assert_goes_on(tmp_path, root, _possible(rank, reached), case)


def _possible(rank: int, reached: set[str]) -> set[tuple[int, int]]:
    """Step and attempt of the checkpoint that is there when ``rank`` has ``reached`` these points and no others."""
    if rank > 0:  # which has done its part with its last point; whether the other knew of it, it cannot say
        return {(15, 1), (15, 2)} if "files synced" in reached else {(15, 1)}
    if "published" in reached:
        return {(15, 2)}
    # The second attempt takes the place of the first only once it is whole.
    return {(10, 1)} if "old one renamed" in reached else {(15, 1)}


def _assert_goes_on(folder: Path, root: Path, possible: set[tuple[int, int]], case: str) -> None:
    """Two fresh ranks find one of the possible checkpoints with its content, and save another."""
    run_ranks(_go_on, RANKS, folder, root)
    for rank in range(RANKS):
        found = json.loads((root.with_name(f"{root.name}-found-{rank}")).read_text())
        assert tuple(found) in possible, case
    kept = [f"step-{step:08d}" for step in published_steps(root)]
    assert kept[-1] == "step-00000020", case
    assert sorted(path.name for path in root.iterdir()) == ["best.json", *kept], case
    assert best_checkpoint(root)["step"] == 20, case


def _points_of_each_rank(folder: Path, before: Path) -> list[list[str]]:
    root = folder / "counted"
    shutil.copytree(before, root)
    run_ranks(_save_fourth, RANKS, folder, root, folder / "points", None)
    return [json.loads((folder / f"points-{rank}").read_text()) for rank in range(RANKS)]


def _exit_codes(ranks: mp.ProcessContext) -> list[int | None]:
    """How all ranks ended; None for one that had to be killed as it did not end by itself."""
    codes = []
    for process in ranks.processes:
        process.join(LIMIT_S)
        codes.append(process.exitcode)
        process.kill()
    return codes


def _save_three(world: World, root: Path) -> None:
    for step in (5, 10, 15):
        CheckpointStore(root, world, keep=3).save(step, _writer(world, step, 1), _state(step, 1))


def _save_fourth(world: World, root: Path, points: Path, kill: tuple[int, int] | None) -> None:
    """Checkpoint 15 for the second time, which is all that a save can have to do.

    Args:
        points: this rank's are written there if the save comes to its end.
        kill: which rank is killed, and at which of its points.
    """
    reached: list[str] = []

    def strike(point: str) -> None:
        if kill == (world.rank, len(reached)):
            os.kill(os.getpid(), signal.SIGKILL)
        reached.append(point)

    _strike_inside_of_files(strike, root)
    # As training saves.
    with BackgroundSaver(CheckpointStore(root, world.apart(), 2, reached=strike)) as saver:
        saver.start(15, _writer(world, 15, 2), _state(15, 2))
    if kill is None:
        saver.wait()
        points.with_name(f"{points.name}-{world.rank}").write_text(json.dumps(reached))
    else:
        with pytest.raises(RuntimeError, match="gloo"):
            saver.wait()


def _go_on(world: World, root: Path) -> None:
    store = _store(root, world)
    intact = store.newest_intact()
    assert intact is not None
    attempt = intact.state["attempt"]
    for rank in range(RANKS):
        for name, content in _files(rank, intact.step, attempt).items():
            assert torch.equal(torch.load(intact.path / name, weights_only=True)["values"], content["values"])
    root.with_name(f"{root.name}-found-{world.rank}").write_text(json.dumps([intact.step, attempt]))
    with BackgroundSaver(store) as saver:
        saver.start(20, _writer(world, 20, 1), _state(20, 1))
    saver.wait()


def _store(root: Path, world: World) -> CheckpointStore:
    return CheckpointStore(root, world, keep=2)


def _writer(world: World, step: int, attempt: int) -> Callable[[Path], None]:
    return partial(write_files, _files(world.rank, step, attempt))


def _files(rank: int, step: int, attempt: int) -> dict[str, Any]:
    """What a rank writes: other content in each attempt at each checkpoint."""
    values = torch.arange(float(VALUES)) + rank + step + attempt / 2
    return {f"deepspeed/optimizer-{rank}.pt": {"values": values}, f"rank-{rank:05d}.pt": {"values": -values}}


def _state(step: int, attempt: int) -> dict[str, Any]:
    return {"attempt": attempt, "validation": {"val/miou": 0.01 * step}}


def _strike_inside_of_files(strike: Callable[[str], None], root: Path) -> None:
    """From now on, in this process, there is a point in the middle of the content of every file below ``root``."""
    open_file, save = io.open, torch.save

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        stream = open_file(file, mode, *args, **kwargs)
        if "w" in mode and root in Path(file).parents:
            _halve(stream, partial(strike, f"half of {Path(file).name}"))
        return stream

    def saved(content: Any, path: Path) -> None:
        with opened(path, "wb") as file:  # which torch.save would else open where Python does not see it
            save(content, file)

    io.open, torch.save = opened, saved


def _halve(stream: Any, strike: Callable[[], None]) -> None:
    """Let ``stream`` take its text, or the first tensor that torch.save writes to it, in two, with a point between."""
    write, struck = stream.write, False

    def in_halves(piece: Any) -> int:
        nonlocal struck
        if struck or not (isinstance(piece, str) or len(piece) >= VALUES):
            return int(write(piece))
        struck, middle = True, len(piece) // 2
        written = write(piece[:middle])
        stream.flush()
        strike()
        return int(written + write(piece[middle:]))

    stream.write = in_halves
