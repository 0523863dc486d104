"""What a plan says, against what the run really takes on this CPU, and against published sizes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from kl_autoencoder import write_kl_autoencoder
from latent_writing import write_latents
from memory import live_bytes, peak_of_tensors
from ranks import run_ranks
from small_world import small_config, write_squares

from digseg.config import Config, load_config
from digseg.data.corpus import ShardedCorpus
from digseg.data.format import LATENT_MEMBER
from digseg.data.loader import training_batches
from digseg.data.training_data import TrainingData
from digseg.errors import DigSegError
from digseg.model import build_segmenter
from digseg.model.text import load_text_encoder, text_dim
from digseg.model.training_module import SegmenterLoss
from digseg.training.engine import Engine
from digseg.training.plan import CONTEXT_BYTES, checkpoint_bytes, make_plan, memory_of_step
from digseg.training.state import TrainingState
from digseg.training.world import World

SD2_UNET = {
    "block_out_channels": [320, 640, 1280, 1280], "attention": [True, True, True, False], "layers_per_block": 2,
    "cross_attention_dim": 1024, "num_heads": 5, "norm_num_groups": 32,
}  # fmt: skip
TEXT_DIM = 384
SHARDED = (1, 2, 3)  # stages


@pytest.mark.parametrize("stage", range(4))
def test_memory_and_checkpoint_are_what_a_run_takes(tmp_path: Path, repository: Path, stage: int) -> None:
    write_squares(tmp_path / "shards", "train", 8)
    taken = _take(World(), tmp_path, repository, stage)
    assert taken["planned"] == pytest.approx(taken["measured"], rel=0.15)
    assert taken["planned_on_disk"] == pytest.approx(taken["on_disk"], rel=0.05)


@pytest.mark.cluster
def test_memory_and_checkpoint_are_what_each_of_two_ranks_takes(tmp_path: Path, repository: Path) -> None:
    write_squares(tmp_path / "shards", "train", 8)
    run_ranks(_take_stages, 2, tmp_path, tmp_path, repository)
    for stage in SHARDED:
        ranks = [json.loads((tmp_path / f"{stage}-{rank}.json").read_text()) for rank in range(2)]
        for taken in ranks:
            assert taken["planned"] == pytest.approx(taken["measured"], rel=0.15), stage
        assert ranks[0]["planned_on_disk"] == pytest.approx(sum(taken["on_disk"] for taken in ranks), rel=0.05)


def _take_stages(world: World, folder: Path, repository: Path) -> None:
    for stage in SHARDED:
        (folder / f"{stage}-{world.rank}.json").write_text(json.dumps(_take(world, folder, repository, stage)))


def _take(world: World, folder: Path, repository: Path, stage: int) -> dict[str, float]:
    """Bytes that a rank holds at the fullest moment of a step and writes into a checkpoint, beside the planned ones."""
    config = _model_of_the_demo(folder, repository, stage, world.world_size)
    data = TrainingData(config.data, seed=0)
    (batch,) = training_batches(data, config, world.rank, world.world_size, 0, 1)
    encoder = load_text_encoder(config.model)
    before = live_bytes()
    loss = SegmenterLoss(build_segmenter(config, encoder), config, torch.randn(len(data.names), encoder.dim))
    num_parameters = sum(parameter.numel() for parameter in loss.parameters())
    engine = Engine(loss, config, world)
    state = TrainingState(engine, config.training, world)

    def step() -> None:
        engine.forward_backward(batch.to(torch.device("cpu")))
        engine.step(1e-4)
        assert state.average is not None
        state.average.update(engine.shares())

    step()  # Adam's moments are made
    kept = live_bytes() - before
    measured = kept + peak_of_tensors(step)
    planned = memory_of_step(config, encoder.dim, batch.query_ids.shape[1], on_gpu=False)
    files = folder / f"checkpoint-{stage}-{world.rank}"
    state.snapshot()(files)
    engine.close()
    return {
        "measured": measured,
        "planned": planned.total,
        "on_disk": sum(path.stat().st_size for path in files.rglob("*.pt")),
        "planned_on_disk": checkpoint_bytes(config, num_parameters),
    }


def test_network_of_stable_diffusions_size_is_planned_in_seconds(tmp_path: Path) -> None:
    config = _sd2(tmp_path)
    began = time.process_time()
    plan = make_plan(config, 1024, "h100", mfu=0.4)
    assert time.process_time() - began < 60
    assert 865e6 < plan.trainable_parameters < 900e6  # Stable Diffusion 2's U-Net, and the pathway
    assert plan.training_flops == pytest.approx(2.41e12, rel=0.05)
    assert (plan.micro_batch_size, plan.micro_batches) == (4, 2)
    size = 4 * plan.trainable_parameters
    assert plan.memory[0].optimizer == 2 * size
    assert plan.memory[1].optimizer == pytest.approx(3 * size / 64)
    assert plan.memory[2].gradients == plan.memory[3].weights == pytest.approx(size / 64)
    # 64 GPUs of 989 TFLOP/s at 0.4, 512 images a step
    assert plan.images_per_second == pytest.approx(64 * 989e12 * 0.4 / plan.training_flops)
    assert plan.seconds == pytest.approx(1000 * 512 / plan.images_per_second)
    assert plan.deepspeed["train_micro_batch_size_per_gpu"] == 4
    assert plan.images is None


def test_config_for_a_cluster_is_planned_without_weights_and_without_the_hub(tmp_path: Path, repository: Path) -> None:
    config = load_config(repository / "configs/sd2.yaml", ["data.root=/nowhere"])
    plan = make_plan(config, text_dim(config.model))
    assert 865.9e6 < plan.trainable_parameters < 900e6  # Stable Diffusion 2's U-Net, and the pathway
    assert plan.frozen_parameters == 83_653_863  # its autoencoder
    assert (plan.num_gpus, plan.micro_batch_size, plan.micro_batches) == (32, 8, 1)
    assert plan.memory[2].total < plan.gpu.memory_bytes - CONTEXT_BYTES
    workers, shards = plan.warnings
    assert "only 8, 16, 32 divide" in workers
    assert shards == "no shards yet in /nowhere: epochs and the storage of latents are unknown"
    of_another = ["model.pretrained=owner/other"]
    with pytest.raises(
        DigSegError, match=r"model.text.path 'owner/other' .*cannot be fetched from the Hugging Face hub"
    ):
        text_dim(load_config(repository / "configs/sd2.yaml", of_another).model)


def test_shards_that_cannot_be_read_are_a_warning(tmp_path: Path) -> None:
    write_squares(tmp_path / "shards", "train", 8)
    (manifest,) = (tmp_path / "shards").glob("*/*/manifest.json")
    manifest.write_text("{")
    (warning,) = make_plan(small_config(tmp_path), TEXT_DIM).warnings
    assert str(manifest) in warning
    assert warning.endswith(": epochs and the storage of latents are unknown")


def test_plan_warns_of_what_will_not_do(tmp_path: Path) -> None:
    plan = make_plan(_sd2(tmp_path, workers=[1, 5], zero_stage=0, micro_batch_size=8), 1024, "a10g")
    fit, workers, shards = plan.warnings
    assert fit.startswith("does not fit: ZeRO stage 0 needs")
    assert "of 1 to 5, only 1, 2, 4 divide" in workers
    assert shards.startswith("no shards yet in")


def test_shards_give_epochs_and_the_size_of_queries(tmp_path: Path) -> None:
    write_squares(tmp_path / "shards", "train", 8)
    plan = make_plan(small_config(tmp_path), TEXT_DIM)
    assert plan.images == 8
    assert plan.warnings == []
    assert plan.as_json()["memory"]["zero1"]["total"] == plan.memory[1].total


def test_latents_take_the_bytes_that_are_planned(tmp_path: Path) -> None:
    write_squares(tmp_path / "shards", "train", 8)
    write_kl_autoencoder(tmp_path / "sd")
    config = small_config(tmp_path, model={"autoencoder": {"type": "kl", "path": str(tmp_path / "sd/vae")}})
    write_latents(config, tmp_path / "latents")
    corpus = ShardedCorpus(tmp_path / "latents", "squares", "train")
    members = [corpus.stored(number).member(LATENT_MEMBER) for number in range(len(corpus))]
    assert len(members) == 8
    header = 128  # of an npy file
    assert sum(len(member) - header for member in members) == make_plan(config, TEXT_DIM).latent_bytes


def test_overrides_of_deepspeed_and_the_best_checkpoints_count(tmp_path: Path) -> None:
    expert = {"zero_optimization": {"reduce_bucket_size": 1000, "stage3_max_live_parameters": 500}}
    plan = make_plan(small_config(tmp_path, training={"steps": 2, "deepspeed": expert}), TEXT_DIM)
    assert (plan.memory[1].buffers, plan.memory[3].buffers) == (4000, 6000)
    validated = small_config(
        tmp_path,
        training={"steps": 2, "keep_checkpoints": 2, "keep_best": 3, "validation": {"every": 1}},
        evaluation={"corpora": [{"name": "squares", "split": "val"}]},
    )
    assert make_plan(validated, TEXT_DIM).kept_checkpoints == 5


@pytest.mark.parametrize(
    ("arguments", "message"), [({"gpu": "h10"}, "--plan-gpu.*'h100'"), ({"mfu": 40.0}, "--plan-mfu: got 40")]
)
def test_figures_that_cannot_be_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DigSegError, match=message):
        make_plan(small_config(tmp_path), TEXT_DIM, **arguments)


def _sd2(folder: Path, workers: int | list[int] = 64, **training: Any) -> Config:
    settings = {"steps": 1000, "global_batch_size": 512, "micro_batch_size": 4, **training}
    config = small_config(folder, cluster={"workers": workers}, model={"unet": SD2_UNET}, training=settings)
    data = config.data.model_copy(update={"crop_size": 256})  # latents of 64 x 64, as of 512 px
    return config.model_copy(update={"data": data})


def _model_of_the_demo(folder: Path, repository: Path, stage: int, workers: int) -> Config:
    demo = load_config(repository / "configs/demo.yaml")
    return small_config(
        folder,
        cluster={"workers": workers},
        model=demo.model.model_dump(),
        data={"root": str(folder / "shards"), "corpora": [{"name": "squares"}], "crop_size": 128},
        training={"steps": 2, "global_batch_size": 4, "precision": "fp32", "zero_stage": stage},
    )
