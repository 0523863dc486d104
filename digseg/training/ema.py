"""Exponential moving average of the trainable weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from digseg.training.shares import Share, merge_shares


class WeightAverage:
    """The average of one rank's share of the weights, in float32.

    ``average = d * average + (1 - d) * weights`` after every step, with
    ``d = min(decay, (1 + t) / (10 + t))`` at the t-th update (t from 0): a short run is not held back by
    its random start. The same ramp is used by TensorFlow's ``ExponentialMovingAverage(num_updates)``.
    """

    def __init__(self, shares: Mapping[str, Share], decay: float) -> None:
        self._decay = decay
        self._updates = 0
        self._average = {
            name: Share(share.shape, share.offset, share.values.detach().to(torch.float32, copy=True))
            for name, share in shares.items()
        }

    @property
    def shares(self) -> Mapping[str, Share]:
        """This rank's share of the average."""
        return self._average

    @torch.no_grad()
    def update(self, shares: Mapping[str, Share]) -> None:
        """Take in the weights after an optimizer step; one fused operation for all tensors."""
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        averages = [share.values for share in self._average.values()]
        weights = [shares[name].values for name in self._average]
        torch._foreach_lerp_(averages, weights, 1.0 - decay)
        self._updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, for a checkpoint."""
        return {"updates": self._updates, **shares_state(self._average)}

    @torch.no_grad()
    def load_whole(self, weights: Mapping[str, Tensor], updates: int) -> None:
        """Go on from the whole average (:func:`merged_weights`), whatever world saved it."""
        self._updates = updates
        for name, share in self._average.items():
            start, size = share.offset, share.values.numel()
            share.values.copy_(weights[name].view(-1)[start : start + size])

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that the same rank of the same world saved."""
        self._updates = state["updates"]
        for name, share in self._average.items():
            share.values.copy_(state["shares"][name]["values"])


def shares_state(shares: Mapping[str, Share]) -> dict[str, Any]:
    """Shares as plain tensors and numbers: what is saved of a run without an average."""
    return {"shares": {name: asdict(share) for name, share in shares.items()}}


def merged_weights(states: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Whole parameters from the saved state of every rank's average or shares."""
    return merge_shares({name: Share(**share) for name, share in state["shares"].items()} for state in states)
