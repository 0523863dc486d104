from __future__ import annotations

import io
import re
import time

import pytest

from digseg.console import progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_away_from_a_terminal_progress_is_plain_lines_with_rate_and_note(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("reading", 5, "samples", start=2, interval_s=0.0) as bar:
        bar.note("loss 0.5")
        for _ in range(3):
            bar.advance()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("reading: 3/5 samples (")
    assert lines[0].endswith("left) | loss 0.5")
    assert lines[-1].startswith("reading: 5/5 samples (")
    assert "left" not in lines[-1]


def test_a_terminal_shows_a_bar_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    with progress("reading", 5, "samples") as bar:
        for _ in range(3):
            bar.advance()
            time.sleep(0.01)
    text = terminal.getvalue()
    assert "reading" in text
    assert "3/5" in text
    assert re.search(r"\d+\.\d/s", text)
    assert re.search(r"\d:\d\d:\d\d", text)


def test_a_failure_does_not_claim_to_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), progress("reading", 5):
        raise RuntimeError
    assert capsys.readouterr().out == ""
