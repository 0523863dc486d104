"""Every ZeRO stage against a plain PyTorch loop, in one process and in two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_world import small_config
from stand_in import BATCH, CLIPPING, STEPS, StandIn, batches, plain_loop, training_section

from digseg.errors import DigSegError
from digseg.training.ema import WeightAverage, merged_weights, shares_state
from digseg.training.engine import Engine
from digseg.training.schedule import learning_rate
from digseg.training.world import World


@pytest.mark.parametrize("micro_batch_size", [BATCH, BATCH // 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_process_takes_the_steps_of_a_plain_loop(tmp_path: Path, stage: int, micro_batch_size: int) -> None:
    state = _train(tmp_path, World(), stage, micro_batch_size)
    _assert_equals_plain_loop(tmp_path, stage, [state])


@pytest.mark.cluster
def test_two_processes_take_the_steps_of_a_plain_loop(tmp_path: Path) -> None:
    stages = [0, 1, 2, 3]
    mp.spawn(_train_rank, (str(tmp_path), stages), nprocs=2)
    for stage in stages:
        files = [tmp_path / f"stage{stage}-rank{rank}.pt" for rank in range(2)]
        _assert_equals_plain_loop(tmp_path, stage, [torch.load(file) for file in files])


def test_saved_engine_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = _train(tmp_path, World(), 1, BATCH // 2)
    first = _train(tmp_path, World(), 1, BATCH // 2, until=3, save=tmp_path / "saved")
    second = _train(tmp_path, World(), 1, BATCH // 2, start=3, load=tmp_path / "saved")
    assert first["losses"] + second["losses"] == whole["losses"]
    ended, expected = merged_weights([second["weights"]]), merged_weights([whole["weights"]])
    assert all(torch.equal(ended[name], weight) for name, weight in expected.items())


def test_settings_that_deepspeed_refuses_are_the_users_error(tmp_path: Path) -> None:
    training = training_section(1, deepspeed={"zero_optimization": {"reduce_bucket_size": "many"}})
    config = small_config(tmp_path, cluster={"backend": "local"}, training=training)
    with pytest.raises(DigSegError, match=r"training\.deepspeed: refused by DeepSpeed: .*reduce_bucket_size"):
        Engine(StandIn(), config, World())


def _train_rank(rank: int, folder: str, stages: list[int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world = World(rank=rank, world_size=2, local_rank=rank, local_world_size=2)
    for stage in stages:
        torch.save(_train(Path(folder), world, stage, BATCH // 4), f"{folder}/stage{stage}-rank{rank}.pt")
    dist.destroy_process_group()


def _train(
    folder: Path,
    world: World,
    stage: int,
    micro_batch_size: int,
    start: int = 0,
    until: int = STEPS,
    save: Path | None = None,
    load: Path | None = None,
) -> dict[str, Any]:
    """This rank's mean losses, gradient norms and shares after steps ``start`` to ``until``."""
    training = training_section(stage, micro_batch_size=micro_batch_size)
    config = small_config(folder, cluster={"workers": world.world_size}, training=training)
    engine = Engine(StandIn(), config, world)
    average = WeightAverage(engine.shares(), config.training.ema.decay)
    if load is not None:
        engine.load(load)
    losses, norms = [], []
    share = BATCH // world.world_size
    for step in range(start, until):
        images, targets = batches()[step]
        total = 0.0
        for first in range(share * world.rank, share * (world.rank + 1), micro_batch_size):
            part = slice(first, first + micro_batch_size)
            total += engine.forward_backward((images[part], targets[part]))["loss"].item()
            engine.step(learning_rate(step, config.training))
        losses.append(total * micro_batch_size / share)
        norms.append(engine.gradient_norm())
        average.update(engine.shares())
    if save is not None:
        engine.save(save)
    state = {
        "losses": losses,
        "norms": norms,
        "weights": shares_state(engine.shares()),
        "average": average.state_dict(),
    }
    # Shares are views of the engine's buffers.
    for share_state in state["weights"]["shares"].values():
        share_state["values"] = share_state["values"].clone()
    engine.close()
    return state


def _assert_equals_plain_loop(folder: Path, stage: int, states: list[dict[str, Any]]) -> None:
    losses, norms, weights, average = plain_loop(small_config(folder, training=training_section(stage)).training)
    assert min(norms) < CLIPPING < max(norms)
    got = torch.tensor([state["losses"] for state in states]).mean(0)
    torch.testing.assert_close(got, torch.tensor(losses), rtol=1e-5, atol=1e-5)
    for state in states:
        torch.testing.assert_close(state["norms"], norms, rtol=1e-4, atol=1e-4)
    for key, expected in (("weights", weights), ("average", average)):
        merged = merged_weights(state[key] for state in states)
        assert merged.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(merged[name], value.detach(), rtol=1e-4, atol=1e-5)
