"""Finding a corpus' files: path patterns, pairs of image and mask, tiles, splits. Reads no pixels."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, UnidentifiedImageError

from data_prep.corpora.spec import (
    FIELD,
    TILE_FIELD,
    CorpusSpec,
    EveryNthSplits,
    FilePatterns,
    FolderSplits,
    ListSplits,
    NumberSplits,
    Tiles,
    ValueSplits,
    field_name,
)
from digseg.errors import DigSegError

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "tif", "tiff", "bmp")
_SUFFIX = rf"\.(?i:{'|'.join(IMAGE_SUFFIXES)})"

Fields = tuple[tuple[str, str], ...]
"""The named fields of a path, sorted by name: what makes an image and a mask belong together."""

Box = tuple[int, int, int, int]
"""Left, upper, right and lower edge of a tile in pixels, as PIL has them."""


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
    rule = spec.splits
    patterns = spec.layout[split] if isinstance(rule, FolderSplits) else next(iter(spec.layout.values()))
    pairs = _pairs(root, patterns)
    if spec.tiles is not None:
        pairs = _cut(pairs, spec.tiles)
    if isinstance(rule, EveryNthSplits):
        chosen = _every_nth(pairs, spec, rule, split)
    elif isinstance(rule, NumberSplits):
        chosen = [fields for fields in pairs if _below(dict(fields), rule) == (split == rule.below)]
    elif isinstance(rule, ValueSplits):
        chosen = [fields for fields in pairs if dict(fields)[rule.field] in rule.splits[split]]
    elif isinstance(rule, ListSplits):
        chosen = _listed(pairs, root, rule, split)
    else:
        chosen = list(pairs)
    keys = _unique_keys(spec, chosen)
    refs = [_sample(keys[fields], fields, patterns, root, pairs) for fields in chosen]
    return sorted(refs, key=lambda ref: ref.key)


@dataclass
class _Files:
    images: list[Path]
    masks: list[Path]
    box: Box | None = None


def tile_boxes(width: int, height: int, tiles: Tiles) -> list[Box | None]:
    """The tiles of an image in order of their number; None where the edge cuts a tile that has to be whole."""
    boxes: list[Box | None] = []
    for upper, lower in _intervals(height, tiles):
        for left, right in _intervals(width, tiles):
            whole = lower - upper == right - left == tiles.size
            boxes.append((left, upper, right, lower) if whole or tiles.grid == "even" else None)
    return boxes


def _intervals(length: int, tiles: Tiles) -> list[tuple[int, int]]:
    count = -(-length // tiles.size)
    if tiles.grid == "even":
        return [(i * length // count, (i + 1) * length // count) for i in range(count)]
    return [(start, min(start + tiles.size, length)) for start in range(0, length, tiles.size)]


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


def find(root: Path, pattern: str) -> Iterator[tuple[Fields, Path]]:
    """The files below ``root`` that match a pattern, with their fields. Hidden files never match."""
    yield from _walk(root, pattern.split("/"), {})


def _walk(folder: Path, segments: list[str], known: Mapping[str, str]) -> Iterator[tuple[Fields, Path]]:
    segment, rest = segments[0], segments[1:]
    if "{" not in segment and "*" not in segment:
        names = [segment] if (folder / segment).exists() else []
    else:
        names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    expression = _expression(segment, known)
    for name in names:
        match = expression.fullmatch(name)
        if match is None or name.startswith("."):
            continue
        fields = {**known, **match.groupdict()}
        path = folder / name
        if not rest:
            if path.is_file():
                yield tuple(sorted(fields.items())), path
        elif path.is_dir():
            yield from _walk(path, rest, fields)


def _expression(segment: str, known: Mapping[str, str]) -> re.Pattern[str]:
    any_suffix = segment.endswith(".*")
    parts, seen = [], set()
    for part in re.split(rf"({FIELD}|\*)", segment[:-2] if any_suffix else segment):
        name, allowed = field_name(part), part[1:-1].partition(":")[2]
        if part == "*":
            parts.append(".*")
        elif not part.startswith("{"):
            parts.append(re.escape(part))
        elif name in known:
            parts.append(re.escape(known[name]))
        elif name in seen:
            parts.append(f"(?P={name})")
        else:
            parts.append(f"(?P<{name}>{allowed or '.+'})")
            seen.add(name)
    return re.compile("".join(parts) + (_SUFFIX if any_suffix else ""))


def _pairs(root: Path, patterns: FilePatterns) -> dict[Fields, _Files]:
    pairs: dict[Fields, _Files] = defaultdict(lambda: _Files([], []))
    for fields, path in find(root, patterns.images):
        pairs[fields].images.append(path)
    for fields, path in find(root, patterns.masks):
        pairs[fields].masks.append(path)
    return dict(sorted(pairs.items()))


def _sample(key: str, fields: Fields, patterns: FilePatterns, root: Path, pairs: Mapping[Fields, _Files]) -> SampleRef:
    files = pairs.get(fields, _Files([], []))
    several_masks = "*" in patterns.masks.removesuffix(".*")
    expected = [_filled(root, pattern, fields) for pattern in (patterns.images, patterns.masks)]
    if fields not in pairs and expected[0].is_file():
        problem = f"{_below_root(expected[0], root)} has no whole tile {dict(fields)[TILE_FIELD]}"
        return SampleRef(key, expected[0], expected[1], problem)
    problems = []
    if not files.images:
        problems.append(f"no image {_below_root(expected[0], root)}")
    if not files.masks:
        problems.append(f"no mask {_below_root(expected[1], root)}")
    if len(files.images) > 1:
        problems.append(f"several images: {', '.join(_below_root(path, root) for path in files.images)}")
    if len(files.masks) > 1 and not several_masks:
        problems.append(f"several masks: {', '.join(_below_root(path, root) for path in files.masks)}")
    image = files.images[0] if files.images else expected[0]
    first_mask = files.masks[0] if files.masks else expected[1]
    mask = tuple(files.masks) if several_masks and files.masks else first_mask
    return SampleRef(key, image, mask, "; ".join(problems) or None, files.box)


def _filled(root: Path, pattern: str, fields: Fields) -> Path:
    values = dict(fields)
    return root / re.sub(FIELD, lambda match: values[field_name(match[0])], pattern)


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
    return re.sub(r"[^A-Za-z0-9_-]+", "_", spec.key.format(**dict(fields)))


def _every_nth(pairs: Mapping[Fields, _Files], spec: CorpusSpec, rule: EveryNthSplits, split: str) -> list[Fields]:
    def group(fields: Fields) -> str:
        return _key(spec, fields) if rule.field is None else dict(fields)[rule.field]

    held_back = set(sorted({group(fields) for fields in pairs})[:: rule.n])
    return [fields for fields in pairs if (group(fields) in held_back) == (split == rule.nth)]


def _below(fields: Mapping[str, str], rule: NumberSplits) -> bool:
    value = fields[rule.field]
    if not value.isdecimal():
        raise DigSegError(f"the splits go by the number in {{{rule.field}}}, but a file has {value!r} there")
    return int(value) < rule.bound


def _listed(pairs: Mapping[Fields, _Files], root: Path, rule: ListSplits, split: str) -> list[Fields]:
    lists = {name: _read_list(root, rule, name) for name in rule.splits}
    wanted = lists[split]
    if split != rule.duplicates:
        wanted = [entry for entry in wanted if entry not in lists[rule.duplicates]]
    by_name: dict[str | int, list[Fields]] = defaultdict(list)
    for fields in pairs:
        value = rule.entry.format(**dict(fields))
        by_name[value].append(fields)
        if value.isdecimal():
            by_name[int(value)].append(fields)
    chosen = []
    for entry in dict.fromkeys(wanted):
        chosen += by_name.get(entry) or [_fields_of_absent(pairs, rule, entry, _list_path(root, rule, split))]
    return list(dict.fromkeys(chosen))


def _fields_of_absent(pairs: Mapping[Fields, _Files], rule: ListSplits, entry: str | int, listed_in: Path) -> Fields:
    """Fields of a sample that a list names and no file matches: it is reported as a bad sample."""
    match = _expression(rule.entry, {}).fullmatch(str(entry))
    if match is None:
        raise DigSegError(f"{listed_in}: the entry {entry!r} is not of the form {rule.entry}")
    unknown = {name: "?" for fields in pairs for name, _ in fields}
    return tuple(sorted((unknown | match.groupdict()).items()))


def _list_path(root: Path, rule: ListSplits, split: str) -> Path:
    return root / rule.file.replace("{split}", split)


def _read_list(root: Path, rule: ListSplits, split: str) -> list[str | int]:
    path = _list_path(root, rule, split)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DigSegError(f"{path}: cannot read the list of the splits ({error})") from error
    if path.suffix not in (".yaml", ".yml"):
        return [_entry(line.split()[0]) for line in text.splitlines() if line.strip()]
    try:
        document: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DigSegError(f"{path}: not valid YAML: {error}") from error
    entries = document.get(split) if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise DigSegError(f"{path}: has no list {split!r}")
    return [entry if isinstance(entry, int) else _entry(str(entry)) for entry in entries]


def _entry(text: str) -> str:
    return re.sub(_SUFFIX + "$", "", text.replace("\\", "/").rsplit("/", 1)[-1])
