"""Switches of a training process that cost or save memory and time and leave the numbers as they are."""

from __future__ import annotations

import torch

from digseg.config import TrainingConfig
from digseg.model.segmenter import Segmenter


def apply_switches(segmenter: Segmenter, config: TrainingConfig) -> None:
    """Switch on what ``config`` asks for, in place. Names of parameters stay as they are."""
    if config.activation_checkpointing:
        segmenter.unet.enable_gradient_checkpointing()
    if config.channels_last:
        # The layout of the activations decides, and convolutions keep it: an engine lays out the weights itself.
        segmenter.memory_format = torch.channels_last
