"""Read a run's YAML, apply overrides, validate, and say what is wrong in the user's own terms."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from digseg.config.schema import Config
from digseg.config.section import is_hub_id, is_location, is_weights
from digseg.errors import DigSegError, nearest

SectionT = TypeVar("SectionT", bound=BaseModel)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The validated configuration of ``path`` with ``key.path=value`` overrides applied in order.

    Overrides in ``$DIGSEG_OVERRIDES``, separated as in a shell, come before the given ones. A file may name
    another with ``extends: other.yaml`` (relative to itself); its own keys win, lists are replaced whole.
    Relative locations become absolute, below :func:`base_directory`.

    Raises:
        DigSegError: for a missing or malformed file, an unknown key (with the nearest valid one), a value
            of the wrong type, or a combination that cannot run.
    """
    values = _read_with_parents(Path(path), seen=())
    overrides = [*shlex.split(os.environ.get("DIGSEG_OVERRIDES", "")), *overrides]
    for override in overrides:
        _apply_override(values, override)
    config = _validated(Config, values, str(path), overrides)
    return Config.model_validate(_with_absolute_locations(config).model_dump(mode="json"))


def load_section(path: str | Path, kind: type[SectionT]) -> SectionT:
    """A file that holds one section of its own: a protocol, a gate. Relative locations become absolute.

    Raises:
        DigSegError: as :func:`load_config` says.
    """
    return _with_absolute_locations(_validated(kind, _read_with_parents(Path(path), seen=()), str(path)))


def section_of_options(kind: type[SectionT], values: Mapping[str, Any]) -> SectionT:
    """A section whose fields are options of a command; those that are None were not given.

    Raises:
        DigSegError: a value that the field does not take.
    """
    return _validated(kind, {name: value for name, value in values.items() if value is not None}, "options")


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that :func:`load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def base_directory() -> Path:
    """Where relative locations start: ``$DIGSEG_HOME``, else the current directory.

    A submitted Ray job runs in a throw-away copy of its working directory, where results would be lost and
    a resubmitted run would not find itself; there the default is ``~/digseg``.
    """
    if home := os.environ.get("DIGSEG_HOME"):
        return Path(home).expanduser().absolute()
    if "working_dir_files" in Path.cwd().parts:
        return Path.home() / "digseg"
    return Path.cwd()


def _read_with_parents(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in seen:
        chain = " -> ".join(p.name for p in (*seen, resolved))
        raise DigSegError(f"{path}: 'extends' runs in a circle ({chain}); remove one of them")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DigSegError(f"{path}: cannot read the configuration: {error.strerror}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DigSegError(f"{path}: not valid YAML: {error}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise DigSegError(f"{path}: expected 'key: value' pairs at the top, got {type(values).__name__}")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise DigSegError(f"{path}: extends: expected a file name, got {parent!r}")
    return _merged(_read_with_parents(path.parent / parent, (*seen, resolved)), values)


def _merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in top.items():
        below = result.get(key)
        result[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise DigSegError(f"override {override!r}: expected key.path=value, e.g. training.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    *parents, leaf = key.split(".")
    node: Any = values
    for depth, part in enumerate(parents):
        node = _child(node, part, ".".join(parents[: depth + 1]), override)
    if isinstance(node, list):
        node[_position(node, leaf, key, override)] = value
    elif isinstance(node, dict):
        node[leaf] = value
    else:
        raise DigSegError(f"override {override!r}: {'.'.join(parents)} is a value, not a section")


def _child(node: Any, part: str, path: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, part, path, override)]
    if not isinstance(node, dict):
        raise DigSegError(f"override {override!r}: {path.rpartition('.')[0]} is a value, not a section")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _position(items: list[Any], part: str, path: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise DigSegError(
            f"override {override!r}: {path} indexes a list of {len(items)} entries; use 0 to {len(items) - 1}"
        )
    return int(part)


def _with_absolute_locations(section: SectionT) -> SectionT:
    updates: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            updates[name] = _with_absolute_locations(value)
        elif isinstance(value, str) and "://" not in value and is_location(field):
            path = (base_directory() / Path(value).expanduser()).absolute()
            if not (is_weights(field) and is_hub_id(value) and not path.is_dir()):
                updates[name] = str(path)
    return section.model_copy(update=updates)


def _validated(kind: type[SectionT], values: Mapping[str, Any], path: str, overrides: Sequence[str] = ()) -> SectionT:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        source = path if not overrides else f"{path} with {' '.join(overrides)}"
        lines = [f"  {_describe_one(problem, kind)}" for problem in error.errors(include_url=False)]
        raise DigSegError("\n".join([f"{source}: the configuration is not valid", *lines])) from None


def _describe_one(problem: Mapping[str, Any], kind: type[BaseModel]) -> str:
    location = tuple(problem["loc"])
    key = ".".join(str(part) for part in location) or "(whole file)"
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key{nearest(str(location[-1]), _valid_keys(kind, location[:-1]))}"
    if problem["type"] == "missing":
        return f"{key}: missing; it has no default"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}"
    return f"{key}: got {problem['input']!r}; {message[:1].lower()}{message[1:]}"


def _valid_keys(kind: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Names of the fields of the section at ``location``; empty where it is no section."""
    section: Any = kind
    for part in location:
        if isinstance(part, int):
            continue
        section = _section_of(section.model_fields[part].annotation)
        if section is None:
            return []
    return list(section.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class inside ``annotation`` (``X``, ``X | None``, ``list[X]``)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (found := _section_of(inner)) is not None:
            return found
    return None
