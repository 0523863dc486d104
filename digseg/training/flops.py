"""What a training step computes, from the shapes of the model alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from digseg.config import AutoencoderConfig, Config
from digseg.data.loader import Batch
from digseg.model.autoencoder import Autoencoder, KLAutoencoder, build_autoencoder
from digseg.model.denoiser import scheduler_from_scratch
from digseg.model.palette import MAX_COLOURS
from digseg.model.pretrained import VAE, model_shapes
from digseg.model.segmenter import segmenter_shapes
from digseg.model.training_module import SegmenterLoss

# Group norms refuse a batch of one whose lowest level is one cell with one channel a group.
COUNTED_IMAGES = 2


@dataclass(frozen=True, slots=True)
class ImageFlops:
    """Floating-point operations for one image: those of matrix products, convolutions and attention, a multiplication
    and an addition counting as two."""

    forward: int
    training: int  # forward and backward pass


def image_flops(config: Config, text_dim: int, num_classes: int) -> ImageFlops:
    """Count for a training crop whose query has ``num_classes`` slots; on the meta device, so nothing is computed.

    Encoding the image counts where its latents are not stored. The U-Net's share is the model's, whatever is computed
    again to save memory.

    Args:
        text_dim: entries of a class name's embedding.
    """
    loss = loss_shapes(config, text_dim, num_classes)
    with torch.device("meta"):
        batch = counted_batch(config, loss.segmenter.autoencoder, num_classes)
    with FlopCounterMode(display=False) as forward:
        value = loss(batch)["loss"]
    with FlopCounterMode(display=False) as backward:
        value.backward()
    flops = forward.get_total_flops() // COUNTED_IMAGES
    return ImageFlops(flops, flops + backward.get_total_flops() // COUNTED_IMAGES)


def loss_shapes(config: Config, text_dim: int, num_classes: int) -> SegmenterLoss:
    """The module that is trained, in float32 and without noise, on the meta device."""
    # What has no influence on the count: the precision, and noise.
    plain = config.training.model_copy(update={"precision": "fp32"})
    without_noise = config.objective.model_copy(update={"type": "one_step"})
    counted = config.model_copy(update={"training": plain, "objective": without_noise})
    with torch.device("meta"):
        autoencoder = _autoencoder(config.model.autoencoder)
        segmenter = segmenter_shapes(config.model, text_dim, autoencoder, scheduler_from_scratch(), adapters=True)
        names = torch.empty(num_classes, text_dim)
    return SegmenterLoss(segmenter, counted, names).to("meta")


def counted_batch(config: Config, autoencoder: Autoencoder, num_classes: int) -> Batch:
    """A batch of :data:`COUNTED_IMAGES` training crops without content, on the default device."""
    size, side = COUNTED_IMAGES, config.data.crop_size
    cells = side // autoencoder.factor
    slots = torch.zeros(size, num_classes, dtype=torch.int64)
    return Batch(
        images=torch.empty(size, 3, side, side),
        labels=torch.zeros(size, side, side, dtype=torch.int64),
        query_ids=slots,
        colour_ids=slots,
        class_weights=torch.ones(size, num_classes),
        positions=torch.zeros(size, dtype=torch.int64),
        latents=None if config.data.latents is None else torch.empty(size, autoencoder.channels, cells, cells),
        keys=[""] * size,
        corrupt={},
    )


def _autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """The autoencoder's shapes, without its weights."""
    if config.type == "shuffle":
        return build_autoencoder(config)
    from diffusers import AutoencoderKL

    assert config.path is not None  # the schema requires it
    return _KLShapes(model_shapes(AutoencoderKL, config.path, VAE, "model.autoencoder.path"))


class _KLShapes(KLAutoencoder):
    """One that has its palette's latents already: they are computed once a run."""

    def _encoded_palette(self, device: torch.device) -> torch.Tensor:
        return torch.empty(MAX_COLOURS, self.channels, device=device)
