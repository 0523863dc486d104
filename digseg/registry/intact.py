"""Whether a registered package still is what was registered, file by file.

A package carries `artifacts/digests.json`, the sha256 of each file that decides what it predicts; `MLmodel` carries the
sha256 of that file. Code loaded from a package checks it with this module before it imports the rest of its code, so
nothing heavier than MLflow may be imported here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from mlflow.models import Model

from digseg.errors import DigSegError
from digseg.registry.lineage import file_digest

ARTIFACT = "model"  # name of the exported directory among the pyfunc's artifacts
DIGESTS_ARTIFACT = "digests"
DIGESTS_KEY = "digests_sha256"  # of MLmodel's metadata
_DIGESTS = "artifacts/digests.json"
_COVERED = ("artifacts", "code")  # folders of a package that hold nothing but what was registered


def write_digests(folder: Path, model_dir: Path, code_dir: Path, entry: Path) -> Path:
    """Write `digests.json` into `folder` for a package of an exported model, a Python package and MLflow's entry."""
    digests = {f"artifacts/{ARTIFACT}/{name}": digest for name, digest in _digests(model_dir)}
    digests |= {f"code/{code_dir.name}/{name}": digest for name, digest in _digests(code_dir)}
    digests[entry.name] = file_digest(entry)
    path = folder / Path(_DIGESTS).name
    path.write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path


def check_package(package: Path) -> None:
    """Compare the files of an MLflow model directory with what was registered.

    Raises:
        DigSegError: a file that was changed, removed or added, by its name.
    """
    metadata = Model.load(str(package)).metadata or {}
    _check(package, _DIGESTS, metadata.get(DIGESTS_KEY))
    registered = json.loads((package / _DIGESTS).read_text(encoding="utf-8"))
    for name, digest in registered.items():
        _check(package, name, digest)
    present = {f"{folder}/{name}" for folder in _COVERED for name, _ in _files(package / folder)}
    if added := sorted(present - registered.keys() - {_DIGESTS}):
        raise DigSegError(f"{package / added[0]} is not a file that was registered: somebody added it; remove it")


def _check(package: Path, name: str, registered: str | None) -> None:
    path = package / name
    found = file_digest(path) if path.is_file() else None
    if found is None or found != registered:
        state = f"has sha256 {found[:12]}..." if found else "is missing"
        raise DigSegError(
            f"{path} is not the file that was registered: it {state}, registered was {str(registered)[:12]}...; it was "
            "changed or damaged. Put the original back, or register the model anew"
        )


def _digests(folder: Path) -> Iterator[tuple[str, str]]:
    return ((name, file_digest(path)) for name, path in _files(folder))


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Relative names and paths of all files but compiled Python, which MLflow does not copy."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path.relative_to(folder).as_posix(), path
