"""Every command of the README and of docs/ runs, as it stands there, in a copy; overrides make the work small."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ray_head import start_head

SMALL = " ".join(
    [
        "training.steps=4",
        "training.checkpoint_every=2",
        "training.log_every=1",
        "training.global_batch_size=4",
        "prepare.sample_corpora.images_per_domain=10",
        "prepare.sample_corpora.size=96",
        "data.crop_size=64",
        "data.short_side=64",
        "evaluation.pictures_per_corpus=1",
        "model.unet.block_out_channels=[16,16,16,32]",
        "model.unet.norm_num_groups=16",
        "run.storage=outputs/runs",
    ]
)
TIMEOUT_S = 400
# Running the tests from a test would not end.
NOT_HERE = {"make test"}


def commands(text: str) -> list[str]:
    """The lines of all bash blocks, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A copy of the files under version control, on the environment that runs this test."""
    copy = tmp_path_factory.mktemp("readme") / "digseg"
    listed = subprocess.run(["git", "ls-files"], cwd=repository, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (repository / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(repository / name, copy / name)
    (copy / ".venv").symlink_to(repository / ".venv")
    return copy


@pytest.fixture(scope="module")
def environment(project: Path) -> dict[str, str]:
    """Small work, the copy's own code, and nothing inherited that points elsewhere."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "DIGSEG_"))}
    return {**kept, "DIGSEG_OVERRIDES": SMALL, "DIGSEG_HOME": str(project), "PYTHONPATH": str(project)}


@pytest.fixture
def ray_head(environment: dict[str, str], tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of somebody whose RAY_API_SERVER_ADDRESS names a running cluster."""
    with start_head(tmp_path, environment, num_cpus=2) as head:
        yield {**environment, **head.environment}


@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_every_command_of_the_readme_runs(project: Path, environment: dict[str, str], ray_head: dict[str, str]) -> None:
    _folder_corpus(project / "my_corpus")
    readme = (project / "README.md").read_text()
    listed = commands(readme)
    assert len(listed) >= 8
    for document in sorted((project / "docs").glob("*.md")):
        listed += commands(document.read_text())
    assert "make demo" in listed
    for command in listed:
        if command in NOT_HERE:
            continue
        submitted = "ray job submit" in command
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=project,
            env=ray_head if submitted else environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    summary = json.loads((project / "outputs" / "demo" / "summary.json").read_text())
    assert summary["train"]["steps"] == 4
    assert summary["model"]["alias"] == "champion"
    assert 0 <= summary["evaluation"]["mean_iou"] <= 1
    assert set(summary["evaluation"]["held_out"]) == {"sample_town"}
    assert Path(summary["picture"]).stat().st_size > 10_000
    assert list((project / "outputs" / "predictions").glob("*.overlay.png"))
    python = "\n".join(re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL))
    asked = "assert answer.classes[0] == ['background', 'road', 'car']"
    done = subprocess.run(
        [".venv/bin/python", "-c", f"{python}\n{asked}"],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_readme_shows_files_that_exist(repository: Path) -> None:
    text = (repository / "README.md").read_text()
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert shown
    named = re.findall(r"`((?:digseg|launch|data_prep|configs|docs)/[\w/.]+)`", text)
    assert len(named) >= 5
    assert [path for path in shown + named if not (repository / path).exists()] == []


def _folder_corpus(root: Path) -> None:
    """What a reader of "Prepare your data" has."""
    random = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder / "train").mkdir(parents=True)
    (root / "classes.yaml").write_text(
        "name: my_corpus\nclasses: [background, house, road]\nignore: [255]\n"
        "domain: remote_sensing\nlicence: CC-BY-4.0\n"
    )
    for number in range(4):
        pixels = random.integers(0, 256, (32, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / "train" / f"{number}.png")
        Image.fromarray(random.integers(0, 3, (32, 48), dtype=np.uint8)).save(
            root / "masks" / "train" / f"{number}.png"
        )
