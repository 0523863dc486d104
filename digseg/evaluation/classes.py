"""Class names as users write them. Free of heavy imports, so that a wrong query is refused at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from digseg.config.schema import BACKGROUND
from digseg.errors import DigSegError

MAX_CLASSES = 65535  # ids of a 16-bit mask


@dataclass(frozen=True, slots=True)
class ClassQuery:
    """A class as it is asked for: its name, and further wordings that mean the same."""

    name: str
    synonyms: tuple[str, ...] = ()

    @property
    def wordings(self) -> tuple[str, ...]:
        """The name and its synonyms."""
        return self.name, *self.synonyms


def parse_classes(text: str) -> list[ClassQuery]:
    """Classes from "road=street|lane, car"; empty names stay, so that they can be reported."""
    return [_parsed(entry) for entry in text.split(",")] if text.strip() else []


def read_classes(path: Path) -> list[ClassQuery]:
    """Classes from a YAML or JSON file such as the legend of an earlier prediction.

    ::

        classes:
          - car
          - {name: road, synonyms: [street, lane]}

    Raises:
        DigSegError: a file that cannot be read, or is not like this.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DigSegError(f"classes file {path} cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DigSegError(f"classes file {path} is neither YAML nor JSON: {error}") from None
    entries = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise DigSegError(f"classes file {path}: expected a list under the key 'classes'")
    return [_entry(entry, f"classes file {path}, entry {number}") for number, entry in enumerate(entries, start=1)]


def check_classes(classes: Sequence[str | ClassQuery], background: bool = False) -> tuple[ClassQuery, ...]:
    """The cleaned classes of a query.

    Args:
        background: put a ``background`` class first if none of the names is it.

    Raises:
        DigSegError: no class, an empty name or synonym, one that stands for two classes, or more classes than a mask
            has ids.
    """
    queries = tuple(_cleaned(entry if isinstance(entry, ClassQuery) else ClassQuery(entry)) for entry in classes)
    if not queries:
        raise DigSegError('no classes given; name at least one, e.g. --classes "road, car, sky"')
    for number, query in enumerate(queries, start=1):
        if not query.name:
            raise DigSegError(f"class {number} of {len(queries)} is an empty name; remove it")
        if "" in query.synonyms:
            raise DigSegError(f"class {query.name!r} has an empty synonym; remove it")
    counted = Counter(wording.lower() for query in queries for wording in query.wordings)
    repeated = sorted(wording for wording, count in counted.items() if count > 1)
    if repeated:
        raise DigSegError(f"class names given twice: {', '.join(repeated)}; name each class once")
    if background and background_of(queries) is None:
        queries = (ClassQuery(BACKGROUND), *queries)
    if len(queries) > MAX_CLASSES:
        raise DigSegError(f"{len(queries)} classes, but a mask has ids for {MAX_CLASSES}; ask for fewer")
    return queries


def background_of(queries: Sequence[ClassQuery]) -> int | None:
    """The number of the class that is the background, or None."""
    names = [query.name.lower() for query in queries]
    return names.index(BACKGROUND) if BACKGROUND in names else None


def ids_type(num_classes: int) -> type[np.uint8 | np.uint16]:
    """The type of the ids of a mask, as in shards."""
    return np.uint8 if num_classes <= 255 else np.uint16


def _parsed(text: str) -> ClassQuery:
    name, equals, rest = text.partition("=")
    return _cleaned(ClassQuery(name, tuple(rest.split("|")) if equals else ()))


def _entry(entry: Any, where: str) -> ClassQuery:
    if isinstance(entry, str):
        return ClassQuery(entry)
    if isinstance(entry, Mapping) and isinstance(entry.get("name"), str):
        synonyms = entry.get("synonyms", [])
        if isinstance(synonyms, list) and all(isinstance(wording, str) for wording in synonyms):
            return ClassQuery(entry["name"], tuple(synonyms))
    raise DigSegError(f"{where}: expected a name, or a mapping with 'name' and perhaps a list of 'synonyms'")


def _cleaned(query: ClassQuery) -> ClassQuery:
    name, *synonyms = (" ".join(wording.split()) for wording in query.wordings)
    return ClassQuery(name, tuple(synonyms))
