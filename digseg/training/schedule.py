"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from digseg.config import TrainingConfig


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The learning rate of ``step`` (0-based): linear warm-up, then a cosine down to the final ratio.

    Step ``warmup_steps - 1`` is the first at the full rate and the last step of the run has exactly
    ``final_learning_rate_ratio`` of it. A pure function needs no state in checkpoints, and a run that is
    continued with more steps follows the longer curve from there on.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup + 1) / max(1, config.steps - warmup))
    cosine = (1.0 + math.cos(math.pi * progress)) / 2.0
    floor = config.final_learning_rate_ratio
    return peak * (floor + (1.0 - floor) * cosine)
