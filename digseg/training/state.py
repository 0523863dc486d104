"""What a training process must keep to go on as if never stopped, in the files of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digseg.config import TrainingConfig
from digseg.console import say
from digseg.training.checkpoint import Checkpoint, CheckpointStore
from digseg.training.ema import WeightAverage, merged_weights, shares_state
from digseg.training.engine import Engine, convert
from digseg.training.guard import Guard
from digseg.training.saving import host_copy, write_files
from digseg.training.shares import Share
from digseg.training.window import MetricsWindow
from digseg.training.world import World


class TrainingState:
    """Weights and optimizer, the average of the weights, the open window of figures, and the guard's memory."""

    def __init__(self, engine: Engine, config: TrainingConfig, world: World) -> None:
        self._config, self._world = config, world
        self.engine = engine
        self.average = WeightAverage(engine.shares(), config.ema.decay) if config.ema.enabled else None
        self.window = MetricsWindow(world.device)
        self.guard = Guard(config.guard, world)

    def weights(self) -> Mapping[str, Share]:
        """This rank's share of what is validated and exported: the average of the weights where there is one."""
        return self.engine.shares() if self.average is None else self.average.shares

    def snapshot(self) -> Callable[[Path], None]:
        """What writes this rank's files below a directory, later and in any thread: it has a copy of all in the CPU's
        memory."""
        files = self.engine.snapshot()
        shares = shares_state(self.engine.shares()) if self.average is None else self.average.state_dict()
        state = {
            "weights": shares,
            "window": self.window.state_dict(),
            "guard": self.guard.state_dict(),
            "engine": self.engine.state_dict(),
            # The trainer draws nothing; a module with dropout would.
            "rng": torch.get_rng_state(),
        }
        return partial(write_files, {**files, _rank_file(self._world.rank): host_copy(state)})

    def restore(self, checkpoint: Checkpoint, store: CheckpointStore) -> None:
        """Go on from a checkpoint, whatever its world size and ZeRO stage."""
        path, world_size, stage = checkpoint.path, checkpoint.state["world_size"], checkpoint.state["zero_stage"]
        if (world_size, stage) == (self._world.world_size, self._config.zero_stage):
            self.engine.load(path)
            self._restore_rank(_load(path / _rank_file(self._world.rank)))
            return
        if self._world.is_main:
            say(
                f"converting the checkpoint of {world_size} processes with ZeRO stage {stage} for "
                f"{self._world.world_size} with stage {self._config.zero_stage}"
            )
        if stage == 0:
            self.engine.load(path)  # every rank has everything
        else:
            with store.scratch() as scratch:
                if self._world.is_main:
                    convert(path, scratch)
                self._world.barrier()
                self.engine.load_converted(scratch)
        self._restore_other_world([_load(path / _rank_file(rank)) for rank in range(world_size)])

    def _restore_rank(self, state: Mapping[str, Any]) -> None:
        if self.average is not None:
            if "updates" in state["weights"]:
                self.average.load_state_dict(state["weights"])
            else:
                self._start_average()
        self.window.load_state_dict(state["window"])
        self.guard.load_state_dict(state["guard"])
        self.engine.load_state_dict(state["engine"])
        torch.set_rng_state(state["rng"])

    def _restore_other_world(self, states: list[dict[str, Any]]) -> None:
        weights = [state["weights"] for state in states]
        if self.average is not None:
            if "updates" in weights[0]:
                self.average.load_whole(merged_weights(weights), weights[0]["updates"])
            else:
                self._start_average()
        self.window.load_of_other_world([state["window"] for state in states])
        self.guard.load_of_other_world([state["guard"] for state in states])
        self.engine.load_state_dict(states[0]["engine"])

    def _start_average(self) -> None:
        """A run may switch averaging on while it goes on: the average then starts from its weights."""
        self.average = WeightAverage(self.engine.shares(), self._config.ema.decay)


def saved_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The whole parameters of a checkpoint: their average where there is one."""
    files = (checkpoint.path / _rank_file(rank) for rank in range(checkpoint.state["world_size"]))
    return merged_weights(_load(file)["weights"] for file in files)


def _load(file: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return state


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"
