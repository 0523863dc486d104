"""Aliases that move one at a time: compare-and-set, with the way back.

MLflow moves an alias unconditionally. Here a move holds a lock while it compares and sets. The lock is a registered
model of a name that only one process can create (the name is the key of the store's table), so it works on every
store that MLflow has. Former versions of an alias are kept in a tag of the model, the newest last.
"""

from __future__ import annotations

import getpass
import os
import platform
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import groupby

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from digseg.errors import DigSegError
from digseg.registry.store import connect, first_line

LOCK_SUFFIX = ".alias-lock"
_WAIT_S = 20.0  # for another process, which needs less than a second
_STALE_S = 60.0  # a lock this old was left by a process that died
_POLL_S = 0.1
_KEPT_VERSIONS = 50
# What a store says where the lock exists, or where it is busy for a moment.
_TRY_AGAIN = {"RESOURCE_ALREADY_EXISTS", "INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE"}


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

    def __init__(self, client: MlflowClient, name: str, owner: str) -> None:
        self._client, self._name, self._owner = client, name, owner

    def version(self, alias: str) -> int | None:
        """The version that an alias means now, or None."""
        version = self._client.get_registered_model(self._name).aliases.get(alias)
        return None if version is None else int(version)

    def history(self, alias: str) -> list[int]:
        """Versions that the alias meant, the current one last, even if something else than DigSeg set it."""
        tags = self._client.get_registered_model(self._name).tags
        known = [int(number) for number in tags.get(_tag(alias), "").split(",") if number]
        current = self.version(alias)
        return known if current is None or current in known[-1:] else [*known, current]

    def has(self, version: int) -> bool:
        """Whether the version exists."""
        try:
            self._client.get_model_version(self._name, str(version))
        except MlflowException:
            return False
        return True

    def set(self, alias: str, version: int, history: list[int]) -> None:
        """Move the alias and note its versions so far."""
        if _owner(self._client, self._name) != self._owner:
            raise DigSegError(
                f"the lock on the aliases of {self._name!r} was held for more than {_STALE_S:.0f} s and taken over by "
                f"another process; nothing was changed, try again"
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


@contextmanager
def _locked(store: str, name: str) -> Iterator[_LockedModel]:
    client = connect(store)
    owner = f"{getpass.getuser()} on {platform.node()}, process {os.getpid()}, {uuid.uuid4().hex[:8]}"
    deadline = time.monotonic() + _WAIT_S
    while not _created(client, name, owner):
        _remove_if_stale(client, name)
        if time.monotonic() > deadline:
            raise DigSegError(
                f"aliases of {name!r} are being moved by another process ({_owner(client, name)}); try again in a "
                "minute, when its lock counts as left behind"
            )
        time.sleep(_POLL_S)
    try:
        yield _LockedModel(client, name, owner)
    except MlflowException as error:
        raise DigSegError(f"the registry {store} does not move aliases of {name!r}: {first_line(error)}") from error
    finally:
        with suppress(MlflowException):
            if _owner(client, name) == owner:
                client.delete_registered_model(name + LOCK_SUFFIX)


def _created(client: MlflowClient, name: str, owner: str) -> bool:
    """Whether this process made the lock, which nobody else holds then."""
    try:
        client.create_registered_model(name + LOCK_SUFFIX, tags={"owner": owner})
    except MlflowException as error:
        if error.error_code in _TRY_AGAIN:
            return False
        raise DigSegError(f"aliases of {name!r} cannot be locked: {first_line(error)}") from error
    return True


def _remove_if_stale(client: MlflowClient, name: str) -> None:
    with suppress(MlflowException):
        held_s = time.time() - client.get_registered_model(name + LOCK_SUFFIX).creation_timestamp / 1000
        if held_s > _STALE_S:
            client.delete_registered_model(name + LOCK_SUFFIX)


def _owner(client: MlflowClient, name: str) -> str | None:
    try:
        owner: str | None = client.get_registered_model(name + LOCK_SUFFIX).tags.get("owner")
    except MlflowException:
        return None
    return owner


def _tag(alias: str) -> str:
    return f"digseg.history.{alias}"


def _named(version: int | None) -> str:
    return "no version" if version is None else f"version {version}"
