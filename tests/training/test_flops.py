"""The count of a step's operations, against what is worked out from the shapes by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from kl_autoencoder import write_kl_autoencoder
from small_world import small_config
from torch import nn

from digseg.config import Config
from digseg.model.segmenter import build_segmenter
from digseg.model.training_module import SegmenterLoss
from digseg.training.flops import ImageFlops, image_flops
from digseg.training.plan import make_plan

NAMES, TEXT_DIM = 3, 384


def test_count_is_that_of_all_products_of_the_model_worked_out_by_hand(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    counted = image_flops(config, TEXT_DIM, NAMES)
    layers, inputs = _products_of_layers(config)
    forward = layers + _products_of_attention(config) + _products_of_classes(config)
    assert counted.forward == forward
    # Each product has two in the backward pass, but nobody asks for the gradient of inputs and of colours, nor for any
    # of the painted target.
    painted = 2 * NAMES * 3 * 32 * 32
    assert counted.training == 3 * forward - inputs - painted - 2 * painted


def test_count_of_a_network_of_stable_diffusions_shape_is_the_published_one(tmp_path: Path) -> None:
    unet = {
        "block_out_channels": [320, 640, 1280, 1280], "attention": [True, True, True, False], "layers_per_block": 2,
        "cross_attention_dim": 1024, "num_heads": 5, "norm_num_groups": 32,
    }  # fmt: skip
    config = small_config(tmp_path, model={"unet": unet})
    values = config.model_dump(mode="json")
    values["data"]["crop_size"] = 256  # 64 x 64 latents of 4 px
    counted = image_flops(Config.model_validate(values), 1024, 77)
    assert math.isclose(counted.forward, 0.804e12, rel_tol=0.02)
    assert math.isclose(counted.training, 2.409e12, rel_tol=0.02)


def test_noise_does_not_count(tmp_path: Path) -> None:
    multi_step = small_config(tmp_path, objective={"type": "multi_step"})
    assert image_flops(multi_step, TEXT_DIM, NAMES) == image_flops(small_config(tmp_path), TEXT_DIM, NAMES)


def test_encoding_counts_where_latents_are_not_stored(tmp_path: Path) -> None:
    vae = write_kl_autoencoder(tmp_path) / "vae"
    online = small_config(tmp_path, model={"autoencoder": {"type": "kl", "path": str(vae)}})
    values = online.model_dump(mode="json")
    values["data"]["latents"] = str(tmp_path / "latents")
    stored = image_flops(Config.model_validate(values), TEXT_DIM, NAMES)
    encoding = _difference(image_flops(online, TEXT_DIM, NAMES), stored)
    assert encoding.forward == encoding.training > 0  # the autoencoder is frozen


def test_lowest_level_of_one_cell_is_counted(tmp_path: Path) -> None:
    unet = {
        "block_out_channels": [16, 16, 16, 32], "attention": [False, False, False, True], "cross_attention_dim": 32,
        "norm_num_groups": 16,
    }  # fmt: skip
    config = small_config(tmp_path, model={"unet": unet})  # 8 x 8 latents, halved three times
    assert image_flops(config, TEXT_DIM, NAMES).forward > 0
    plan = make_plan(config, TEXT_DIM)
    assert 0 < plan.forward_flops < plan.training_flops
    assert plan.memory[0].activations > 0


def _products_of_layers(config: Config) -> tuple[int, int]:
    """Of all convolutions and linear layers: 2 x outputs x inputs of each, and how much of it reads what is no
    function of a weight (so that the backward pass saves its gradient)."""
    segmenter = build_segmenter(config)
    loss = SegmenterLoss(segmenter, config, torch.zeros(NAMES, TEXT_DIM))
    total = inputs = 0

    def add(layer: Any, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total, inputs
        flops = 2 * output.numel() * layer.weight[0].numel()
        total += flops
        inputs += 0 if arguments[0].requires_grad else flops

    for module in segmenter.modules():
        # The query encoder's attention projects with a function, not with the modules that hold its weights.
        if isinstance(module, nn.Conv2d | nn.Linear) and not isinstance(
            module, nn.modules.linear.NonDynamicallyQuantizableLinear
        ):
            module.register_forward_hook(add)
    loss(_batch(config))
    return total, inputs


def _products_of_attention(config: Config) -> int:
    """Scores and weighted values of the U-Net's attention, and all products of the query encoder's."""
    total = 0
    cells = (config.data.crop_size // 4 // 2) ** 2  # attention is on the second level only
    width = config.model.unet.block_out_channels[1]
    blocks = 1 + 1 + 2  # down, middle, up
    for keys in (cells, NAMES):  # attention to itself and to the class names
        total += blocks * 2 * (2 * cells * keys * width)
    token = config.model.unet.cross_attention_dim
    projections = 4 * (2 * NAMES * token * token)  # query, key, value, output
    return total + projections + 2 * (2 * NAMES * NAMES * token)


def _products_of_classes(config: Config) -> int:
    """Scores of both scales, attended values, and the colours of posterior and target."""
    pathway, side = config.model.pathway, config.data.crop_size
    coarse = (side // 4) ** 2
    scores = 2 * NAMES * (pathway.dim * coarse + (pathway.head_dim + 3) * side * side)
    attended = 2 * NAMES * config.model.unet.block_out_channels[1] * coarse
    colours = 2 * (2 * NAMES * 3 * side * side)
    return scores + attended + colours


def _batch(config: Config) -> Any:
    side = config.data.crop_size
    slots = torch.zeros(1, NAMES, dtype=torch.int64)

    class Batch:
        images = torch.zeros(1, 3, side, side)
        latents = None
        labels = torch.zeros(1, side, side, dtype=torch.int64)
        query_ids = slots
        colour_ids = slots
        class_weights = torch.ones(1, NAMES)

    return Batch()


def _difference(first: ImageFlops, second: ImageFlops) -> ImageFlops:
    return ImageFlops(first.forward - second.forward, first.training - second.training)
