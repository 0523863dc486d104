"""The guard over several ranks: every rank comes to the same verdict and goes back with the others."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from runs import STEPS, run_config, train_poisoned
from small_world import write_squares

from digseg.config.schema import GuardConfig
from digseg.training.guard import Guard
from digseg.training.logging import read_metrics
from digseg.training.run import finished_result
from digseg.training.world import World

POISONED = (4, 5, 6)


@pytest.mark.cluster
def test_two_ranks_go_back_together_from_samples_of_one_and_train_on(tmp_path: Path) -> None:
    write_squares(tmp_path / "shards", "train", 10)
    run_ranks(_train, 2, tmp_path, tmp_path)
    for stage in (1, 3):
        name = f"poisoned{stage}"
        skipped = json.loads((tmp_path / f"runs/{name}/skipped.json").read_text())
        assert [entry["step"] for entry in skipped] == list(POISONED)
        assert all(len(entry["keys"]) == 8 for entry in skipped)  # the samples of both ranks
        assert (tmp_path / f"{name}-1.txt").read_text() in skipped[0]["keys"][4:]
        lines = read_metrics(tmp_path / f"runs/{name}/metrics.jsonl")
        assert [(line["step"], line["steps_left_out"]) for line in lines] == [(1, 0), (4, 0), (8, 0), (9, 0)]
        assert all(math.isfinite(line["loss"]) for line in lines)
        result = finished_result(run_config(tmp_path, name, zero_stage=stage))
        assert result is not None
        assert (result.steps, result.world_size) == (STEPS, 2)


def test_open_verdicts_go_on_in_a_world_of_another_size() -> None:
    states = []
    for rank in range(2):
        guard = Guard(GuardConfig(), World())
        guard.judge(torch.tensor(2.0))
        guard.note(7, [f"key{rank}"], torch.tensor(True))
        guard.note(8, [f"other{rank}"], torch.tensor(False))
        states.append(guard.state_dict())
    alone = Guard(GuardConfig(), World())
    alone.load_of_other_world(states)
    (bad,) = alone.close()
    assert (bad.step, bad.keys) == (7, ("key0", "key1"))
    second = Guard(GuardConfig(), World(rank=1))
    second.load_of_other_world(states)
    assert [keys for _, keys, _ in second.state_dict()["open"]] == [[], []]


def _train(world: World, folder: Path) -> None:
    for stage in (1, 3):
        name = f"poisoned{stage}"
        key = train_poisoned(run_config(folder, name, zero_stage=stage), POISONED, world=world, ranks=[1])
        (folder / f"{name}-{world.rank}.txt").write_text(key)
