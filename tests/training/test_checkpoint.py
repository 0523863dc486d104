"""Checkpoints under every fault that a crash or a bad disk leaves behind."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from digseg.errors import DigSegError
from digseg.training.checkpoint import CheckpointStore, best_checkpoint, published_state, published_steps
from digseg.training.saving import BackgroundSaver
from digseg.training.world import World


def test_manifest_names_every_file_with_its_size_and_sha256(tmp_path: Path) -> None:
    checkpoint = _store(tmp_path).save(5, _write, {"note": "five"})
    files = json.loads((checkpoint.path / "manifest.json").read_bytes())["files"]
    expected = {"state.json": (checkpoint.path / "state.json").read_bytes()} | _CONTENT
    assert files == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in expected.items()
    }
    assert checkpoint.path.name == "step-00000005"
    assert checkpoint.state == {"note": "five", "step": 5, "world_size": 1}
    manifest = (checkpoint.path / "manifest.json").read_bytes()
    assert checkpoint.digest == hashlib.sha256(manifest).hexdigest()


def test_newest_intact_checkpoint_is_found(tmp_path: Path) -> None:
    store = _store(tmp_path)
    assert store.newest_intact() is None
    store.save(5, _write, {})
    store.save(10, _write, {})
    newest = store.newest_intact()
    assert newest is not None
    assert newest.step == 10


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: _truncate(path / "rank-00000.pt"), "rank-00000.pt has 500 bytes instead of 1000"),
        (lambda path: _flip(path / "deepspeed/model.pt"), "deepspeed/model.pt differs from its sha256"),
        (lambda path: (path / "rank-00000.pt").unlink(), "rank-00000.pt is missing"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is unreadable"),
        (lambda path: _truncate(path / "manifest.json"), "manifest.json is unreadable"),
        (lambda path: _substitute(path / "manifest.json", b'"bytes"', b'"bytds"'), "manifest.json is unreadable"),
        (lambda path: _flip(path / "state.json"), "state.json differs from its sha256"),
        (lambda path: (path / "rank-00001.pt").write_bytes(b"old"), "rank-00001.pt is of another checkpoint"),
        (lambda path: _replace(path, path.with_name("step-00000005")), "manifest.json is that of step 5"),
    ],
    ids=["truncated", "flipped", "missing", "no manifest", "half a manifest", "key", "state", "stale", "misnamed"],
)
def test_damaged_checkpoint_is_put_aside_for_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], reason: str
) -> None:
    store = _store(tmp_path)
    store.save(5, _write, {})
    damage(store.save(10, _write, {}).path)
    intact = store.newest_intact()
    assert intact is not None
    assert intact.step == 5
    said = capsys.readouterr().out
    assert "step-00000010 is damaged" in said
    assert reason in said
    assert (tmp_path / "step-00000010.damaged").is_dir()
    assert published_steps(tmp_path) == [5]
    store.save(10, _write, {})
    newest = store.newest_intact()
    assert newest is not None
    assert newest.step == 10


def test_with_no_intact_checkpoint_left_the_run_starts_anew_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = _store(tmp_path)
    _truncate(store.save(5, _write, {}).path / "rank-00000.pt")
    assert store.newest_intact() is None
    assert "training starts from the beginning" in capsys.readouterr().out


def test_disk_that_is_full_publishes_nothing_says_so_and_the_next_save_succeeds(tmp_path: Path) -> None:
    store = _store(tmp_path)
    store.save(5, _write, {})

    def write_to_full_disk(directory: Path) -> None:
        (directory / "rank-00000.pt").symlink_to("/dev/full")
        torch.save({"weights": torch.zeros(1000)}, directory / "rank-00000.pt")

    with pytest.raises(DigSegError, match=r"step 10 cannot be written to .*make room.*goes on from step 5"):
        store.save(10, write_to_full_disk, {})
    assert published_steps(tmp_path) == [5]
    store.save(15, _write, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000015"]


def test_loss_of_another_rank_during_a_save_is_no_mistake_of_the_user(tmp_path: Path) -> None:
    def lose_peer(directory: Path) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:40000")

    with pytest.raises(RuntimeError, match=r"^\[gloo.*closed by peer"):
        _store(tmp_path).save(5, lose_peer, {})
    assert published_steps(tmp_path) == []


def test_save_that_is_killed_at_any_point_leaves_an_intact_checkpoint(tmp_path: Path) -> None:
    points: list[str] = []
    _save_over_two(tmp_path / "counted", points.append)
    assert len(points) >= 10
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["digseg.training.checkpoint"])
    for number, point in enumerate(points):
        root = tmp_path / str(number)
        process = context.Process(target=_save_over_two_until_killed, args=(root, number))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, point
        store = _store(root, keep=2)
        intact = store.newest_intact()
        assert intact is not None, point
        assert intact.step == (15 if published_steps(root)[-1] == 15 else 10), point
        # The second attempt takes the place of the first only once it is whole.
        assert published_steps(root)[-1] == 10 or intact.state["attempt"] == (
            2 if "published" in points[: number + 1] else 1
        ), point
        assert {name: (intact.path / name).read_bytes() for name in _CONTENT} == _CONTENT, point
        store.save(20, _write, {})
        kept = [f"step-{step:08d}" for step in published_steps(root)]
        assert kept[-1] == "step-00000020", point
        assert sorted(path.name for path in root.iterdir()) == ["best.json", *kept], point
        assert best_checkpoint(root)["step"] == published_steps(root)[-2], point


def test_only_the_newest_checkpoints_and_every_nth_step_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, World(), keep=2, keep_every=100)
    for step in (1, 100, 150, 200, 201, 202, 100000000):
        store.save(step, _write, {})
    assert published_steps(tmp_path) == [100, 200, 202, 100000000]


def test_best_checkpoints_are_kept_noted_and_found_while_they_are_intact(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, World(), keep=1, keep_best=2)
    assert store.best_intact() is None
    for step, score in ((1, 0.5), (2, 0.8), (3, None), (4, 0.6), (5, 0.8), (6, 0.1), (7, None)):
        validation = {} if score is None else {"val/miou": score, "val/miou/squares": score}
        store.save(step, _write, {"validation": validation})
    assert published_steps(tmp_path) == [2, 5, 7]
    best = store.best_intact()
    assert best is not None
    assert best.step == 5  # of two as good the newer
    expected = {"step": 5, "checkpoint": "step-00000005", "val/miou": 0.8, "val/miou/squares": 0.8}
    assert best_checkpoint(tmp_path) == expected
    _flip(tmp_path / "step-00000005/rank-00000.pt")
    best = store.best_intact()
    assert best is not None
    assert best.step == best_checkpoint(tmp_path)["step"] == 2
    store.remove_after(1)
    assert best_checkpoint(tmp_path) == {}
    assert list(tmp_path.glob("*.json")) == []


def test_best_checkpoint_that_is_not_kept_is_not_noted(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, World(), keep=1)
    for step, score in ((1, 0.5), (2, 0.4)):
        store.save(step, _write, {"validation": {"val/miou": score}})
    assert best_checkpoint(tmp_path)["step"] == 2


def test_checkpoints_after_the_one_gone_back_to_are_removed_and_the_one_just_saved_is_kept(tmp_path: Path) -> None:
    store = _store(tmp_path)
    for step in (5, 10, 15):
        store.save(step, _write, {})
    _store(tmp_path, keep=1).save(7, _write, {})
    assert published_steps(tmp_path) == [7, 15]
    store.remove_after(7)
    assert published_steps(tmp_path) == [7]


def test_state_that_differs_from_its_sum_is_not_believed(tmp_path: Path) -> None:
    path = _store(tmp_path).save(5, _write, {"zero_stage": 1}).path
    state = published_state(tmp_path)
    assert state is not None
    assert state["zero_stage"] == 1
    _substitute(path / "state.json", b"zero_stage", b"zero_stagd")
    assert published_state(tmp_path) is None


def test_checkpoint_from_before_a_step_is_found(tmp_path: Path) -> None:
    store = _store(tmp_path)
    for step in (5, 10):
        store.save(step, _write, {})
    found = [store.newest_intact(until=step) for step in (4, 5, 9, 10)]
    assert [checkpoint and checkpoint.step for checkpoint in found] == [None, 5, 5, 10]


_CONTENT = {"deepspeed/model.pt": bytes(range(256)) * 4, "rank-00000.pt": bytes(1000)}


def _store(root: Path, keep: int = 5) -> CheckpointStore:
    return CheckpointStore(root, World(), keep)


def _write(directory: Path) -> None:
    for name, content in _CONTENT.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def _save_over_two(root: Path, reached: Callable[[str], None]) -> None:
    """Checkpoints 5 and 10, then 15 for the second time: all that a save can have to do."""
    for step in (5, 10, 15):
        _store(root).save(step, _write, {"attempt": 1, "validation": {"val/miou": 0.01 * step}})
    with BackgroundSaver(CheckpointStore(root, World(), 2, reached=reached)) as saver:  # as training saves
        saver.start(15, _write, {"attempt": 2, "validation": {"val/miou": 0.15}})


def _save_over_two_until_killed(root: Path, number: int) -> None:
    reached: list[str] = []

    def strike(point: str) -> None:
        if len(reached) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        reached.append(point)

    _save_over_two(root, strike)


def _replace(path: Path, by: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(by, path)


def _substitute(path: Path, old: bytes, new: bytes) -> None:
    path.write_bytes(path.read_bytes().replace(old, new, 1))


def _truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
