"""Adapters on a U-Net of Stable Diffusion's structure, and what is left of them once they are merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusion_checkpoint import narrow_unet
from pydantic import ValidationError

from digseg.config import LoraConfig, ModelConfig
from digseg.errors import DigSegError
from digseg.model.denoiser import grow_conv_in
from digseg.model.lora import add_adapters, merged

CONFIG = LoraConfig(rank=2, alpha=3.0, targets=["to_q", "to_out.0", "conv1", "proj_in"])


def test_merged_weights_compute_what_the_adapters_did() -> None:
    plain, adapted = _grown(), _grown()
    add_adapters(adapted, CONFIG)
    assert torch.equal(_answer(adapted), _answer(plain))  # the products begin at zero
    random = torch.Generator().manual_seed(1)
    for name, weight in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.05, generator=random)
    expected = _answer(adapted)
    assert not torch.allclose(expected, _answer(plain), atol=1e-3)
    state = merged(adapted.state_dict(), CONFIG.scale)
    plain.load_state_dict(state)
    assert torch.allclose(_answer(plain), expected, atol=1e-4)
    adapted.fuse_lora()  # peft's own
    fused = adapted.state_dict()
    for name, weight in state.items():
        layer, _, kind = name.rpartition(".")
        own = fused.get(name, fused.get(f"{layer}.base_layer.{kind}"))
        assert torch.allclose(weight, own, atol=1e-6), name


def test_adapters_and_the_grown_convolution_alone_are_trained() -> None:
    unet = _grown()
    base = {name: weight.clone() for name, weight in unet.state_dict().items()}
    add_adapters(unet, CONFIG)
    trained = {name for name, weight in unet.named_parameters() if weight.requires_grad}
    assert trained == {"conv_in.weight", "conv_in.bias"} | {n for n in unet.state_dict() if ".lora_" in n}
    for layer in ("to_q.lora_A", "to_out.0.lora_B", "conv1.lora_A", "proj_in.lora_B"):
        assert any(layer in name for name in trained), layer
    assert not any(".conv2." in name or ".to_k." in name for name in trained)
    for name, weight in merged(unet.state_dict(), CONFIG.scale).items():
        assert torch.equal(weight, base[name]), name


def test_targets_that_no_layer_is_called_are_answered_with_those_that_are() -> None:
    with pytest.raises(
        DigSegError,
        match=r"model.lora.targets: no layer .* is called 'to_x', 'conv_in'; possible ones: .*to_out.0, to_q",
    ):
        add_adapters(_grown(), LoraConfig(targets=["to_q", "to_x", "conv_in"]))


def test_adapters_are_for_a_pretrained_unet() -> None:
    with pytest.raises(ValidationError, match="lora keeps a pretrained U-Net's weights as they are: set pretrained"):
        ModelConfig(lora=LoraConfig())


def _grown() -> Any:
    unet = narrow_unet("2.1")
    grow_conv_in(unet)
    return unet.eval()


@torch.no_grad()
def _answer(unet: Any) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    latents, tokens = (torch.randn(*shape, generator=random) for shape in ((2, 8, 8, 8), (2, 3, 16)))
    answer: torch.Tensor = unet(latents, 999, encoder_hidden_states=tokens, return_dict=False)[0]
    return answer
