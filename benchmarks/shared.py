"""What the benchmarks share: their settings, and how they end."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

# Started as a file, Python looks for modules beside it first, and there data_prep is another benchmark.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from digseg.config import Config, load_config
from digseg.console import say

ROOT = Path(__file__).resolve().parent.parent


def configured(settings: Mapping[str, object], file: str = "demo.yaml") -> Config:
    """A configuration of ``configs/`` with other settings, ``{"training.steps": 5}``."""
    return load_config(ROOT / "configs" / file, [f"{key}={value}" for key, value in settings.items()])


def small_run(folder: Path, name: str) -> dict[str, object]:
    """Settings of a run on a few small images, alone and without MLflow, whose steps say which samples they took."""
    return {
        "run.name": name,
        "run.storage": folder / "runs",
        "prepare.root": folder / "corpora",
        "prepare.sample_corpora.images_per_domain": 20,
        "prepare.sample_corpora.size": 64,
        "data.root": folder / "shards",
        "data.decoded_cache_mb": 64,
        "training.log_samples": "true",
        "training.threads": 1,
        "tracking.enabled": "false",
    }


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option that :func:`report` follows."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")


def report(figures: Mapping[str, object], file: Path | None) -> None:
    """The figures as one line of JSON: printed, and written to ``file`` if there is one."""
    line = json.dumps(figures)
    if file is not None:
        file.write_text(line + "\n", encoding="utf-8")
    say(line)
