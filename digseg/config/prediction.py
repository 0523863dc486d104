"""How an exported model is asked: the same settings for `digseg predict`, evaluation and the registered model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from digseg.config.section import NonNegative, Positive, Section, Template


class PredictionConfig(Section):
    """None stands for what the model was trained with."""

    short_side: Annotated[int, Field(ge=16)] | None = None  # px that the shorter side of an image is brought to
    # Classes of a pass beside the background: 1 asks for each class in a pass of its own; None: as many as fit
    classes_per_pass: Positive | None = None
    templates: Annotated[tuple[Template, ...], Field(min_length=1)] = ("{}",)  # a class is asked as the mean over these
    window: Annotated[int, Field(ge=16)] | None = None  # px: side of the windows an image is cut into; None: not cut
    overlap: Annotated[float, Field(ge=0, le=0.9)] = 0.25  # share of a window that it has in common with the next
    # Of a model of the multi-step objective: DDIM steps (None: 10), the seed of the noise it starts from, and how many
    # masks from different noise are averaged
    steps: Annotated[int, Field(ge=1, le=50)] | None = None
    seed: NonNegative = 0
    ensemble: Positive = 1
