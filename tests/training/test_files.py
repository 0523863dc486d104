"""The small files of a run on a full disk, and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from digseg.errors import DigSegError
from digseg.training.files import write_whole
from digseg.training.guard import BadStep, SkippedSteps
from digseg.training.logging import MetricsFile


def test_full_disk_is_said_and_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text("before")
    (tmp_path / ".file.json.tmp").symlink_to("/dev/full")
    with pytest.raises(DigSegError, match=r"file\.json cannot be written: No space left on device; make room"):
        write_whole(tmp_path / "file.json", "after")
    assert (tmp_path / "file.json").read_text() == "before"
    with pytest.raises(DigSegError, match="/dev/full cannot be written: No space left"):
        MetricsFile(Path("/dev/full")).append(1, {"loss": 1.0})


def test_skipped_steps_are_read_again_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "skipped.json"
    SkippedSteps(path).leave_out([BadStep(4, ("a",))])
    assert not path.exists()
    skipped = SkippedSteps(path, writes=True)
    skipped.leave_out([BadStep(7, ("b",))])
    skipped.pass_over([BadStep(4, ("a",))])
    assert (4 in SkippedSteps(path), 7 in SkippedSteps(path)) == (True, False)
    assert json.loads(path.read_bytes()) == [
        {"step": 4, "keys": ["a"], "passed_over": True},
        {"step": 7, "keys": ["b"], "passed_over": False},
    ]
    assert [SkippedSteps(path).count(steps) for steps in (4, 5, 7, 8)] == [0, 1, 1, 2]
    assert SkippedSteps(path).tag() == "5, 8"
    for content in ('[{"step": 4', '[{"stfp": 4}]', "4"):
        path.write_text(content)
        with pytest.raises(DigSegError, match=r"skipped\.json is unreadable"):
            SkippedSteps(path)


def test_skipped_steps_of_an_earlier_version_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "skipped.json"
    path.write_text('[{"step": 4, "keys": ["a"]}]')
    skipped = SkippedSteps(path, writes=True)
    assert 4 in skipped
    skipped.leave_out([BadStep(5, ("b",))])
    skipped.cut_after(0)
    assert json.loads(path.read_bytes()) == [{"step": 4, "keys": ["a"], "passed_over": True}]
