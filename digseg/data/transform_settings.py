"""How training crops are drawn: a record of its own, so that manifests can hold it without torch being loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from digseg.config.schema import DataConfig, MixtureEntry


@dataclass(frozen=True)
class TransformSettings:
    """Lengths in pixels. ``upright`` views (a street) are only mirrored, others also turned by quarters."""

    crop_size: int
    short_side: int
    scale: tuple[float, float]
    flip: bool
    upright: bool
    colour_jitter: float

    @classmethod
    def of(cls, config: DataConfig, entry: MixtureEntry, domain: str) -> TransformSettings:
        """The settings of a run for a corpus of a domain; only natural scenes have an up and a down."""
        return cls(
            config.crop_size,
            entry.short_side or config.short_side,
            config.scale,
            config.flip,
            domain == "natural",
            config.colour_jitter,
        )

    @property
    def longest_short_side(self) -> int:
        """The shorter side that the largest scale asks for: no finer image is ever needed."""
        return math.ceil(self.short_side * self.scale[1])
