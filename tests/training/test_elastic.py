"""A run that goes on with other numbers of processes: the same samples, and the losses of the undisturbed run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from small_world import small_config, write_squares

from digseg.config import Config
from digseg.errors import DigSegError
from digseg.training.engine import Engine, deepspeed
from digseg.training.logging import read_metrics
from digseg.training.run import check_run
from digseg.training.shares import gather_shares
from digseg.training.trainer import Trainer
from digseg.training.world import World

STEPS = 6
BATCH = 12
UNTIL = (2, 4, STEPS)  # steps that a run has taken when the number of processes changes, and when it ends
# The ZeRO stage of each part of a run.
RUNS = {**{f"stage{stage}": (stage, stage, stage) for stage in range(4)}, "changing": (1, 3, 2)}
LEARNING_RATE = 1e-3
MOMENTS = ("exp_avg", "exp_avg_sq")


class Killed(BaseException):
    """Stands for the loss of the process."""


@pytest.mark.cluster
def test_two_one_and_three_processes_take_the_steps_of_one_that_nothing_disturbed(tmp_path: Path) -> None:
    write_squares(tmp_path / "shards", "train", 10)
    Trainer(_config(tmp_path, "whole", 1), World()).train()
    run_ranks(_train_all, 2, tmp_path, tmp_path, 0)
    _train_all(World(), tmp_path, 1)
    run_ranks(_train_all, 3, tmp_path, tmp_path, 2)
    whole = _figures(tmp_path, "whole")
    exported = load_file(tmp_path / "runs/whole/model/unet/diffusion_pytorch_model.safetensors")
    for name in RUNS:
        # float32 sums in another order; Adam makes of a rounding error what it makes of a gradient.
        assert _figures(tmp_path, name) == pytest.approx(whole, rel=1e-4)
        assert _positions(tmp_path, name) == {
            step: list(range(step * BATCH, (step + 1) * BATCH)) for step in range(STEPS)
        }
        model = load_file(tmp_path / f"runs/{name}/model/unet/diffusion_pytorch_model.safetensors")
        assert model.keys() == exported.keys()
        for weight_name, weight in exported.items():
            # At most as far apart as one step of Adam goes.
            torch.testing.assert_close(model[weight_name], weight, rtol=1e-3, atol=LEARNING_RATE)
        # What the change itself does is exact.
        for until in UNTIL[:-1]:
            left, found = (torch.load(tmp_path / f"{name}-{until}-{when}.pt") for when in ("left", "found"))
            assert left["average"].keys() == found["average"].keys() == found["parameters"].keys()
            torch.testing.assert_close(found, left, rtol=0, atol=0)


def test_zero_stage_may_change_on_the_way_of_one_process(tmp_path: Path) -> None:
    write_squares(tmp_path / "shards", "train", 10)
    Trainer(_config(tmp_path, "whole", 1), World()).train()
    for part in range(len(UNTIL)):
        _train(World(), tmp_path, _config(tmp_path, "changing", RUNS["changing"][part]), UNTIL[part])
    assert _figures(tmp_path, "changing") == pytest.approx(_figures(tmp_path, "whole"), rel=1e-4)


def test_stage_0_goes_on_only_as_stage_0(tmp_path: Path) -> None:
    write_squares(tmp_path / "shards", "train", 10)
    _train(World(), tmp_path, _config(tmp_path, "plain", 0), 2)
    with pytest.raises(
        DigSegError, match=r"with ZeRO stage 0 and cannot be turned into stage 1.*training\.zero_stage=0"
    ):
        check_run(_config(tmp_path, "plain", 1), 1)


def _train_all(world: World, folder: Path, part: int) -> None:
    for name, stages in RUNS.items():
        _train(world, folder, _config(folder, name, stages[part]), UNTIL[part])


def _train(world: World, folder: Path, config: Config, until: int) -> None:
    """Train, note which positions this rank saw, and lose the process after ``until`` steps."""
    trainer = Trainer(config, world)
    train_step = trainer.train_step
    seen = []

    def noted(batch: Any, step: int) -> dict[str, torch.Tensor]:
        if step > 0 and not seen:
            _note_state(trainer, folder / f"{config.run.name}-{step}-found.pt")
        if step == until:
            _note_state(trainer, folder / f"{config.run.name}-{step}-left.pt")
            raise Killed
        seen.append([step, batch.positions.tolist()])
        return train_step(batch, step)

    trainer.train_step = noted  # type: ignore[method-assign]
    try:
        trainer.train()
    except Killed:
        trainer.engine.close()
    file = folder / f"{config.run.name}-{world.world_size}-{world.rank}.json"
    file.write_text(json.dumps(seen))


def _note_state(trainer: Trainer, file: Path) -> None:
    """Write down the whole state of a run, put together by DeepSpeed from what its ranks have in memory."""
    engine, average = trainer.engine, trainer._state.average
    assert average is not None
    state: dict[str, Any] = {
        "updates": average.state_dict()["updates"],
        "average": gather_shares(average.shares, trainer.world),
        "weights": gather_shares(engine.shares(), trainer.world),
        "engine": engine.state_dict(),
        "parameters": {
            name: _whole_parameter(engine, parameter)
            for name, parameter in engine._deepspeed.module.named_parameters()
            if parameter.requires_grad
        },
    }
    if trainer.world.is_main:
        torch.save(state, file)


def _whole_parameter(engine: Engine, parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    """The weight that Adam changes, and both of its moments."""
    if engine._stage == 0:
        state = engine._optimizer.state[parameter]
        return [parameter.data, *(state[key] for key in MOMENTS)]
    if engine._stage < 3:
        engine._deepspeed.optimizer._lazy_init_hp_params_optimizer_state()
    utils = deepspeed.utils
    moments = [utils.safe_get_full_optimizer_state(parameter, key) for key in MOMENTS]
    whole = [utils.safe_get_full_fp32_param(parameter), *moments]
    assert all(values is not None for values in whole)
    return whole


def _config(folder: Path, name: str, stage: int) -> Config:
    return small_config(
        folder,
        run={"name": name},
        cluster={"workers": [1, 3]},
        training={
            "steps": STEPS,
            "global_batch_size": BATCH,
            "learning_rate": LEARNING_RATE,
            "warmup_steps": 2,
            "checkpoint_every": 2,
            "log_every": 3,
            "threads": 1,
            "precision": "fp32",
            "zero_stage": stage,
        },
    )


def _figures(folder: Path, name: str) -> list[float]:
    lines = read_metrics(folder / "runs" / name / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 3, 6]
    return [line[key] for line in lines for key in ("loss", "class_score", "gradient_norm")]


def _positions(folder: Path, name: str) -> dict[int, list[int]]:
    """The positions of each step over all ranks, in the order of ranks."""
    positions: dict[int, list[int]] = {}
    for file in sorted(folder.glob(f"{name}-*.json")):
        for step, seen in json.loads(file.read_text()):
            positions.setdefault(step, []).extend(seen)
    return dict(sorted(positions.items()))
