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
    SkippedSteps(path).add([BadStep(4, ("a",))], write=True)
    assert 4 in SkippedSteps(path)
    assert 5 not in SkippedSteps(path)
    assert json.loads(path.read_bytes()) == [{"step": 4, "keys": ["a"]}]
    for content in ('[{"step": 4', '[{"stfp": 4}]', "4"):
        path.write_text(content)
        with pytest.raises(DigSegError, match=r"skipped\.json is unreadable"):
            SkippedSteps(path)
