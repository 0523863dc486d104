"""Class names as users write them. Free of heavy imports, so that a wrong query is refused at once."""

from __future__ import annotations

from collections.abc import Sequence

from digseg.errors import DigSegError

BACKGROUND = "background"


def split_classes(text: str) -> list[str]:
    """Class names from "road, car, sky"; empty names stay, so that they can be reported."""
    return [name.strip() for name in text.split(",")] if text.strip() else []


def check_classes(classes: Sequence[str], background: bool, max_classes: int) -> tuple[str, ...]:
    """The cleaned class names of a query.

    Args:
        background: put a ``background`` class first if none of the names is it.
        max_classes: what one query of the model holds.

    Raises:
        DigSegError: no class, an empty or repeated name, or more than the model holds.
    """
    names = tuple(" ".join(name.split()) for name in classes)
    if not names:
        raise DigSegError('no classes given; name at least one, e.g. --classes "road, car, sky"')
    if "" in names:
        raise DigSegError(f"class {names.index('') + 1} of {len(names)} is an empty name; remove it")
    lowered = [name.lower() for name in names]
    repeated = sorted({name for name in lowered if lowered.count(name) > 1})
    if repeated:
        raise DigSegError(f"class names given twice: {', '.join(repeated)}; name each class once")
    if background and BACKGROUND not in lowered:
        names = (BACKGROUND, *names)
    if len(names) > max_classes:
        raise DigSegError(f"{len(names)} classes, but one query of this model holds {max_classes}; ask for fewer")
    return names
