"""Which samples of a corpus make a split."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from data_prep.corpora.patterns import Fields, filled, match_fields, without_suffix
from data_prep.corpora.spec import EveryNthSplits, ListSplits, NumberSplits, Splits, ValueSplits
from digseg.errors import DigSegError


def choose(rule: Splits, split: str, root: Path, keys: Mapping[Fields, str], names: Iterable[str]) -> list[Fields]:
    """The samples of a split out of all that were found, whose ``keys`` are given.

    A file that lists samples may name some that were not found: they are given too, with all their fields (``names``
    are the fields of a sample).

    Raises:
        DigSegError: a file that makes the splits is missing or says nothing of the split.
    """
    if isinstance(rule, EveryNthSplits):
        return _every_nth(rule, split, keys)
    if isinstance(rule, NumberSplits):
        return [fields for fields in keys if _below(dict(fields), rule) == (split == rule.below)]
    if isinstance(rule, ValueSplits):
        return [fields for fields in keys if dict(fields)[rule.field] in rule.splits[split]]
    if isinstance(rule, ListSplits):
        return _listed(rule, split, root, keys, names)
    return list(keys)


def _every_nth(rule: EveryNthSplits, split: str, keys: Mapping[Fields, str]) -> list[Fields]:
    groups = {fields: key if rule.field is None else dict(fields)[rule.field] for fields, key in keys.items()}
    held_back = set(sorted(set(groups.values()))[:: rule.n])
    return [fields for fields, group in groups.items() if (group in held_back) == (split == rule.nth)]


def _below(fields: Mapping[str, str], rule: NumberSplits) -> bool:
    value = fields[rule.field]
    if not value.isdecimal():
        raise DigSegError(f"the splits go by the number in {{{rule.field}}}, but a file has {value!r} there")
    return int(value) < rule.bound


def _listed(rule: ListSplits, split: str, root: Path, found: Iterable[Fields], names: Iterable[str]) -> list[Fields]:
    wanted = dict.fromkeys(_read_list(root, rule, split))
    elsewhere = set() if split == rule.duplicates else set(_read_list(root, rule, rule.duplicates))
    by_entry: dict[str | int, list[Fields]] = defaultdict(list)
    for fields in found:
        entry = filled(rule.entry, fields)
        by_entry[entry].append(fields)
        if entry.isdecimal():
            by_entry[int(entry)].append(fields)
    chosen = []
    for listed in wanted:
        if listed not in elsewhere:
            chosen += by_entry.get(listed) or [_fields_of_absent(rule, split, root, str(listed), names)]
    return list(dict.fromkeys(chosen))


def _fields_of_absent(rule: ListSplits, split: str, root: Path, entry: str, names: Iterable[str]) -> Fields:
    """Fields of a sample that a list names and no file matches; what the list does not say is "?"."""
    fields = match_fields(rule.entry, entry)
    if fields is None:
        raise DigSegError(f"{_list_path(root, rule, split)}: the entry {entry!r} is not of the form {rule.entry}")
    return tuple(sorted((dict.fromkeys(names, "?") | fields).items()))


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
    return without_suffix(text.replace("\\", "/").rsplit("/", 1)[-1])
