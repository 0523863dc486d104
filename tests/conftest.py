"""Fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Small tensors on few cores: a second thread per process costs more than it brings.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the project."""
    return REPOSITORY


@pytest.fixture(scope="session")
def real_corpora() -> Path:
    """The folder of the real corpora samples; they are no part of the project."""
    path = Path(os.environ.get("DIGSEG_REAL_CORPORA", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real corpora at {path} (set DIGSEG_REAL_CORPORA to a folder that holds them)")
    return path.resolve()
