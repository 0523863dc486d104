"""Files that commands of `digseg` write, named by an option."""

from __future__ import annotations

from pathlib import Path

from digseg.errors import DigSegError


def check_file(option: str, path: Path) -> None:
    """Whether a file can be made there, before long work is done for it.

    Raises:
        DigSegError: it is a folder, or in one that is not there.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise DigSegError(f"{option} {path}: give the name of a file in a folder that exists")


def write_file(option: str, path: Path, content: str) -> None:
    """Write text.

    Raises:
        DigSegError: it cannot be written.
    """
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise DigSegError(f"{option} {path} cannot be written: {error.strerror or error}") from error
