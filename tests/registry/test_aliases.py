"""Aliases on a real SQLite store: compare-and-set, the way back, and locks that were left behind."""

from __future__ import annotations

import pytest
from mlflow.tracking import MlflowClient

from digseg.errors import DigSegError
from digseg.registry import aliases
from digseg.registry.aliases import LOCK_SUFFIX, AliasMovedError, move_alias, roll_back, set_alias
from digseg.registry.models import list_versions


def _champion(store: str) -> int:
    return int(MlflowClient(store, store).get_model_version_by_alias("digseg", "champion").version)


def test_an_alias_moves_only_from_what_was_expected(store: str) -> None:
    with pytest.raises(AliasMovedError, match="@champion is version 2 now, but was version 1 when it was compared"):
        move_alias(store, "digseg", "champion", 1, expected=1)
    with pytest.raises(AliasMovedError, match="version 2 now, but was no version"):
        move_alias(store, "digseg", "champion", 1, expected=None)
    assert _champion(store) == 2
    move_alias(store, "digseg", "champion", 1, expected=2)
    assert _champion(store) == 1
    move_alias(store, "digseg", "first", 1, expected=None)
    assert [row.aliases for row in list_versions(store)] == [(), ("challenger", "champion", "first")]


def test_rolling_back_goes_through_all_former_versions(store: str) -> None:
    move_alias(store, "digseg", "champion", 1, expected=2)
    move_alias(store, "digseg", "champion", 2, expected=1)
    assert roll_back(store, "digseg", "champion") == (2, 1)
    assert roll_back(store, "digseg", "champion") == (1, 2)
    with pytest.raises(DigSegError, match=r"has been version 2 only.*nothing to roll back to"):
        roll_back(store, "digseg", "champion")
    with pytest.raises(DigSegError, match="no alias 'champoin'"):
        roll_back(store, "digseg", "champoin")
    assert _champion(store) == 2


def test_moves_by_others_are_part_of_the_history(store: str) -> None:
    MlflowClient(store, store).set_registered_model_alias("digseg", "champion", "1")
    set_alias(store, "digseg", "champion", 2)
    assert roll_back(store, "digseg", "champion") == (2, 1)


def test_a_former_version_that_was_deleted_is_not_rolled_back_to(store: str) -> None:
    move_alias(store, "digseg", "champion", 1, expected=2)
    MlflowClient(store, store).delete_model_version("digseg", "2")
    with pytest.raises(DigSegError, match="was version 2 before, but that was deleted"):
        roll_back(store, "digseg", "champion")
    assert _champion(store) == 1


def test_a_lock_held_by_another_process_is_waited_for_and_named(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowClient(store, store)
    client.create_registered_model(f"digseg{LOCK_SUFFIX}", tags={"owner": "somebody on elsewhere"})
    monkeypatch.setattr(aliases, "_WAIT_S", 0.3)
    with pytest.raises(DigSegError, match=r"moved by another process \(somebody on elsewhere\)"):
        set_alias(store, "digseg", "champion", 1)
    assert _champion(store) == 2
    # It is no model of anybody's.
    assert {row.name for row in list_versions(store)} == {"digseg"}
    # Its owner died: after a while it counts no more.
    monkeypatch.setattr(aliases, "_STALE_S", 0.0)
    set_alias(store, "digseg", "champion", 1)
    assert _champion(store) == 1
    assert [model.name for model in client.search_registered_models()] == ["digseg"]


def test_who_lost_the_lock_changes_nothing(store: str) -> None:
    client, lock = MlflowClient(store, store), f"digseg{LOCK_SUFFIX}"
    with aliases._locked(store, "digseg") as model:
        client.delete_registered_model(lock)
        client.create_registered_model(lock, tags={"owner": "the next"})
        with pytest.raises(DigSegError, match="taken over by another process"):
            model.set("champion", 1, [2, 1])
    assert _champion(store) == 2
    assert client.get_registered_model(lock).tags["owner"] == "the next"
