"""The ablation on corpora of noise: two variants are trained, evaluated and asked, and finished runs are kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from shard_writing import noise_samples, write_split

# Those of configs/demo.yaml, which the script takes where it has no real samples.
_CORPORA = {
    "sample_driving": ("natural", ["road", "sky", "car"]),
    "sample_microscopy": ("medical", ["background", "cell nucleus"]),
    "sample_landcover": ("remote_sensing", ["background", "building", "water"]),
    "sample_fields": ("agriculture", ["soil", "crop", "weed"]),
    "sample_town": ("natural", ["house", "lamp"]),
}


def test_runs_are_trained_evaluated_asked_and_kept(tmp_path: Path, repository: Path) -> None:
    for corpus, (domain, vocabulary) in _CORPORA.items():
        for split in ("train", "val"):
            write_split(tmp_path / "shards", corpus, noise_samples(3, len(vocabulary)), vocabulary, split, domain)
    figures = _figures(repository, tmp_path)
    corpora = list(_CORPORA)[:4]
    assert [run["variant"] for run in figures["runs"]] == ["full recipe", "plain U-Net"]
    for run in figures["runs"]:
        assert list(run["miou"]) == corpora
        assert all(0 < value < 1 for value in run["miou"].values())
    (answers,) = figures["questions"]
    wordings = answers["sample_microscopy"]["wordings"]
    assert wordings.keys() == {"cell nucleus"}
    assert wordings["cell nucleus"].keys() == {"cell nucleus", "banana"}
    for name in corpora:
        assert answers[name]["parts"]
        for part in answers[name]["parts"]:
            assert 0 < len(part["classes"]) < max(2, len(_CORPORA[name][1]))
            assert len(part["foreign"]) == 4
            assert not {*part["foreign"]} & {*_CORPORA[name][1], "background"}
    assert _figures(repository, tmp_path, "--kept") == figures


def _figures(repository: Path, out: Path, *options: str) -> dict[str, Any]:
    settings = {"--out": out, "--corpora": out / "none", "--steps": 2, "--crop": 32, "--seeds": 1}
    command = [sys.executable, "benchmarks/ablation.py", "--variants", "full recipe", "plain U-Net", *options]
    command += [str(part) for setting in settings.items() for part in setting]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures
