"""The promotion gate: what a model has to show against the one whose place it is to take."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from digseg.config.section import Location, Section


class Gate(Section):
    """A file of ``configs/gates/``. Both bounds are on paired differences of mIoU, and have to hold with
    ``confidence`` (one-sided) when the images are resampled."""

    name: str = "default"
    data: Location = "outputs/shards"  # both models are evaluated on these shards ...
    split: str | None = None  # ... of this split; None: all that are not for training
    corpora: list[str] = Field(default=[])  # only these; empty: all
    max_drop: Annotated[float, Field(ge=0, le=1)] = 0.02  # no domain may fall by more than this
    min_gain: Annotated[float, Field(ge=-1, le=1)] = 0.0  # the mean over the corpora has to rise by more than this
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
