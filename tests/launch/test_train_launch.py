"""launch/train.py as a user starts it, in one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusion_checkpoint import write_checkpoint
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file
from small_world import small_config, write_squares

from digseg.config import dump_config
from digseg.pipeline import DiGSegPipeline


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    config = small_config(
        tmp_path, cluster={"backend": "local"}, training={"steps": 3, "threads": 1, "precision": "fp32"}
    )
    path = tmp_path / "small.yaml"
    path.write_text(dump_config(config))
    return path


def _said(program: str, unneeded: set[str], repository: Path, *arguments: object) -> str:
    """What a program with the ``main`` of launch/train.py prints; it must import none of the ``unneeded`` modules."""
    checked = (
        f"import sys; from launch.train import main; {program}; "
        f"found = {unneeded} & set(sys.modules); assert not found, f'{{found}} imported in vain'"
    )
    command = [sys.executable, "-c", checked, *map(str, arguments)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of SQLAlchemy, by MLflow's store
def test_local_run_trains_without_ray_and_says_where_everything_is(
    config_file: Path, tmp_path: Path, repository: Path
) -> None:
    write_squares(tmp_path / "shards", "train", 8)
    said = _said("main(sys.argv[1:])", {"ray"}, repository, "--config", config_file, "run.name=alone")
    (run,) = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db").search_runs(["1"])
    assert run.info.run_name == "alone"
    assert run.data.params["attention_kernel"] == "math"
    for expected in ("attention: math (auto: ", str(tmp_path / "runs/alone"), run.info.run_id, "at step 3", "images/s"):
        assert expected in said
    seconds = json.loads((tmp_path / "runs/alone/ledger.json").read_bytes())["seconds"]
    assert {name: run.data.metrics[f"ledger.{name}_s"] for name in seconds} == pytest.approx(seconds)
    goodput = seconds["productive"] / sum(seconds.values())
    assert run.data.metrics["goodput"] == pytest.approx(goodput)
    assert f"productive {100 * goodput:.0f} % of {sum(seconds.values()):.0f} s" in said


def test_a_plan_starts_nothing_and_is_there_for_programs_too(
    config_file: Path, tmp_path: Path, repository: Path
) -> None:
    manifest = write_squares(tmp_path / "shards", "train", 8)
    both = "main(sys.argv[1:]); main([*sys.argv[1:], '--json'])"
    said = _said(both, {"ray", "deepspeed", "mlflow"}, repository, "--config", config_file, "--plan")
    table, _, plan = said.partition("\n{\n")
    planned = json.loads("{\n" + plan)
    assert set(planned["memory"]) == {"zero0", "zero1", "zero2", "zero3"}
    assert planned["step_flops"] == 8 * planned["training_flops"] > 8 * planned["forward_flops"] > 0
    assert (planned["steps"], planned["images"]) == (3, manifest.samples)
    total = planned["memory"]["zero1"]["total"] / 1e6
    for row in (
        f"{planned['trainable_parameters'] / 1e6:.3f} M",
        f"{total:.1f} MB",
        f"{planned['images_per_second']:,.0f} images/s",
        f"DeepSpeed is started with {json.dumps(planned['deepspeed'])}",
    ):
        assert row in table, row
    assert not (tmp_path / "runs").exists()


def test_stable_diffusion_is_fine_tuned_by_its_config_and_predicts(tmp_path: Path, repository: Path) -> None:
    """A narrow one through DeepSpeed, a checkpoint that is continued, and an export that needs the base no more."""
    for split in ("train", "val"):
        write_squares(tmp_path / "shards", split, 8)
    base = write_checkpoint(tmp_path / "sd", "2.0-base")
    smaller = [
        "cluster.backend=local",
        f"run.storage={tmp_path / 'runs'}",
        f"data.root={tmp_path / 'shards'}",
        "data.latents=null",
        "data.cache_dir=null",
        "data.workers=0",
        "data.corpora=[{name: squares}]",
        "data.crop_size=64",
        "data.short_side=64",
        "data.queries.synonyms={squares: {square: [box], round hole: [ring]}}",
        f"model.pretrained={base}",
        "training.precision=fp32",
        "training.global_batch_size=2",
        "training.micro_batch_size=1",
        "training.learning_rate=1e-3",
        "training.warmup_steps=0",
        "training.checkpoint_every=1",
        "training.threads=1",
        "training.validation={every: 1, samples: 1}",
        "evaluation.corpora=[{name: squares, split: val}]",
        "tracking.enabled=false",
    ]
    for steps in ("training.steps=1", "training.steps=2"):
        command = [sys.executable, "launch/train.py", "--config", "configs/sd2.yaml", *smaller, steps]
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "goes on after step 1" in done.stdout
    base.rename(tmp_path / "elsewhere")
    pipeline = DiGSegPipeline.from_pretrained(tmp_path / "runs" / "sd2" / "model")
    grown = load_file(tmp_path / "elsewhere/unet/diffusion_pytorch_model.safetensors")["conv_in.weight"]
    assert not torch.equal(pipeline.unet.conv_in.weight[:, :4], grown / 2)
    assert torch.allclose(pipeline.unet.conv_in.weight[:, :4], grown / 2, atol=1e-2)
    assert pipeline(np.zeros((40, 50, 3), np.uint8), ["square", "hole"]).mask.shape == (40, 50)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.step=3", "training.step"),
        ("training.deepspeed={optimizer: {type: Adam}}", "training.deepspeed.optimizer: derived by DigSeg"),
        ("data.root=/nowhere", "/nowhere"),
        ("model={pretrained: /nowhere/sd}", "model.text.path '/nowhere/sd': there is no such folder; give a diffusers"),
        ("model.attention=xformers", "xformers has no kernel for cpu"),
    ],
)
def test_mistake_ends_with_its_message_and_exit_code_2(
    config_file: Path, tmp_path: Path, repository: Path, override: str, message: str
) -> None:
    write_squares(tmp_path / "shards", "train", 8)
    command = [sys.executable, "launch/train.py", "--config", str(config_file), override]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "runs").glob("*/checkpoints"))
