"""What all sections of a configuration are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]


class _LocationMark:
    """Marks a field as a local path or fsspec URL; relative paths are made absolute when a file is loaded."""


Location = Annotated[str, Field(min_length=1), _LocationMark()]


def is_location(field: FieldInfo) -> bool:
    """Whether ``field`` holds a :data:`Location` (or none)."""
    marks = [*field.metadata]
    for inner in getattr(field.annotation, "__args__", ()):
        marks += getattr(inner, "__metadata__", ())
    return any(isinstance(mark, _LocationMark) for mark in marks)


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
