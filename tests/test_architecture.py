"""The house rules of the import structure, read from the source itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

# Each room and the rooms it may use; digseg.errors and digseg.console are open to all.
ALLOWED = {
    "config": set(),
    "data": {"config"},
    "model": {"config"},
    "evaluation": {"config", "data", "model"},
    "training": {"config", "data", "model", "evaluation"},
    "registry": {"config", "data", "model", "evaluation", "training"},
    "cluster": {"config", "data", "model", "evaluation", "training", "registry"},
    "serving": {"config", "model", "evaluation", "registry"},
}
OPEN = {"errors", "console", ""}
LIMIT_LINES = 400
LONGER = {"digseg/training/trainer.py": 600}  # the loop is read in one piece


def test_rooms_import_in_one_direction(repository: Path) -> None:
    wrong = []
    for room, allowed in ALLOWED.items():
        for path in (repository / "digseg" / room).rglob("*.py"):
            for module in _imports(path):
                parts = module.split(".")
                if parts[0] in ("launch", "data_prep"):
                    wrong.append(f"{path}: {module}")
                elif parts[0] == "digseg":
                    target = parts[1] if len(parts) > 1 else ""
                    if target not in allowed | OPEN | {room}:
                        wrong.append(f"{path}: {module}")
    assert wrong == []


def test_data_preparation_uses_only_format_config_and_cluster(repository: Path) -> None:
    wrong = [
        f"{path}: {module}"
        for path in (repository / "data_prep").rglob("*.py")
        for module in _imports(path)
        if module.startswith(("digseg.", "launch"))
        and module.split(".")[1] not in {"data", "config", "cluster", "errors", "console"}
        # Encoding needs the autoencoder.
        and not (path.name in {"encode_latents.py", "latent_job.py"} and module.startswith("digseg.model.autoencoder"))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("ray", ("digseg/cluster", "launch")),
        ("mlflow", ("digseg/registry",)),
        ("deepspeed", ("digseg/training/engine.py",)),
    ],
)
def test_heavy_libraries_have_one_home(repository: Path, library: str, homes: tuple[str, ...]) -> None:
    users = {
        path.relative_to(repository).as_posix()
        for package in ("digseg", "data_prep", "launch")
        for path in (repository / package).rglob("*.py")
        if any(module.split(".")[0] == library for module in _imports(path))
    }
    assert users
    assert [user for user in users if not user.startswith(homes)] == []


def test_files_stay_readable(repository: Path) -> None:
    lengths = {
        path.relative_to(repository).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for package in ("digseg", "data_prep", "launch")
        for path in (repository / package).rglob("*.py")
    }
    assert {path: lines for path, lines in lengths.items() if lines > LONGER.get(path, LIMIT_LINES)} == {}


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield str(node.module)
