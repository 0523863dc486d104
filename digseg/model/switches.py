"""Switches of a training process that cost or save memory and time and leave the numbers as they are."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch
from diffusers.models.attention import BasicTransformerBlock

from digseg.config import TrainingConfig
from digseg.errors import DigSegError
from digseg.model.segmenter import Segmenter


def apply_switches(segmenter: Segmenter, config: TrainingConfig) -> None:
    """Switch on what ``config`` asks for, in place. Names of parameters stay as they are.

    Raises:
        DigSegError: something is to be compiled, but there is nothing, or no compiler.
    """
    if config.activation_checkpointing:
        segmenter.unet.enable_gradient_checkpointing()
    if config.channels_last:
        # The layout of the activations decides, and convolutions keep it: an engine lays out the weights itself.
        segmenter.memory_format = torch.channels_last
    if config.compile:
        _compile_blocks(segmenter.unet)


def _compile_blocks(unet: torch.nn.Module) -> None:
    """Compile each transformer block by itself, when it is first called: they are alike, so most are compiled once."""
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    if not blocks:
        raise DigSegError("training.compile: this U-Net has no attention layer, and nothing else is compiled; drop it")
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            raise DigSegError(
                "training.compile: triton, which compiles for GPUs, is not installed; `pip install triton`"
            )
    elif shutil.which(compiler := os.environ.get("CXX") or "g++") is None:
        raise DigSegError(
            f"training.compile: there is no C++ compiler {compiler!r} here; install g++, name another one in $CXX, or "
            "set it to false"
        )
    for block in blocks:
        block.compile()
