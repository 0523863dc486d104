"""Batches of dark and bright halves, which a few steps learn to tell apart."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass
class Batch:
    images: torch.Tensor
    labels: torch.Tensor
    query_ids: torch.Tensor
    colour_ids: torch.Tensor
    class_weights: torch.Tensor
    latents: torch.Tensor | None = None


def two_tone_batch(random: torch.Generator) -> Batch:
    """Dark and bright halves; slot of each name and its colour are drawn anew for every sample."""
    dark = torch.zeros(4, 32, 32, dtype=torch.bool)
    for row in dark:
        row[:, : int(torch.randint(8, 24, (1,), generator=random))] = True
    images = torch.where(dark, -0.6, 0.6).unsqueeze(1) + 0.1 * torch.randn(4, 3, 32, 32, generator=random)
    swapped = torch.rand(4, generator=random) < 0.5
    query_ids = torch.where(swapped[:, None], torch.tensor([1, 0]), torch.tensor([0, 1]))
    labels = torch.where(dark ^ swapped[:, None, None], 0, 1)
    colour_ids = torch.stack([torch.randperm(8, generator=random)[:2] for _ in range(4)])
    return Batch(images, labels, query_ids, colour_ids, torch.ones(4, 2))
