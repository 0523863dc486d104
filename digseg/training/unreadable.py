"""Samples that could not be read: counted over all ranks, told once, and too many of them stop the run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from digseg.errors import DigSegError
from digseg.training.world import World

_log = logging.getLogger(__name__)


class UnreadableSamples:
    """The distinct samples of a run that were unreadable and replaced, the same on every rank after each
    :meth:`share`.

    Args:
        limit: so many are borne (``data.max_corrupt``).
        known: keys that were counted before the run was interrupted.
    """

    def __init__(self, world: World, limit: int, known: Iterable[str] = ()) -> None:
        self._world, self._limit = world, limit
        self._known = set(known)
        self._new: dict[str, str] = {}

    @property
    def keys(self) -> list[str]:
        """All that were shared, sorted."""
        return sorted(self._known)

    def add(self, reasons: Mapping[str, str]) -> None:
        """Note what this rank met: key -> reason."""
        self._new.update((key, reason) for key, reason in reasons.items() if key not in self._known)

    def share(self) -> int:
        """Tell all ranks what each met since the last time; every rank has to call it. The number of samples.

        Raises:
            DigSegError: they are more than the limit, on all ranks alike.
        """
        met = {key: reason for part in self._world.gather(self._new) for key, reason in part.items()}
        self._new = {}
        if self._world.is_main:
            for key in sorted(met):
                _log.warning("unreadable and replaced: %s", met[key])
        self._known |= met.keys()
        if len(self._known) > self._limit:
            last = f", the last: {met[max(met)]}" if met else ""
            raise DigSegError(
                f"{len(self._known)} samples could not be read (data.max_corrupt is {self._limit}){last}; make the "
                "shards again, or raise data.max_corrupt"
            )
        return len(self._known)
