"""The typed description of a corpus (``configs/corpora/*.yaml``). Every field of a label rule is explicit.

``0`` and ``255`` mean something else in nearly every corpus, so a description states its label rule in full
and a reader never guesses.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StringConstraints, field_validator, model_validator

from data_prep.corpora.patterns import check_pattern, pattern_fields
from digseg.errors import nearest

IGNORE_ID = 255
"""Id of pixels without a label in every mask that leaves this package."""

MAX_CLASSES = 255
"""Contiguous ids 0..254 fit an 8-bit mask beside :data:`IGNORE_ID`."""

TILE_FIELD = "tile"
"""The field that numbers the tiles of an image."""

Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, strict=True)]
Level = Annotated[StrictInt, Field(ge=0, le=65535)]
Channel = Annotated[StrictInt, Field(ge=0, le=255)]
Colour = tuple[Channel, Channel, Channel]
Domain = Literal["natural", "medical", "remote_sensing", "agriculture"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FilePatterns(_Part):
    """Where images and masks lie below the root.

    ``{field}`` matches a part of one path segment and names it, ``{field:[0-9]+}`` only what the regular
    expression allows (it may hold no braces and no slash); ``*`` matches without a name, a final ``.*`` is any
    image suffix. An image and a mask belong together when all their fields agree.
    """

    images: Name
    masks: Name

    @field_validator("images", "masks")
    @classmethod
    def _well_formed(cls, pattern: str) -> str:
        check_pattern(pattern)
        return pattern

    @model_validator(mode="after")
    def _same_fields(self) -> Self:
        images, masks = pattern_fields(self.images), pattern_fields(self.masks)
        if not images:
            raise ValueError("the image pattern names no {field}: one sample cannot be told from another")
        if set(images) != set(masks):
            raise ValueError(f"images name the fields {sorted(set(images))}, masks {sorted(set(masks))}")
        return self


class FolderSplits(_Part):
    """The layout has one entry a split."""

    by: Literal["folder"]


class EveryNthSplits(_Part):
    """Positions 0, n, 2n, ... of the sorted keys are one split, all others the other.

    With ``field`` its sorted values are counted instead, so that what belongs together (the images of one
    recording, say) stays in one split.
    """

    by: Literal["every_nth"]
    n: Annotated[StrictInt, Field(ge=2)]
    nth: Name
    others: Name
    field: Name | None = None


class NumberSplits(_Part):
    """A numeric field of the path below a bound is one split, the rest the other."""

    by: Literal["number"]
    field: Name
    bound: StrictInt
    below: Name
    rest: Name


class ValueSplits(_Part):
    """The description itself lists the values of a field that make each split."""

    by: Literal["value"]
    field: Name
    splits: Annotated[dict[Name, tuple[Name, ...]], Field(min_length=1)]


class ListSplits(_Part):
    """A file names the samples: a YAML mapping of splits, or a text file a split (``{split}`` in its name).

    ``entry`` is what it says of a sample, built from the fields of the path patterns (``"{id}"``); folders and an
    image suffix are dropped, a YAML number is compared as a number. A sample listed in several splits goes to
    ``duplicates``.
    """

    by: Literal["list"]
    file: Name
    entry: Name
    splits: Annotated[tuple[Name, ...], Field(min_length=1)]
    duplicates: Name


Splits = Annotated[FolderSplits | EveryNthSplits | NumberSplits | ValueSplits | ListSplits, Field(discriminator="by")]


class Tiles(_Part):
    """Images too large to be one sample are cut into tiles, whose number is the field ``tile``, row by row from 0.

    ``whole``: tiles of ``size`` x ``size`` pixels from the top left; those that the right or lower edge cuts keep
    their number and are left out. ``even``: as few tiles as hold all pixels, of nearly equal size, up to ``size``.
    """

    size: Annotated[StrictInt, Field(ge=64)]
    grid: Literal["whole", "even"]


class IdLabel(_Part):
    """Mask pixels are ids."""

    reader: str
    values: dict[Level, Name]
    ignore: tuple[Level, ...]
    other_values: Literal["bad_sample", "ignore"]
    dropped_classes: Literal["error", "ignore"]
    """What becomes of classes that ``values`` names and the vocabulary lacks."""

    def class_names(self) -> tuple[str, ...]:
        return tuple(self.values.values())


class ValueLabel(IdLabel):
    """Ids are ``grey`` levels, indices of a ``palette`` image, or either of them (``index``)."""

    reader: Literal["grey", "palette", "index"]


class MatlabLabel(IdLabel):
    """Ids are the elements of a matrix in a MATLAB file (``.mat``, up to version 7.2)."""

    reader: Literal["matlab"]
    variable: Name


class ColourLabel(_Part):
    """Mask pixels are RGB colours. ``binarise_at`` rounds each channel to 0 or 255 first (lossy masks)."""

    reader: Literal["colour"]
    colours: dict[Name, Colour]
    ignore: tuple[Colour, ...]
    other_colours: Literal["bad_sample", "ignore"]
    binarise_at: Channel | None
    dropped_classes: Literal["error", "ignore"]

    def class_names(self) -> tuple[str, ...]:
        return tuple(self.colours)


class BinaryLabel(_Part):
    """Grey levels on the two sides of a threshold. An inverted mask swaps the two names."""

    reader: Literal["binary"]
    threshold: Annotated[StrictInt, Field(ge=1, le=255)]
    at_or_above: Name
    below: Name
    levels: tuple[Level, ...] | Literal["any"]
    """The only grey levels a sound mask has, or ``any`` (masks stored as JPEG)."""

    def class_names(self) -> tuple[str, ...]:
        return (self.at_or_above, self.below)


class InstanceLabel(_Part):
    """One binary file for each object; their union is the foreground class."""

    reader: Literal["instances"]
    threshold: Annotated[StrictInt, Field(ge=1, le=255)]
    foreground: Name
    background: Name

    def class_names(self) -> tuple[str, ...]:
        return (self.foreground, self.background)


Label = Annotated[ValueLabel | MatlabLabel | ColourLabel | BinaryLabel | InstanceLabel, Field(discriminator="reader")]


class ExifRule(_Part):
    """EXIF orientation. ``mask: as_image`` turns the mask as the image (labels drawn on stored pixels)."""

    image: Literal["apply", "ignore"]
    mask: Literal["own", "as_image", "ignore"]


class CorpusSpec(_Part):
    """All that is needed to read a corpus."""

    title: Name
    domain: Domain
    licence: Name
    vocabulary: Annotated[tuple[Name, ...], Field(min_length=1, max_length=MAX_CLASSES)]
    """Class names as text queries; a class's id is its position.

    Where it is left out, it is the names that ``label.values`` or ``label.colours`` lists, in that order.
    """
    may_contain: tuple[Name, ...]
    """Names of corpora of other domains that may be visible in the images, so never negatives.

    Corpora may share a list: it may hold names of the vocabulary.
    """
    key: Name
    """Sample key, built from the fields of the path patterns."""
    layout: Annotated[dict[Name, FilePatterns], Field(min_length=1)]
    splits: Splits
    tiles: Tiles | None = None
    channel_order: Literal["rgb", "bgr"]
    exif: ExifRule
    label: Label

    @model_validator(mode="before")
    @classmethod
    def _with_vocabulary(cls, document: Any) -> Any:
        label = document.get("label")
        if "vocabulary" in document or not isinstance(label, Mapping):
            return document
        by_value, by_name = label.get("values"), label.get("colours")
        names = by_value.values() if isinstance(by_value, Mapping) else by_name
        return document if names is None else {**document, "vocabulary": tuple(dict.fromkeys(map(str, names)))}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_vocabulary(self.vocabulary)
        _check_label(self.vocabulary, self.label)
        _check_layout(self)
        return self

    def split_names(self) -> tuple[str, ...]:
        rule = self.splits
        if isinstance(rule, FolderSplits):
            return tuple(self.layout)
        if isinstance(rule, EveryNthSplits):
            return (rule.others, rule.nth)
        if isinstance(rule, NumberSplits):
            return (rule.below, rule.rest)
        return tuple(rule.splits)


def sample_fields(spec: CorpusSpec, patterns: FilePatterns) -> set[str]:
    """Names of the fields that tell a sample from another."""
    return {*pattern_fields(patterns.images), *((TILE_FIELD,) if spec.tiles else ())}


def _check_vocabulary(vocabulary: tuple[str, ...]) -> None:
    repeated = _repeated(vocabulary)
    if repeated:
        raise ValueError(f"vocabulary names {repeated} twice")


def _check_label(vocabulary: tuple[str, ...], label: Label) -> None:
    named = label.class_names()
    may_drop = isinstance(label, IdLabel | ColourLabel) and label.dropped_classes == "ignore"
    for name in named:
        if name not in vocabulary and not may_drop:
            raise ValueError(f"label names the class {name!r}, which the vocabulary lacks{nearest(name, vocabulary)}")
    silent = sorted(set(vocabulary) - set(named))
    if silent:
        raise ValueError(f"label gives no pixel value for {silent} of the vocabulary")
    if isinstance(label, IdLabel):
        both = sorted(set(label.values) & set(label.ignore))
        if both:
            raise ValueError(f"label.ignore lists {both}, which label.values maps to a class")
    if isinstance(label, ColourLabel):
        repeated = _repeated([*label.colours.values(), *label.ignore])
        if repeated:
            raise ValueError(f"label gives the colour {repeated} two meanings")


def _check_layout(spec: CorpusSpec) -> None:
    rule = spec.splits
    if not isinstance(rule, FolderSplits) and len(spec.layout) != 1:
        raise ValueError(f"splits by {rule.by} need a layout with one entry, it has {sorted(spec.layout)}")
    for name, patterns in spec.layout.items():
        missing = sorted({*pattern_fields(spec.key), *_split_fields(rule)} - sample_fields(spec, patterns))
        if missing:
            raise ValueError(f"key or splits use {missing}, which layout.{name}.images does not name")
        if spec.tiles and TILE_FIELD in pattern_fields(patterns.images):
            raise ValueError(f"layout.{name} names {{tile}}, which is the number of a tile that is cut")
    if isinstance(rule, ListSplits) and rule.duplicates not in rule.splits:
        raise ValueError(f"splits.duplicates is {rule.duplicates!r}, not one of {list(rule.splits)}")
    if spec.tiles and TILE_FIELD not in pattern_fields(spec.key):
        raise ValueError("key must name {tile}, to tell the tiles of an image apart")
    if spec.tiles and isinstance(rule, EveryNthSplits) and rule.field in (None, TILE_FIELD):
        raise ValueError("splits.field must name what the tiles of an image share, or they end up in both splits")
    if spec.tiles and (spec.exif.image, spec.exif.mask) != ("ignore", "ignore"):
        raise ValueError("tiles are cut from the pixels as stored: exif must be {image: ignore, mask: ignore}")


def _split_fields(rule: Splits) -> list[str]:
    if isinstance(rule, ListSplits):
        return pattern_fields(rule.entry)
    field = None if isinstance(rule, FolderSplits) else rule.field
    return [] if field is None else [field]


def _repeated(values: Iterable[Hashable]) -> Hashable | None:
    seen: set[Hashable] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None
