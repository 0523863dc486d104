"""Reading pixels: images to RGB, masks to contiguous class ids by a corpus' label rule."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from data_prep.corpora.spec import (
    IGNORE_ID,
    BinaryLabel,
    ColourLabel,
    CorpusSpec,
    IdLabel,
    InstanceLabel,
    Label,
    MatlabLabel,
)

UInt8Array = npt.NDArray[np.uint8]

_ORIENTATION = 0x0112
_OUTSIDE = -1
_LOSSY = 32
"""How far JPEG may drive the channels of a grey pixel apart."""
_GREY_MODES = ("1", "L", "I", "I;16", "I;16B", "I;16L")
_MODES = {"grey": _GREY_MODES, "matlab": _GREY_MODES, "palette": ("P",), "index": (*_GREY_MODES, "P")}
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError)
"""What PIL raises on damaged files: truncated data, broken chunks."""


class BadSample(Exception):  # noqa: N818 - the name says what it is about, not what went wrong
    """A sample that cannot be used; its text is the reason that ``rejected.jsonl`` shows."""


@dataclass(frozen=True)
class Source:
    """Decoded files of a sample, orientation applied; ``image_bytes`` where a shard may hold the file as it is."""

    image: Image.Image
    image_bytes: bytes | None
    masks: tuple[Image.Image, ...]
    mask_paths: tuple[Path, ...]

    def cropped(self, box: tuple[int, int, int, int]) -> Source:
        """One tile: left, upper, right and lower edge in pixels."""
        masks = tuple(mask.crop(box) for mask in self.masks)
        return Source(self.image.crop(box), None, masks, self.mask_paths)


def open_source(image: Path, masks: tuple[Path, ...], spec: CorpusSpec) -> Source:
    """Decode an image and its masks.

    Bytes are kept (not None) of an 8-bit grey or RGB PNG or JPEG that any reader decodes to the same pixels.

    Raises:
        BadSample: a file cannot be read or decoded, or a mask is not of the image's size.
    """
    picture, data = _open(image, "image")
    orientation = _orientation(picture)
    keep = orientation == 1 and spec.channel_order == "rgb" and _plain(picture, data)
    if orientation != 1 and spec.exif.image == "apply":
        picture = ImageOps.exif_transpose(picture)
    opened = tuple(_mask_image(path, spec, orientation) for path in masks)
    for path, mask in zip(masks, opened, strict=True):
        if mask.size != picture.size:
            raise BadSample(
                f"mask {path.name} is {mask.width} x {mask.height} pixels, the image {picture.width} x {picture.height}"
            )
    return Source(picture, data if keep else None, opened, masks)


def image_pixels(image: Image.Image, spec: CorpusSpec) -> UInt8Array:
    """The image as uint8 [H, W, 3] RGB: 16-bit levels are scaled to 8 bits, alpha is dropped."""
    if image.mode.startswith("I"):
        levels = np.clip(np.asarray(image, dtype=np.int64) // 257, 0, 255).astype(np.uint8)
        pixels = np.repeat(levels[:, :, None], 3, axis=2)
    else:
        pixels = np.asarray(image.convert("RGB"))
    return np.ascontiguousarray(pixels[:, :, ::-1]) if spec.channel_order == "bgr" else pixels


def mask_ids(source: Source, spec: CorpusSpec) -> UInt8Array:
    """The mask as uint8 [H, W]: positions in the vocabulary, :data:`IGNORE_ID` where there is no label.

    Raises:
        BadSample: a mask holds a value without a meaning.
    """
    if isinstance(spec.label, InstanceLabel):
        return _union(source.masks, source.mask_paths, spec.label, spec.vocabulary)
    return _decode(source.masks[0], source.mask_paths[0], spec.label, spec.vocabulary)


def _open(path: Path, what: str) -> tuple[Image.Image, bytes]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadSample(f"{what} {path.name} cannot be read: {error.strerror or error}") from error
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except UnidentifiedImageError as error:
        raise BadSample(f"{what} {path.name} is no image file that can be identified") from error
    except Image.DecompressionBombError as error:
        raise BadSample(f"{what} {path.name} is too large to decode: {error}") from error
    except _DECODING_ERRORS as error:
        raise BadSample(f"{what} {path.name} is damaged or truncated: {error}") from error
    return image, data


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(_ORIENTATION, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _plain(image: Image.Image, data: bytes) -> bool:
    if image.mode not in ("L", "RGB") or "transparency" in image.info:
        return False
    bits_per_channel = data[24] if image.format == "PNG" else 8
    return image.format in ("PNG", "JPEG") and bits_per_channel == 8


def _mask_image(path: Path, spec: CorpusSpec, image_orientation: int) -> Image.Image:
    if isinstance(spec.label, MatlabLabel):
        return _matrix_image(path, spec.label.variable)
    image, _ = _open(path, "mask")
    if spec.exif.mask == "as_image" and image_orientation != 1:
        exif = image.getexif()
        exif[_ORIENTATION] = image_orientation
        image.info.pop("exif", None)
        return ImageOps.exif_transpose(image)
    if spec.exif.mask == "own" and _orientation(image) != 1:
        return ImageOps.exif_transpose(image)
    return image


def _matrix_image(path: Path, variable: str) -> Image.Image:
    """A matrix of ids in a MATLAB file as a 16-bit grey image."""
    try:
        contents = loadmat(io.BytesIO(path.read_bytes()))
    except OSError as error:
        raise BadSample(f"mask {path.name} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, NotImplementedError, MatReadError, zlib.error) as error:
        raise BadSample(f"mask {path.name} is no MATLAB file that can be read: {error}") from error
    if variable not in contents:
        named = sorted(name for name in contents if not name.startswith("__"))
        raise BadSample(f"mask {path.name} has no variable {variable!r}, but {', '.join(named) or 'none at all'}")
    ids = np.asarray(contents[variable])
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.number) or not np.array_equal(ids, ids.astype(np.uint16)):
        raise BadSample(f"mask {path.name}: the variable {variable!r} is no matrix of ids 0..65535")
    return Image.fromarray(ids.astype(np.uint16))


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
        unknown = np.setdiff1d(values, label.levels)
        if unknown.size:
            raise BadSample(f"mask {path.name} has the value {_some(unknown)}, outside {list(label.levels)}")
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
        raise BadSample(f"mask {path.name} is of mode {mask.mode}, the label rule reads {', '.join(modes)}")
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
