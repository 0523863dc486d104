"""The soak, as short as it can be: a notice and the loss of a rank cost no sample, and its figures are there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.cluster
def test_run_under_two_faults_loses_no_sample_and_ends_with_the_loss_of_an_undisturbed_one(
    tmp_path: Path, repository: Path
) -> None:
    file = tmp_path / "figures.json"
    # A seed by which the faults are of two kinds; ranks whose number does not change sum in the same order.
    command = ["benchmarks/soak.py", "--faults", "2", "--seed", "8", "--pause", "0.5", "--world-sizes", "2"]
    done = subprocess.run(
        [sys.executable, *command, "--json", str(file)],
        cwd=repository, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    figures = json.loads(file.read_text())
    assert figures["faults"] == 2
    assert figures["faults_by_kind"] == {"notice": 1, "ranks killed": 1}
    assert figures["attempts"] == 3
    assert figures["samples_lost"] == figures["samples_repeated"] == 0
    assert figures["final_loss"] == figures["undisturbed_loss"]
    assert figures["loss_within_tolerance"]
    assert 0 < figures["goodput"] < 1
