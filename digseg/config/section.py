"""What all sections of a configuration are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]


class _LocationMark:
    """Marks a field as a local path or fsspec URL; relative paths are made absolute when a file is loaded."""


class _WeightsMark(_LocationMark):
    """Marks a field as a local path or the id of a repository on the Hugging Face hub, which stays as it is."""


Location = Annotated[str, Field(min_length=1), _LocationMark()]
Weights = Annotated[str, Field(min_length=1), _WeightsMark()]


def _has_one_place(template: str) -> str:
    if template.count("{}") != 1:
        raise ValueError(f"{template!r} needs one {{}} where the class name goes, as in 'a photo of a {{}}'")
    return template


# A wording around a class name
Template = Annotated[str, AfterValidator(_has_one_place)]


def is_hub_id(source: str) -> bool:
    """Whether ``source`` reads as an id on the Hugging Face hub (``owner/name``) and is no folder here."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).is_dir()


def is_location(field: FieldInfo) -> bool:
    """Whether ``field`` holds a :data:`Location` or :data:`Weights` (or none)."""
    return _is_marked(field, _LocationMark)


def is_weights(field: FieldInfo) -> bool:
    """Whether ``field`` holds :data:`Weights` (or none)."""
    return _is_marked(field, _WeightsMark)


def _is_marked(field: FieldInfo, mark: type[_LocationMark]) -> bool:
    marks = [*field.metadata]
    for inner in getattr(field.annotation, "__args__", ()):
        marks += getattr(inner, "__metadata__", ())
    return any(isinstance(one, mark) for one in marks)


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
