"""Packages that were changed after they were registered, loaded by MLflow alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from plain_mlflow import said_elsewhere
from small_world import World

from digseg.errors import DigSegError
from digseg.registry.intact import check_package
from digseg.registry.models import resolve

# Changes one bit of each file in turn, and asks plain MLflow for the model.
TAMPERER = """
import json, sys
from pathlib import Path
import mlflow

mlflow.set_tracking_uri(sys.argv[1])
package, said = Path(sys.argv[2]), {}
for name in sys.argv[3:]:
    content = (package / name).read_bytes()
    middle = len(content) // 2
    (package / name).write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
    try:
        mlflow.pyfunc.load_model("models:/digseg@champion")
        said[name] = "loaded"
    except Exception as error:
        said[name] = str(error)
    finally:
        (package / name).write_bytes(content)
print(json.dumps(said))
"""


@pytest.fixture
def package(world: World, tmp_path: Path) -> Path:
    """A copy of the champion's MLflow model directory."""
    original = resolve("models:/digseg@champion", world.tracking_uri)[0].parents[1]
    return Path(shutil.copytree(original, tmp_path / "package"))


def test_plain_mlflow_refuses_a_package_with_a_changed_bit_and_names_the_file(world: World, tmp_path: Path) -> None:
    directory = resolve("models:/digseg@champion", world.tracking_uri)[0].parents[1]
    names = [path.relative_to(directory).as_posix() for path in sorted((directory / "artifacts").rglob("*.*"))]
    weights = [f"artifacts/model/{part}/diffusion_pytorch_model.safetensors" for part in ("pathway", "unet")]
    assert {"artifacts/digests.json", "artifacts/model/digseg.json", *weights} <= set(names)
    # The first is code that Python would stumble over if it were imported before it was checked.
    names = ["code/digseg/evaluation/inference.py", *names, "code/digseg/registry/table.py", "pyfunc_model.py"]
    arguments = [world.tracking_uri, str(directory), *names]
    said = json.loads(said_elsewhere(TAMPERER, arguments, tmp_path, timeout_s=600)[-1])
    assert list(said) == names
    assert {name: text for name, text in said.items() if str(directory / name) not in text} == {}


def test_every_file_that_decides_a_prediction_is_covered(package: Path) -> None:
    check_package(package)
    covered = [path for folder in ("artifacts", "code") for path in (package / folder).rglob("*") if path.is_file()]
    assert len(covered) > 50
    for path in [*covered, package / "pyfunc_model.py"]:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DigSegError, match=rf"^{path} is not the file that was registered: it has sha256"):
            check_package(package)
        path.write_bytes(content)
    check_package(package)


def test_missing_and_added_files_are_named(package: Path) -> None:
    added = package / "code" / "torch.py"
    added.touch()
    with pytest.raises(DigSegError, match=rf"{added} is not a file that was registered: somebody added it"):
        check_package(package)
    added.unlink()
    card = package / "artifacts" / "model" / "digseg.json"
    card.unlink()
    with pytest.raises(DigSegError, match=rf"{card} is not the file that was registered: it is missing"):
        check_package(package)


def test_digests_cannot_be_exchanged_with_the_files(package: Path) -> None:
    weights = package / "artifacts" / "model" / "pathway" / "model.safetensors"
    weights.write_bytes(b"others")
    digests = package / "artifacts" / "digests.json"
    digests.write_text(json.dumps(dict.fromkeys(json.loads(digests.read_text()), "0" * 64)))
    with pytest.raises(DigSegError, match=rf"^{digests} is not the file that was registered"):
        check_package(package)
