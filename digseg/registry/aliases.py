"""Aliases that move one at a time: compare-and-set, with the way back.

MLflow moves an alias unconditionally. Here a move holds a lock while it compares and sets. A lock is a tag of the
registered model, of a name of its own: whoever wants to move an alias puts one there and then looks whether there are
others; of two at the same time at least one sees the other and steps back. So a lock is never replaced by another of
the same name, which makes it safe to remove one that a dead process left, and it needs no more rights than moving the
alias does. Former versions of an alias are kept in another tag of the model, the newest last.
"""

from __future__ import annotations

import getpass
import os
import platform
import random
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby

from mlflow.entities.model_registry import RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from digseg.errors import DigSegError
from digseg.registry.store import connect, first_line, is_absent

_LOCK = "digseg.alias-lock."
_LEFT_S = 120.0  # a lock that has been there this long was left by a process that died ...
_HOLD_S = 60.0  # ... for its owner gives up before; a move takes less than a second
_WAIT_S = 150.0
_PAUSE_S = (0.05, 0.25)  # between two looks, drawn anew: who met the other once should not meet it always
_KEPT_VERSIONS = 50
# What a store says where it is busy for a moment.
_TRY_AGAIN = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE"}


class AliasMovedError(DigSegError):
    """An alias does not mean any more what it meant when a decision about it was made."""


def move_alias(store: str, name: str, alias: str, version: int, expected: int | None) -> None:
    """Let `models:/name@alias` mean `version`, if it still means `expected` (None: if there is no such alias).

    Raises:
        AliasMovedError: it means something else by now; nothing was changed.
        DigSegError: the store refuses, or another process keeps moving aliases of this model.
    """
    with _locked(store, name) as model:
        current = model.version(alias)
        if current != expected:
            raise AliasMovedError(
                f"models:/{name}@{alias} is {_named(current)} now, but was {_named(expected)} when it was compared: "
                "somebody else was quicker; nothing was changed, compare anew"
            )
        model.set(alias, version, [*model.history(alias), version])


def set_alias(store: str, name: str, alias: str, version: int) -> None:
    """Let `models:/name@alias` mean `version`, whatever it meant before.

    Raises:
        DigSegError: a name that cannot be an alias, or the store refuses.
    """
    with _locked(store, name) as model:
        model.set(alias, version, [*model.history(alias), version])


def roll_back(store: str, name: str, alias: str) -> tuple[int, int]:
    """Let an alias mean again what it meant before.

    Returns:
        The version that it meant, and the one that it means now.

    Raises:
        DigSegError: there is no such alias or no version before, that version is gone, or the store refuses.
    """
    with _locked(store, name) as model:
        current = model.version(alias)
        if current is None:
            raise DigSegError(f"model {name!r} has no alias {alias!r}, so there is nothing to roll back")
        before = model.history(alias)
        while before and before[-1] == current:
            before.pop()
        if not before:
            raise DigSegError(
                f"models:/{name}@{alias} has been version {current} only, as far as is known: there is nothing to "
                "roll back to"
            )
        if not model.has(before[-1]):
            raise DigSegError(
                f"models:/{name}@{alias} was version {before[-1]} before, but that was deleted; promote another one "
                "(digseg promote --from VERSION)"
            )
        model.set(alias, before[-1], before)
        return current, before[-1]


class _LockedModel:
    """A registered model whose aliases only this process moves."""

    def __init__(self, client: MlflowClient, model: RegisteredModel, lock: _Lock) -> None:
        self._client, self._model, self._lock = client, model, lock
        self._name = str(model.name)

    def version(self, alias: str) -> int | None:
        """The version that an alias means now, or None."""
        version = self._model.aliases.get(alias)
        return None if version is None else int(version)

    def history(self, alias: str) -> list[int]:
        """Versions that the alias meant, the current one last, even if something else than DigSeg set it."""
        known = [int(number) for number in self._model.tags.get(_tag(alias), "").split(",") if number]
        current = self.version(alias)
        return known if current is None or current in known[-1:] else [*known, current]

    def has(self, version: int) -> bool:
        """Whether the version exists; raises MlflowException where the store fails."""
        try:
            self._client.get_model_version(self._name, str(version))
        except MlflowException as error:
            if is_absent(error):
                return False
            raise
        return True

    def set(self, alias: str, version: int, history: list[int]) -> None:
        """Move the alias and note its versions so far."""
        tags = self._client.get_registered_model(self._name).tags
        if self._lock.key not in tags or time.monotonic() - self._lock.since > _HOLD_S:
            raise DigSegError(
                f"the lock on the aliases of {self._name!r} was held for more than {_HOLD_S:.0f} s, and another "
                "process may have taken it over; nothing was changed, try again"
            )
        try:
            self._client.set_registered_model_alias(self._name, alias, str(version))
        except MlflowException as error:
            raise DigSegError(f"alias {alias!r} cannot be set: {first_line(error)}") from error
        distinct = [str(number) for number, _ in groupby(history)][-_KEPT_VERSIONS:]
        try:
            self._client.set_registered_model_tag(self._name, _tag(alias), ",".join(distinct))
        except MlflowException as error:
            raise DigSegError(
                f"models:/{self._name}@{alias} is version {version} now, but what it was before could not be noted: "
                f"{first_line(error)}"
            ) from error


@dataclass(frozen=True)
class _Lock:
    key: str  # of the tag, used once and never again
    since: float  # monotonic time before which nobody saw it


@contextmanager
def _locked(store: str, name: str) -> Iterator[_LockedModel]:
    client = connect(store)
    try:
        lock, model = _acquired(client, name)
        try:
            yield _LockedModel(client, model, lock)
        finally:
            _remove(client, name, lock.key)
    except MlflowException as error:
        raise DigSegError(f"the registry {store} does not move aliases of {name!r}: {first_line(error)}") from error


def _acquired(client: MlflowClient, name: str) -> tuple[_Lock, RegisteredModel]:
    """Wait until no other lock counts, and hold one; the model as it is then."""
    deadline = time.monotonic() + _WAIT_S
    seen: dict[str, float] = {}  # locks of others -> when this process saw them first
    while True:
        try:
            owners = _owners(client.get_registered_model(name), seen)
            if not owners and (held := _put(client, name, seen)):
                return held
        except MlflowException as error:
            if error.error_code not in _TRY_AGAIN:
                raise
            owners = [first_line(error)]
        if time.monotonic() > deadline:
            by = f" ({', '.join(owners)})" if owners else ""
            raise DigSegError(f"aliases of {name!r} are being moved by another process{by}; try again later")
        time.sleep(random.uniform(*_PAUSE_S))


def _put(client: MlflowClient, name: str, seen: dict[str, float]) -> tuple[_Lock, RegisteredModel] | None:
    """Put a lock on the model, and take it off again (None) if somebody else did the same meanwhile."""
    lock = _Lock(f"{_LOCK}{uuid.uuid4().hex}", time.monotonic())
    alone = False
    try:
        client.set_registered_model_tag(name, lock.key, f"{getpass.getuser()} on {platform.node()}, {os.getpid()}")
        # Of two processes that put theirs at the same time, at least one sees the other's here.
        model = client.get_registered_model(name)
        alone = not _owners(model, seen, besides=lock.key)
    finally:
        for key in list(seen) if alone else [lock.key]:
            _remove(client, name, key)
    return (lock, model) if alone else None


def _owners(model: RegisteredModel, seen: dict[str, float], besides: str | None = None) -> list[str]:
    """The owners of locks that count. That a lock was left behind is told by how long this process has seen it, as
    the clocks of two machines may differ."""
    now = time.monotonic()
    locks = {key: owner for key, owner in model.tags.items() if key.startswith(_LOCK) and key != besides}
    for gone in seen.keys() - locks.keys():
        del seen[gone]
    return [owner for key, owner in locks.items() if now - seen.setdefault(key, now) < _LEFT_S]


def _remove(client: MlflowClient, name: str, lock: str) -> None:
    with suppress(MlflowException):  # what stays counts as left behind after a while
        client.delete_registered_model_tag(name, lock)


def _tag(alias: str) -> str:
    return f"digseg.history.{alias}"


def _named(version: int | None) -> str:
    return "no version" if version is None else f"version {version}"
