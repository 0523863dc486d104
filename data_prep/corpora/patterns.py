"""Path patterns of descriptions: ``{field}`` names a part of one path segment, ``*`` is any part, ``.*`` any suffix."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "tif", "tiff", "bmp")
_SUFFIX = rf"\.(?i:{'|'.join(IMAGE_SUFFIXES)})"
_FIELD = r"\{\w+(?::[^{}]+)?\}"

Fields = tuple[tuple[str, str], ...]
"""The named fields of a path, sorted by name: what makes an image and a mask belong together."""


def pattern_fields(pattern: str) -> list[str]:
    """Names of the fields of a pattern, in order, repeats included."""
    return [_field_name(part) for part in re.findall(_FIELD, pattern)]


def check_pattern(pattern: str) -> None:
    """Refuse a pattern with an expression that is none.

    Raises:
        ValueError: naming the field.
    """
    for part in re.findall(_FIELD, pattern):
        try:
            _expression(part, {})
        except re.error as error:
            raise ValueError(f"{part} holds no regular expression: {error}") from error


def missing_folder(root: Path, pattern: str) -> Path | None:
    """The first folder without fields in its name that a pattern needs and that is not there."""
    folder = root
    for segment in pattern.split("/")[:-1]:
        folder /= segment
        if "{" in segment or "*" in segment:
            return None
        if not folder.is_dir():
            return folder
    return None


def find(root: Path, pattern: str) -> Iterator[tuple[Fields, Path]]:
    """The files below ``root`` that match a pattern, with their fields. Hidden files never match."""
    yield from _walk(root, pattern.split("/"), {})


def match_fields(segment: str, text: str) -> dict[str, str] | None:
    """The fields that a pattern of one segment gives a text; None where it does not match."""
    match = _expression(segment, {}).fullmatch(text)
    return None if match is None else match.groupdict()


def filled(pattern: str, fields: Fields) -> str:
    """The pattern with the values of its fields in their places."""
    values = dict(fields)
    return re.sub(_FIELD, lambda match: values[_field_name(match[0])], pattern)


def without_suffix(name: str) -> str:
    """A file name without its image suffix."""
    return re.sub(_SUFFIX + "$", "", name)


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
    for part in re.split(rf"({_FIELD}|\*)", segment[:-2] if any_suffix else segment):
        name, allowed = _field_name(part), part[1:-1].partition(":")[2]
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


def _field_name(part: str) -> str:
    """The name in ``{name}`` or ``{name:expression}``."""
    return part[1:-1].partition(":")[0]
