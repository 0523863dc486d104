"""Low-rank adapters on a pretrained U-Net, trained in place of its own weights, and merged into them at the end.

Hu et al. 2021, "LoRA: Low-rank adaptation of large language models", arXiv 2106.09685: a layer's weights become
``W + scale * B A`` with ``A [r, in]`` random and ``B [out, r]`` zero at the start, so that training begins at W.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from digseg.config import LoraConfig
from digseg.errors import DigSegError

_BASE = ".base_layer."  # where peft puts a layer that has an adapter


def add_adapters(unet: Any, config: LoraConfig) -> None:
    """Freeze the U-Net but for its first convolution, which was grown, and put adapters on the layers of ``config``.

    Raises:
        DigSegError: a target that no layer is called.
    """
    possible = possible_targets(unet)
    unknown = [target for target in config.targets if target not in possible]
    if unknown:
        raise DigSegError(
            f"model.lora.targets: no layer of this U-Net is called {', '.join(map(repr, unknown))}; possible ones: "
            f"{', '.join(possible)}"
        )
    from peft import LoraConfig as PeftConfig

    unet.requires_grad_(False)
    unet.add_adapter(
        PeftConfig(r=config.rank, lora_alpha=config.rank * config.scale, target_modules=list(config.targets))
    )
    unet.conv_in.requires_grad_(True)


def possible_targets(unet: Any) -> list[str]:
    """How the U-Net's linear layers and convolutions are called, without the number of their block."""
    found = set()
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and name != "conv_in":
            parts = name.split(".")
            found.add(".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1])
    return sorted(found)


def merged(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The state of a module with adapters as that of one without: their products are added to the weights."""
    plain = {}
    for name, value in state.items():
        layer, base, kind = name.partition(_BASE)
        if base and kind == "weight":
            down, up = (state[f"{layer}.lora_{part}.default.weight"] for part in "AB")
            # [r, in] and [out, r] of a linear layer, [r, in, h, w] and [out, r, 1, 1] of a convolution
            value = value.to(down.device) + scale * torch.einsum("or,r...->o...", up.flatten(1), down)
        if ".lora_" not in name:
            plain[name.replace(_BASE, ".")] = value
    return plain
