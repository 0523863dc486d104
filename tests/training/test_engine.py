"""Every ZeRO stage against a plain PyTorch loop at the same global batch, in one process and in two."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from small_world import small_config
from stand_in import BATCH, CLIPPING, NO_CLIPPING, STEPS, StandIn, batches, plain_loop, training_section

from digseg.config import Config
from digseg.errors import DigSegError
from digseg.training.ema import WeightAverage, merged_weights, shares_state
from digseg.training.engine import Engine
from digseg.training.saving import write_files
from digseg.training.schedule import learning_rate
from digseg.training.world import World


@dataclass(frozen=True)
class Case:
    """One way to train the stand-in."""

    stage: int
    micro_batch_size: int
    clipping: float = CLIPPING
    precision: str = "fp32"
    offload: bool = False

    def config(self, folder: Path) -> Config:
        training = training_section(
            self.stage,
            micro_batch_size=self.micro_batch_size,
            gradient_clipping=self.clipping,
            precision=self.precision,
            offload_optimizer=self.offload,
        )
        return small_config(folder, cluster={"workers": 1, "backend": "local"}, training=training)

    def __str__(self) -> str:
        parts = [f"zero{self.stage}", f"micro{self.micro_batch_size}", f"clip{self.clipping:g}", self.precision]
        return "-".join([*parts, "offload"] if self.offload else parts)


# One micro-batch and no clipping: the engine does the arithmetic of the loop, in its order.
SAME_ARITHMETIC = [
    *(Case(stage, BATCH, NO_CLIPPING) for stage in range(4)),
    *(Case(stage, BATCH, NO_CLIPPING, offload=True) for stage in range(1, 4)),
    *(Case(stage, BATCH, NO_CLIPPING, precision) for stage in range(4) for precision in ("bf16", "fp16")),
]
# Sums in another order: over micro-batches, over ranks, in the norm.
OTHER_ORDER = [
    *(Case(stage, BATCH // 4) for stage in range(4)),
    *(Case(stage, BATCH // 4, offload=True) for stage in range(1, 4)),
]
BF16_OTHER_ORDER = [Case(stage, BATCH // 4, precision="bf16") for stage in range(4)]


@pytest.mark.parametrize("case", SAME_ARITHMETIC, ids=str)
def test_one_process_has_the_losses_of_a_plain_loop_bit_for_bit(tmp_path: Path, case: Case) -> None:
    losses, *_ = plain_loop(case.config(tmp_path).training)
    assert _train(tmp_path, World(), case)["losses"] == losses


@pytest.mark.parametrize("case", [*OTHER_ORDER, *BF16_OTHER_ORDER, Case(1, BATCH)], ids=str)
def test_one_process_takes_the_steps_of_a_plain_loop(tmp_path: Path, case: Case) -> None:
    _assert_equals_plain_loop(tmp_path, case, [_train(tmp_path, World(), case)])


@pytest.mark.cluster
def test_two_processes_take_the_steps_of_a_plain_loop(tmp_path: Path) -> None:
    cases = [*OTHER_ORDER, *BF16_OTHER_ORDER, Case(1, BATCH // 2), Case(3, BATCH // 2)]
    run_ranks(_train_rank, 2, tmp_path, tmp_path, cases)
    for case in cases:
        _assert_equals_plain_loop(tmp_path, case, [torch.load(tmp_path / f"{case}-rank{rank}.pt") for rank in range(2)])


@pytest.mark.cluster
def test_rank_that_does_not_come_to_a_collective_is_given_up_after_the_limit(tmp_path: Path) -> None:
    run_ranks(_wait_for_another, 2, tmp_path, tmp_path)


def _wait_for_another(world: World, folder: Path) -> None:
    """Rank 0 takes a step that rank 1 does not take until rank 0 has given up."""
    engine = Engine(StandIn(), Case(1, BATCH // 2).config(folder), world)
    world.limit_waits(5)
    given_up = folder / "given-up"
    while world.rank == 1 and not given_up.exists():
        time.sleep(0.05)
    if world.rank == 0:
        with pytest.raises(RuntimeError, match=r"[Tt]imed out|[Tt]imeout"):
            engine.forward_backward(batches()[0])  # gradients are reduced as they come
        given_up.touch()


@pytest.mark.parametrize("stage", range(4))
def test_step_whose_gradient_is_not_finite_changes_nothing(tmp_path: Path, stage: int) -> None:
    case = Case(stage, BATCH)
    engine = Engine(StandIn(), case.config(tmp_path), World())
    images, targets = batches()[0]
    states, skipped = [], []
    for batch in ((images, targets), (images, targets * float("inf")), (images, targets)):
        engine.forward_backward(batch)
        engine.step(0.01)
        weights = shares_state(engine.shares())["shares"]
        states.append(torch.cat([share["values"].clone() for share in weights.values()]))
        skipped.append(bool(engine.was_bad()))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[1], states[2])
    # One whose gradient is finite, but which is not wanted.
    engine.forward_backward((images, targets))
    engine.step(0.01, torch.tensor(True))
    assert [*skipped, bool(engine.was_bad())] == [False, True, False, True]
    weights = shares_state(engine.shares())["shares"]
    assert torch.equal(states[2], torch.cat([share["values"] for share in weights.values()]))
    engine.close()


def test_stage_3_rounds_as_it_does_only_while_it_trains(tmp_path: Path) -> None:
    linear = torch.nn.functional.linear
    engine = Engine(StandIn(), Case(3, BATCH).config(tmp_path), World())
    assert torch.nn.functional.linear is not linear
    engine.close()
    assert torch.nn.functional.linear is linear


def test_loss_scale_halves_after_an_overflow_and_is_saved(tmp_path: Path) -> None:
    config = Case(1, BATCH, precision="fp16").config(tmp_path)
    engine = Engine(StandIn("fp16"), config, World())
    images, targets = batches()[0]
    before = engine.state_dict()["loss_scale"]["scale"].item()
    engine.forward_backward((images, targets * 1e30))
    engine.step(0.01)
    state = engine.state_dict()
    assert state["loss_scale"]["scale"].item() == before / 2
    assert not engine.was_bad()
    # A scale that cannot be why is no excuse.
    state["loss_scale"]["scale"].fill_(1.0)
    engine.load_state_dict(state)
    engine.forward_backward((images, targets * 1e30))
    engine.step(0.01)
    assert engine.was_bad()
    engine.close()
    other = Engine(StandIn("fp16"), config, World())
    other.load_state_dict(state)
    assert other.state_dict() == state
    other.close()


def test_saved_engine_goes_on_bit_for_bit(tmp_path: Path) -> None:
    case = Case(1, BATCH // 2)
    whole = _train(tmp_path, World(), case)
    first = _train(tmp_path, World(), case, until=3, save=tmp_path / "saved")
    second = _train(tmp_path, World(), case, start=3, load=tmp_path / "saved")
    assert first["losses"] + second["losses"] == whole["losses"]
    ended, expected = merged_weights([second["weights"]]), merged_weights([whole["weights"]])
    assert all(torch.equal(ended[name], weight) for name, weight in expected.items())


def test_settings_that_deepspeed_refuses_are_the_users_error(tmp_path: Path) -> None:
    training = training_section(1, deepspeed={"zero_optimization": {"reduce_bucket_size": "many"}})
    config = small_config(tmp_path, cluster={"backend": "local"}, training=training)
    with pytest.raises(DigSegError, match=r"training\.deepspeed: refused by DeepSpeed: .*reduce_bucket_size"):
        Engine(StandIn(), config, World())


def _train_rank(world: World, folder: Path, cases: list[Case]) -> None:
    for case in cases:
        torch.save(_train(folder, world, case), folder / f"{case}-rank{world.rank}.pt")


def _train(
    folder: Path,
    world: World,
    case: Case,
    start: int = 0,
    until: int = STEPS,
    save: Path | None = None,
    load: Path | None = None,
) -> dict[str, Any]:
    """This rank's mean losses, gradient norms and shares after steps ``start`` to ``until``."""
    config = case.config(folder)
    engine = Engine(StandIn(case.precision), config, world)
    average = WeightAverage(engine.shares(), config.training.ema.decay)
    if load is not None:
        engine.load(load)
    losses, norms = [], []
    share, size = BATCH // world.world_size, case.micro_batch_size
    for step in range(start, until):
        images, targets = batches()[step]
        total = 0.0
        for first in range(share * world.rank, share * (world.rank + 1), size):
            part = slice(first, first + size)
            total += engine.forward_backward((images[part], targets[part]))["loss"].item()
            engine.step(learning_rate(step, config.training))
        losses.append(total * size / share)
        norms.append(engine.gradient_norm())
        average.update(engine.shares())
    if save is not None:
        write_files(engine.snapshot(), save)
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


def _assert_equals_plain_loop(folder: Path, case: Case, states: list[dict[str, Any]]) -> None:
    losses, norms, weights, average = plain_loop(case.config(folder).training)
    # bfloat16 has 8 significant bits, and rounds a micro-batch's sums otherwise than the whole batch's; where a
    # gradient is next to nothing, Adam makes a step of the learning rate (0.01) of the difference.
    rtol, atol, weight_atol = (1e-5, 1e-5, 1e-5) if case.precision == "fp32" else (1e-2, 2e-3, 1e-2)
    assert min(norms) < CLIPPING < max(norms)
    got = torch.tensor([state["losses"] for state in states]).mean(0)
    torch.testing.assert_close(got, torch.tensor(losses), rtol=rtol, atol=atol)
    for state in states:
        torch.testing.assert_close(state["norms"], norms, rtol=10 * rtol, atol=10 * atol)
    for key, expected in (("weights", weights), ("average", average)):
        merged = merged_weights(state[key] for state in states)
        assert merged.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(merged[name], value.detach(), rtol=10 * rtol, atol=weight_atol)
