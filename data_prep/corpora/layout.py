"""Finding a corpus' samples: pairs of image and mask, cut into tiles where they are large. Reads no pixels."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from data_prep.corpora.patterns import Fields, filled, find
from data_prep.corpora.spec import TILE_FIELD, CorpusSpec, FilePatterns, FolderSplits, Tiles, sample_fields
from data_prep.corpora.splits import choose
from data_prep.corpora.tiles import Box, tile_boxes
from digseg.errors import DigSegError


@dataclass(frozen=True)
class SampleRef:
    """One sample of a split. ``problem`` says why it cannot be read (it has no mask, for one), else None."""

    key: str
    image: Path
    mask: Path | tuple[Path, ...]
    problem: str | None = None
    box: Box | None = None
    """The part of the image and mask that is the sample; None is all of it."""


def list_samples(spec: CorpusSpec, root: Path, split: str) -> list[SampleRef]:
    """The samples of a split, sorted by key; keys are unique and free of dots and slashes.

    A sample with a file missing is listed with its ``problem``, so that it is reported, not left out.

    Raises:
        DigSegError: a file that makes the splits is missing or says nothing of the split.
    """
    by_folder = isinstance(spec.splits, FolderSplits)
    patterns = spec.layout[split] if by_folder else next(iter(spec.layout.values()))
    pairs = _pairs(root, patterns)
    if spec.tiles is not None:
        pairs = _cut(pairs, spec.tiles)
    keys = {fields: _key(spec, fields) for fields in pairs}
    chosen = choose(spec.splits, split, root, keys, sample_fields(spec, patterns))
    unique = _unique_keys(spec, chosen)
    refs = [_sample(unique[fields], fields, patterns, root, pairs.get(fields)) for fields in chosen]
    return sorted(refs, key=lambda ref: ref.key)


@dataclass
class _Files:
    images: list[Path]
    masks: list[Path]
    box: Box | None = None


def _pairs(root: Path, patterns: FilePatterns) -> dict[Fields, _Files]:
    pairs: dict[Fields, _Files] = defaultdict(lambda: _Files([], []))
    for fields, path in find(root, patterns.images):
        pairs[fields].images.append(path)
    for fields, path in find(root, patterns.masks):
        pairs[fields].masks.append(path)
    return dict(sorted(pairs.items()))


def _cut(pairs: Mapping[Fields, _Files], tiles: Tiles) -> dict[Fields, _Files]:
    """The pairs, each image cut into tiles; one whose size cannot be read stays whole, to be reported."""
    cut: dict[Fields, _Files] = {}
    for fields, files in pairs.items():
        size = _size(files.images[0]) if files.images else None
        boxes = tile_boxes(*size, tiles) if size else []
        for number, box in enumerate(boxes):
            if box is not None:
                cut[_with(fields, TILE_FIELD, str(number))] = _Files(files.images, files.masks, box)
        if size is None:
            cut[_with(fields, TILE_FIELD, "all")] = files
    return cut


def _size(path: Path) -> tuple[int, int] | None:
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return None


def _with(fields: Fields, name: str, value: str) -> Fields:
    return tuple(sorted((*fields, (name, value))))


def _sample(key: str, fields: Fields, patterns: FilePatterns, root: Path, files: _Files | None) -> SampleRef:
    image, mask = (root / filled(pattern, fields) for pattern in (patterns.images, patterns.masks))
    if files is None and TILE_FIELD in dict(fields) and image.is_file():
        problem = f"{_below_root(image, root)} has no whole tile {dict(fields)[TILE_FIELD]}"
        return SampleRef(key, image, mask, problem)
    files = files or _Files([], [])
    several_masks = "*" in patterns.masks.removesuffix(".*")
    problems = []
    if not files.images:
        problems.append(f"no image {_below_root(image, root)}")
    if not files.masks:
        problems.append(f"no mask {_below_root(mask, root)}")
    if len(files.images) > 1:
        problems.append(f"several images: {', '.join(_below_root(path, root) for path in files.images)}")
    if len(files.masks) > 1 and not several_masks:
        problems.append(f"several masks: {', '.join(_below_root(path, root) for path in files.masks)}")
    masks = tuple(files.masks) if several_masks and files.masks else next(iter(files.masks), mask)
    return SampleRef(key, next(iter(files.images), image), masks, "; ".join(problems) or None, files.box)


def _below_root(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _unique_keys(spec: CorpusSpec, chosen: list[Fields]) -> dict[Fields, str]:
    keys = {fields: _key(spec, fields) for fields in chosen}
    owners: dict[str, Fields] = {}
    for fields, key in keys.items():
        if key in owners:
            raise DigSegError(
                f"two samples share the key {key!r}: {dict(owners[key])} and {dict(fields)}; "
                "rename one, or name more fields in the corpus' `key`"
            )
        owners[key] = fields
    return keys


def _key(spec: CorpusSpec, fields: Fields) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", filled(spec.key, fields))
