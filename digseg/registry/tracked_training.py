"""A training process whose run is in MLflow; knows nothing of what started it."""

from __future__ import annotations

from digseg.config import Config
from digseg.training.logging import RunLogger
from digseg.training.run import TrainingResult
from digseg.training.trainer import Trainer
from digseg.training.world import World


def train_tracked(config: Config, world: World, show_progress: bool = True) -> TrainingResult:
    """Be one process of the run: rank 0 logs it to MLflow, unless ``tracking.enabled`` is false.

    Raises:
        DigSegError: see :meth:`digseg.training.trainer.Trainer.train`.
    """
    return Trainer(config, world, _logger(config, world), show_progress).train()


def _logger(config: Config, world: World) -> RunLogger | None:
    if not (world.is_main and config.tracking.enabled):
        return None
    from digseg.registry.tracking import MlflowRun  # takes seconds to import; other ranks do without

    return MlflowRun(config, world.world_size)
