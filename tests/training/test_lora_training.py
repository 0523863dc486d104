"""Training of adapters with the real trainer: what is saved, how it goes on, and what is exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusion_checkpoint import write_checkpoint
from pydantic import ValidationError
from runs import run_config, train_until_killed
from safetensors.torch import load_file, save_file
from small_world import write_squares

from digseg.config import Config
from digseg.errors import DigSegError
from digseg.evaluation.inference import Predictor
from digseg.training.plan import make_plan
from digseg.training.run import finished_result
from digseg.training.trainer import Trainer
from digseg.training.world import World

UNET = "unet/diffusion_pytorch_model.safetensors"
STEPS = 3
TEXT_DIM = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a base, and the run ``whole`` that nothing disturbed."""
    folder = tmp_path_factory.mktemp("lora")
    write_squares(folder / "shards", "train", 6)
    write_checkpoint(folder / "sd")
    Trainer(_config(folder, "whole", 1), World()).train()
    return folder


def test_the_exported_unet_is_a_plain_one_in_which_only_the_targets_changed(folder: Path) -> None:
    base = load_file(folder / "sd" / UNET)
    exported = load_file(folder / "runs/whole/model" / UNET)
    assert exported.keys() == base.keys()
    changed = {name for name, weight in exported.items() if not torch.equal(weight, base[name])}
    assert {"conv_in.weight", "conv_in.bias"} < changed
    assert {name.rpartition(".attn")[2][2:] for name in changed if ".attn" in name} == {"to_q.weight", "to_v.weight"}
    assert all("conv_in" in name or ".to_q." in name or ".to_v." in name for name in changed)
    predictor = Predictor.load(folder / "runs/whole/model")
    assert predictor.card.model.lora is not None
    assert "with LoRA of rank 2 merged" in (folder / "runs/whole/model/README.md").read_text()


def test_checkpoints_hold_what_is_trained_and_the_plan_counts_it(folder: Path) -> None:
    config = _config(folder, "whole", 1)
    result = finished_result(config)
    assert result is not None
    checkpoint = Path(result.checkpoint_dir)
    shares = torch.load(checkpoint / "rank-00000.pt", weights_only=True)["weights"]["shares"]
    assert {name.split(".")[1] for name in shares} == {"unet", "pathway"}
    trained = [name for name in shares if ".unet." in name]
    assert all(".lora_" in name or ".conv_in." in name for name in trained)
    base_bytes = (folder / "sd" / UNET).stat().st_size
    assert sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()) < base_bytes
    plan = make_plan(config, TEXT_DIM)
    assert plan.trainable_parameters == sum(share["values"].numel() for share in shares.values())
    vae = load_file(folder / "sd/vae/diffusion_pytorch_model.safetensors")
    base = {name: weight for name, weight in load_file(folder / "sd" / UNET).items() if "conv_in" not in name}
    assert plan.frozen_parameters == sum(weight.numel() for part in (vae, base) for weight in part.values())


@pytest.mark.parametrize(("stage", "then"), [(0, 0), (2, 1)])
def test_a_run_that_was_killed_exports_the_same_bits(folder: Path, stage: int, then: int) -> None:
    name = f"killed-{stage}"
    train_until_killed(_config(folder, name, stage), 2)
    Trainer(_config(folder, name, then), World()).train()
    for part in (UNET, "pathway/diffusion_pytorch_model.safetensors"):
        expected = load_file(folder / "runs/whole/model" / part)
        for weight, value in load_file(folder / "runs" / name / "model" / part).items():
            assert torch.equal(value, expected[weight]), weight


def test_zero_3_is_refused(folder: Path) -> None:
    values = _config(folder, "whole", 1).model_dump(mode="json")
    values["training"]["zero_stage"] = 3
    with pytest.raises(
        ValidationError, match=r"zero_stage is 3, which is not supported with model\.lora .* set it to 0, 1 or 2"
    ):
        Config.model_validate(values)


def test_adapters_do_not_go_on_with_another_base(folder: Path) -> None:
    weights = folder / "sd" / UNET
    before = weights.read_bytes()
    changed = load_file(weights)
    changed["conv_out.bias"] += 1
    save_file(changed, weights)
    try:
        with pytest.raises(DigSegError, match=r"the weights in model.pretrained \(.*\) changed since the checkpoint"):
            Trainer(_config(folder, "whole", 1, steps=STEPS + 1), World()).train()
    finally:
        weights.write_bytes(before)


def _config(folder: Path, name: str, stage: int, steps: int = STEPS) -> Config:
    """Without clipping, so that all stages compute the same to the bit; validated, with adapters merged for it."""
    config = run_config(
        folder,
        name,
        {
            "data": {"crop_size": 64, "short_side": 64},
            "evaluation": {"corpora": [{"name": "squares", "split": "train"}]},
        },
        steps=steps,
        zero_stage=stage,
        global_batch_size=2,
        micro_batch_size=2,
        checkpoint_every=2,
        gradient_clipping=1e9,
        validation={"every": STEPS, "samples": 1, "pictures": 0},
    )
    lora = {"rank": 2, "targets": ["to_q", "to_v"]}
    model = config.model.model_validate({"pretrained": str(folder / "sd"), "lora": lora})
    return config.model_copy(update={"model": model})
