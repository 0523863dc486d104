"""The losses: small pure functions of tensors. Label 255 is ignored everywhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255


def class_score_loss(logits: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
    """Balanced cross-entropy: mean over valid pixels of ``w_y * -log p_y``.

    Args:
        logits: float32 ``[B, K, H, W]``.
        labels: int64 ``[B, H, W]``, slot or 255.
        class_weights: float32 ``[B, K]``, per sample.
    """
    valid = labels != IGNORE
    slots = labels.masked_fill(~valid, 0)
    nll = F.cross_entropy(logits, slots, reduction="none")
    weight = class_weights.gather(1, slots.flatten(1)).view_as(nll) * valid
    return (nll * weight).sum() / valid.sum().clamp(min=1)


def area_score_loss(logits: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
    """The same at a coarser scale, against each class's share of a cell's valid pixels.

    Args:
        logits: float32 ``[B, K, h, w]``; ``labels [B, H, W]`` with H/h = W/w an integer.
        labels: as above.
        class_weights: as above.
    """
    factor = labels.shape[-1] // logits.shape[-1]
    share = F.avg_pool2d(one_hot(labels, logits.shape[1]), factor)  # sums to the cell's valid share
    weighted = share * class_weights[:, :, None, None]
    return -(weighted * logits.log_softmax(1)).sum() / share.sum().clamp(min=1)


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """1 minus the mean soft Dice of the classes that a sample shows: ``2 sum(p g) / (sum(p) + sum(g))`` over its valid
    pixels (Milletari et al. 2016, arXiv 1606.04797, without the squares).

    Args:
        logits: float32 ``[B, K, H, W]``.
        labels: int64 ``[B, H, W]``, slot or 255.
    """
    truth = one_hot(labels, logits.shape[1])
    probabilities = logits.softmax(1) * (labels != IGNORE).unsqueeze(1)
    area = truth.sum((2, 3))
    overlap = (probabilities * truth).sum((2, 3))
    dice = 2 * overlap / (probabilities.sum((2, 3)) + area).clamp(min=1e-6)
    shown = area > 0
    return ((1 - dice) * shown).sum() / shown.sum().clamp(min=1)


def reconstruction_loss(
    estimate: Tensor, target: Tensor, labels: Tensor, sample_weights: Tensor | None = None
) -> Tensor:
    """Mean squared error of mask latents ``[B, C, h, w]`` over cells without an ignored pixel.

    ``sample_weights`` ``[B]`` multiply the errors of a sample; None: 1.
    """
    factor = labels.shape[-1] // estimate.shape[-1]
    ignored = F.max_pool2d((labels == IGNORE).float().unsqueeze(1), factor)
    valid = 1.0 - ignored
    error = (estimate - target).square().mean(1, keepdim=True)
    if sample_weights is not None:
        error = error * sample_weights[:, None, None, None]
    return (error * valid).sum() / valid.sum().clamp(min=1)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """``labels [B, H, W]`` -> float32 ``[B, num_classes, H, W]``, all zero where ignored."""
    valid = labels != IGNORE
    encoded = torch.zeros(labels.shape[0], num_classes, *labels.shape[1:], device=labels.device, dtype=torch.float32)
    return encoded.scatter_(1, labels.masked_fill(~valid, 0).unsqueeze(1), valid.unsqueeze(1).float())
