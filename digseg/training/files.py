"""Small files of a run that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from digseg.errors import DigSegError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses, a full disk for instance, into an error that names the file.

    Raises:
        DigSegError: an OSError came.
    """
    try:
        yield
    except OSError as error:
        raise DigSegError(
            f"{path} cannot be written: {error.strerror}; make room, or point run.storage at another place"
        ) from error


def write_whole(path: Path, text: str, durable: bool = False) -> None:
    """Put ``text`` in the place of what the file had; where ``durable``, it is on the disk before that.

    Raises:
        DigSegError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.tmp")
    with writing(path):
        with partial.open("w") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
