"""What `launch/demo.py` refuses before it draws, trains or registers anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from digseg.errors import DigSegError
from launch.demo import main


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("evaluation.corpora=[]", r"evaluation\.corpora is empty: name a corpus and a split"),
        ("tracking.enabled=false", r"tracking\.enabled is false: the demo registers its model"),
    ],
)
def test_demo_that_could_not_end_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, said: str
) -> None:
    monkeypatch.setenv("DIGSEG_HOME", str(tmp_path))
    with pytest.raises(DigSegError, match=said):
        main([override, "training.validation.every=null"])  # which would refuse the first one earlier
    assert not list(tmp_path.iterdir())
