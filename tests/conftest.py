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

import torch  # noqa: E402 (the settings above are read when it is imported)

# Files that take longest, started first so that parallel processes end together.
LONGEST = ["test_readme.py", "cluster/test_nodes.py", "cluster/test_train.py", "data_prep/test_shard_killed.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        name = item.path.relative_to(REPOSITORY / "tests").as_posix()
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=rank)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Figures to the last bit depend on the number of threads, which a trainer in this process sets to its share."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests leave nothing in the user's own cache, and find nothing there."""
    os.environ["DIGSEG_CACHE"] = str(tmp_path_factory.mktemp("cache"))


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
