"""Mask pixels to contiguous class ids, by a corpus' label rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_prep.corpora.source import BadSample, Source, UInt8Array
from data_prep.corpora.spec import (
    IGNORE_ID,
    BinaryLabel,
    ColourLabel,
    CorpusSpec,
    IdLabel,
    InstanceLabel,
    Label,
)

_OUTSIDE = -1
_LOSSY = 32
"""How far JPEG may drive the channels of a grey pixel apart."""
_GREY_MODES = ("1", "L", "I", "I;16", "I;16B", "I;16L")
_MODES = {"grey": _GREY_MODES, "matlab": _GREY_MODES, "palette": ("P",), "index": (*_GREY_MODES, "P")}


def mask_ids(source: Source, spec: CorpusSpec) -> UInt8Array:
    """The mask as uint8 [H, W]: positions in the vocabulary, :data:`IGNORE_ID` where there is no label.

    Raises:
        BadSample: a mask holds a value without a meaning.
    """
    if isinstance(spec.label, InstanceLabel):
        return _union(source.masks, source.mask_paths, spec.label, spec.vocabulary)
    return _decode(source.masks[0], source.mask_paths[0], spec.label, spec.vocabulary)


def _decode(mask: Image.Image, path: Path, label: Label, vocabulary: tuple[str, ...]) -> UInt8Array:
    if isinstance(label, ColourLabel):
        return _by_colour(mask, path, label, vocabulary)
    if isinstance(label, BinaryLabel):
        return _by_threshold(mask, path, label, vocabulary)
    if isinstance(label, IdLabel):
        return _by_value(mask, path, label, vocabulary)
    raise TypeError(f"no reader for {label.reader}")


def _by_value(mask: Image.Image, path: Path, label: IdLabel, vocabulary: tuple[str, ...]) -> UInt8Array:
    values = _levels(mask, path, _MODES[label.reader])
    table = np.full(65536, IGNORE_ID if label.other_values == "ignore" else _OUTSIDE, dtype=np.int16)
    table[list(label.ignore)] = IGNORE_ID
    for value, name in label.values.items():
        table[value] = vocabulary.index(name) if name in vocabulary else IGNORE_ID
    ids = table[values]
    outside = ids == _OUTSIDE
    if outside.any():
        unknown = np.unique(values[outside])
        raise BadSample(
            f"mask {path.name} has class id {_some(unknown)}, outside the vocabulary ({_places(outside)}): "
            "give it a class or list it under `ignore`"
        )
    return ids.astype(np.uint8)


def _by_colour(mask: Image.Image, path: Path, label: ColourLabel, vocabulary: tuple[str, ...]) -> UInt8Array:
    if mask.mode not in ("RGB", "RGBA", "P"):
        raise BadSample(f"mask {path.name} is of mode {mask.mode}, a colour mask is RGB")
    colours = np.asarray(mask.convert("RGB"))
    if label.binarise_at is not None:
        colours = np.where(colours >= label.binarise_at, 255, 0)
    packed = _packed(colours)
    ids = np.full(packed.shape, IGNORE_ID if label.other_colours == "ignore" else _OUTSIDE, dtype=np.int16)
    for colour in label.ignore:
        ids[packed == _packed(np.array(colour))] = IGNORE_ID
    for name, colour in label.colours.items():
        ids[packed == _packed(np.array(colour))] = vocabulary.index(name) if name in vocabulary else IGNORE_ID
    outside = ids == _OUTSIDE
    if outside.any():
        unknown = [f"({c >> 16}, {c >> 8 & 255}, {c & 255})" for c in np.unique(packed[outside])]
        raise BadSample(
            f"mask {path.name} has the colour {_some(unknown)}, outside the vocabulary ({_places(outside)}): "
            "give it a class, list it under `ignore`, or set `other_colours: ignore`"
        )
    return ids.astype(np.uint8)


def _by_threshold(mask: Image.Image, path: Path, label: BinaryLabel, vocabulary: tuple[str, ...]) -> UInt8Array:
    values = _levels(mask, path, _GREY_MODES, _LOSSY if label.levels == "any" else 0)
    if label.levels != "any":
        outside = ~np.isin(values, label.levels)
        if outside.any():
            unknown = np.unique(values[outside])
            raise BadSample(
                f"mask {path.name} has the value {_some(unknown)}, outside {list(label.levels)} ({_places(outside)})"
            )
    above, below = vocabulary.index(label.at_or_above), vocabulary.index(label.below)
    return np.where(values >= label.threshold, above, below).astype(np.uint8)


def _union(
    masks: Sequence[Image.Image], paths: Sequence[Path], label: InstanceLabel, vocabulary: tuple[str, ...]
) -> UInt8Array:
    foreground = np.zeros((masks[0].height, masks[0].width), dtype=bool)
    for mask, path in zip(masks, paths, strict=True):
        foreground |= _levels(mask, path, _GREY_MODES) >= label.threshold
    object_id, background_id = vocabulary.index(label.foreground), vocabulary.index(label.background)
    return np.where(foreground, object_id, background_id).astype(np.uint8)


def _levels(mask: Image.Image, path: Path, modes: Sequence[str], channel_difference: int = 0) -> npt.NDArray[np.uint16]:
    """Grey levels or palette indices [H, W]; a 1-bit mask counts as 0 and 255.

    RGB is read as grey where its channels nowhere differ by more than ``channel_difference``.
    """
    if mask.mode == "RGB" and "L" in modes and np.ptp(np.asarray(mask), axis=2).max() <= channel_difference:
        mask = mask.convert("L")
    if mask.mode not in modes:
        hint = "; where masks hold colours, give each class its colour" if mask.mode in ("RGB", "RGBA") else ""
        raise BadSample(f"mask {path.name} is of mode {mask.mode}, the label rule reads {', '.join(modes)}{hint}")
    if mask.mode == "1":
        mask = mask.convert("L")
    values = np.asarray(mask)
    if values.dtype.itemsize > 2 and (values.min() < 0 or values.max() > 65535):
        raise BadSample(f"mask {path.name} has values outside 0..65535")
    return values.astype(np.uint16)


def _places(where: npt.NDArray[np.bool_]) -> str:
    row, column = np.argwhere(where)[0]
    return f"first at row {row}, column {column}, {np.count_nonzero(where)} in all"


def _packed(colours: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    channels = colours.astype(np.int64)
    packed: npt.NDArray[np.int64] = (channels[..., 0] << 16) | (channels[..., 1] << 8) | channels[..., 2]
    return packed


def _some(values: Sequence[object] | npt.NDArray[np.generic]) -> str:
    shown = ", ".join(str(value) for value in values[:5])
    return shown + (", ..." if len(values) > 5 else "")
