"""The GPU ladder, on a CPU: its path, and what it says where there is no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

_SCRIPT = "benchmarks/gpu_training.py"


def test_every_rung_runs_and_has_figures(tmp_path: Path, repository: Path) -> None:
    command = [
        sys.executable, _SCRIPT, "--size", "tiny", "--device", "cpu", "--pixels", "64", "--batch", "1",
        "--batches", "2", "--steps", "1", "--no-compile", "--json", str(tmp_path / "figures.json"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((tmp_path / "figures.json").read_text())
    results = {result["rung"]["name"]: result for result in figures["results"]}
    assert list(results) == [
        "reference loop", "stored latents", "no reading of the loss", "bf16", "sdpa", "xformers instead",
        "channels_last", "fused AdamW", "batch 2",
    ]  # fmt: skip
    assert results.pop("xformers instead")["error"]  # which has no operator for a CPU
    for result in results.values():
        assert result["error"] is None
        assert result["images_per_second"] > 0
        assert result["mfu"] == pytest.approx(result["tflops_per_second"] * 1e12 / figures["peak_flops"])
    assert figures["ratio_vs_reference_loop_64"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, _SCRIPT], cwd=repository, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no CUDA device here")
