"""The loss scale of float16: large enough for small gradients, small enough for large ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_START = 2.0**16
_GROW_AFTER = 2000  # finite steps; both figures are those of torch.amp.GradScaler


class LossScale:
    """A dynamic loss scale that is undone where a gradient enters its float32 weight.

    What sums, clips and applies gradients therefore never sees the scale, so all ZeRO stages work alike. The
    scale is a power of two, which rounds nothing, and stays on the device.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        self._scale = torch.tensor(_START, device=device)
        self._finite_steps = torch.zeros((), device=device)
        for parameter in parameters:
            parameter.register_hook(self._unscaled)  # type: ignore[no-untyped-call]

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to go backward from."""
        return loss * self._scale

    def update(self, gradient_norm: Tensor | float) -> None:
        """Halve the scale after a gradient that is not finite, double it after many that are; no host sync."""
        finite = torch.isfinite(torch.as_tensor(gradient_norm, device=self._scale.device))
        steps = torch.where(finite, self._finite_steps + 1, 0.0)
        grows = steps >= _GROW_AFTER
        factor = torch.where(finite, torch.where(grows, 2.0, 1.0), 0.5)
        self._scale, self._finite_steps = self._scale * factor, torch.where(grows, 0.0, steps)

    def may_fall(self) -> Tensor:
        """Whether an overflow may come from a scale that is too high still: a boolean scalar on the device."""
        return self._scale > 1.0

    def state_dict(self) -> dict[str, Tensor]:
        """The scale and its count, for a checkpoint."""
        return {"scale": self._scale, "finite_steps": self._finite_steps}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with a saved scale."""
        self._scale = state["scale"].to(self._scale.device)
        self._finite_steps = state["finite_steps"].to(self._scale.device)

    def _unscaled(self, gradient: Tensor) -> Tensor:
        return gradient / self._scale
