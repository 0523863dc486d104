"""A training process whose run is in MLflow; knows nothing of what started it."""

from __future__ import annotations

from digseg.config import Config
from digseg.registry.tracking import MlflowRun
from digseg.training.run import TrainingResult
from digseg.training.trainer import Trainer
from digseg.training.world import World


def train_tracked(config: Config, world: World, show_progress: bool = True) -> TrainingResult:
    """Be one process of the run: rank 0 logs it to MLflow, unless ``tracking.enabled`` is false.

    Raises:
        DigSegError: see :meth:`digseg.training.trainer.Trainer.train`.
    """
    logger = MlflowRun(config, world.world_size) if world.is_main and config.tracking.enabled else None
    return Trainer(config, world, logger, show_progress).train()
