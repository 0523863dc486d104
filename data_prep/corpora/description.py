"""Loading a corpus' description: ``extends``, descriptions beside the data, errors by file and field."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from data_prep.corpora.spec import Colour, CorpusSpec, Domain, Level, Name
from digseg.errors import DigSegError, nearest

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "corpora"

_Model = TypeVar("_Model", bound=BaseModel)


def load_spec(path: Path, root: Path) -> tuple[str, CorpusSpec]:
    """Name and description of the corpus that the YAML file ``path`` describes.

    ``extends: other.yaml`` starts from another file beside it; mappings are merged, all else is replaced, and so is
    a mapping that names another kind of rule (``by``, ``reader``). A file with ``described_by: classes.yaml``
    takes the description from that file below ``root``.

    Raises:
        DigSegError: naming the file and the field.
    """
    document = _resolved(path)
    if "described_by" not in document:
        return path.stem, _validated(CorpusSpec, document, path)
    inside = root / str(document["described_by"])
    if not inside.is_file():
        raise DigSegError(f"{inside} is missing: a folder corpus needs it, with `classes`, `domain` and `licence`")
    classes = _validated(ClassesFile, _read(inside), inside)
    name = path.stem if path.stem != "folder" or classes.name is None else classes.name
    return name, _validated(CorpusSpec, _folder_description(classes, root), inside)


class ClassesFile(BaseModel):
    """The ``classes.yaml`` of a user's folder with ``images/`` and ``masks/``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[Name, Field(pattern=r"^[A-Za-z0-9_-]+$")] | None = None
    """Name of the corpus; without it, ``folder``."""
    classes: Annotated[tuple[Name, ...], Field(min_length=1)] | dict[Level, Name] | dict[Name, Colour]
    """Class names, mask value 0, 1, 2, ... in order; a mapping of mask value to class name; or, for masks in
    colours, of class name to colour (red, green, blue)."""
    ignore: tuple[Level, ...] | tuple[Colour, ...] | None = None
    """Mask values, or colours, that carry no label; without it, 255 where masks hold values."""
    domain: Domain
    licence: Name
    may_contain: tuple[Name, ...] = ()
    exif: Literal["apply", "ignore"] = "apply"
    splits: Name | Annotated[StrictInt, Field(ge=2)] | None = None
    """A YAML file of the names in each split, or N: every Nth image is ``val``, the rest ``train``.

    Without it the sub-folders of ``images/`` are the splits; without sub-folders every 5th image is ``val``.
    """


DEFAULT_EVERY_NTH = 5


def _folder_description(classes: ClassesFile, root: Path) -> dict[str, Any]:
    patterns = {"images": "images/{name}.*", "masks": "masks/{name}.*"}
    folders = _sub_folders(root / "images")
    layout: dict[str, Any] = {"all": patterns}
    splits: dict[str, Any]
    if isinstance(classes.splits, str):
        names = _split_names(root / classes.splits)
        splits = {
            "by": "list",
            "file": classes.splits,
            "entry": "{name}",
            "splits": names,
            "duplicates": names[-1],
        }
    elif classes.splits is None and folders:
        layout = {f: {"images": f"images/{f}/{{name}}.*", "masks": f"masks/{f}/{{name}}.*"} for f in folders}
        splits = {"by": "folder"}
    else:
        splits = {
            "by": "every_nth",
            "n": classes.splits or DEFAULT_EVERY_NTH,
            "nth": "val",
            "others": "train",
        }
    return {
        "title": f"{classes.name or root.name}, a folder of images and masks",
        "domain": classes.domain,
        "licence": classes.licence,
        "may_contain": classes.may_contain,
        "key": "{name}",
        "layout": layout,
        "splits": splits,
        "channel_order": "rgb",
        "exif": {"image": classes.exif, "mask": "own" if classes.exif == "apply" else "ignore"},
        "label": _folder_label(classes),
    }


def _folder_label(classes: ClassesFile) -> dict[str, Any]:
    named = classes.classes
    values = dict(named) if isinstance(named, dict) else dict(enumerate(named))
    if any(isinstance(name, str) for name in values):
        return {
            "reader": "colour",
            "colours": values,
            "ignore": classes.ignore or (),
            "other_colours": "bad_sample",
            "binarise_at": None,
            "dropped_classes": "error",
        }
    ignored = (255,) if classes.ignore is None else classes.ignore
    return {
        "reader": "index",
        "values": values,
        "ignore": [value for value in ignored if value not in values],
        "other_values": "bad_sample",
        "dropped_classes": "error",
    }


def _sub_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DigSegError(f"{folder} does not exist: a folder corpus has images/, masks/ and classes.yaml")
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _split_names(path: Path) -> list[str]:
    names = [str(name) for name in _read(path)]
    if not names:
        raise DigSegError(f"{path}: names no split")
    return names


def _resolved(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    document = _read(path)
    parent = document.pop("extends", None)
    if parent is None:
        return document
    base = (path.parent / str(parent)).resolve()
    if not base.is_file():
        raise DigSegError(f"{path}: field extends: {base} does not exist")
    if base in seen or base == path.resolve():
        raise DigSegError(f"{path}: field extends: {parent} extends this file again")
    return _merged(_resolved(base, (*seen, path.resolve())), document)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        before = merged.get(key)
        if isinstance(value, dict) and isinstance(before, dict) and not _of_another_kind(before, value):
            merged[key] = _merged(before, value)
        else:
            merged[key] = value
    return merged


def _of_another_kind(base: Mapping[str, Any], over: Mapping[str, Any]) -> bool:
    return any(name in over and over[name] != base.get(name) for name in ("by", "reader"))


def _read(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DigSegError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise DigSegError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise DigSegError(f"{path}: must hold a mapping of fields")
    return document


def _validated(model: type[_Model], document: Mapping[str, Any], path: Path) -> _Model:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        problems = "; ".join(_problem(model, dict(item)) for item in error.errors())
        raise DigSegError(f"{path}: {problems}") from error


def _problem(model: type[BaseModel], item: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        hint = nearest(str(item["loc"][-1]), model.model_fields) if len(item["loc"]) == 1 else ""
        return f"field {where}: unknown{hint}"
    if item["type"] == "missing":
        return f"field {where}: missing"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"field {where}: {message}" if where else message
