"""A process that knows MLflow, and nothing of this repository but what is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def said_elsewhere(script: str, arguments: Sequence[str], folder: Path, timeout_s: float = 300) -> list[str]:
    """The lines that a script prints in such a process, which has to end well, in ``folder``."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
