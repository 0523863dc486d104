"""Checkpoints under every fault that a crash or a bad disk leaves behind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from digseg.training.checkpoint import CheckpointStore, published_steps
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
        (lambda path: _flip(path / "state.json"), "state.json differs from its sha256"),
    ],
    ids=["truncated", "flipped", "missing", "no manifest", "half a manifest", "state"],
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


def test_a_save_that_fails_half_way_publishes_nothing_and_the_next_one_succeeds(tmp_path: Path) -> None:
    store = _store(tmp_path)
    store.save(5, _write, {})

    def write_half(directory: Path) -> None:
        (directory / "rank-00000.pt").write_bytes(b"half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        store.save(10, write_half, {})
    assert published_steps(tmp_path) == [5]
    store.save(15, _write, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000015"]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    store = _store(tmp_path, keep=2)
    for step in (1, 2, 3, 100000000):
        store.save(step, _write, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-100000000"]


_CONTENT = {"deepspeed/model.pt": bytes(range(256)) * 4, "rank-00000.pt": bytes(1000)}


def _store(root: Path, keep: int = 5) -> CheckpointStore:
    return CheckpointStore(root, World(), keep)


def _write(directory: Path) -> None:
    for name, content in _CONTENT.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def _truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
