"""Tallies on disk, each under the digest of everything that decides it: an evaluation that was cut short, or is asked
for again, does only what is missing."""

from __future__ import annotations

import os
from pathlib import Path

from digseg.errors import DigSegError
from digseg.evaluation.tally import Tally


class StoredTallies:
    """A folder of tallies by key (hexadecimal digest). Files appear whole; one that is damaged counts as missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DigSegError(f"{folder}: results cannot be kept there ({error.strerror}); choose another") from None

    def get(self, key: str) -> Tally | None:
        """The tally of a key, or None."""
        try:
            return Tally.from_bytes(self._path(key).read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def put(self, key: str, tally: Tally) -> None:
        """Keep a tally."""
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_bytes(tally.to_bytes())
        partial.replace(path)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.npz"
