"""Aliases on real stores: compare-and-set, the way back, and locks that were left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from mlflow_server import MlflowServer

from digseg.errors import DigSegError
from digseg.registry import aliases
from digseg.registry.aliases import AliasMovedError, move_alias, roll_back, set_alias
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
    MlflowClient(store, store).set_registered_model_tag("digseg", "digseg.alias-lock.1", "somebody on elsewhere, 7")
    monkeypatch.setattr(aliases, "_WAIT_S", 0.3)
    with pytest.raises(DigSegError, match=r"moved by another process \(somebody on elsewhere, 7\)"):
        set_alias(store, "digseg", "champion", 1)
    assert _champion(store) == 2
    assert _locks(store) == {"digseg.alias-lock.1"}
    # Its owner died: after a while it counts no more.
    monkeypatch.setattr(aliases, "_LEFT_S", 0.0)
    set_alias(store, "digseg", "champion", 1)
    assert _champion(store) == 1
    assert _locks(store) == set()


def test_who_lost_the_lock_or_held_it_too_long_changes_nothing(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with aliases._locked(store, "digseg") as model:
        (lock,) = _locks(store)
        MlflowClient(store, store).delete_registered_model_tag("digseg", lock)
        with pytest.raises(DigSegError, match="another process may have taken it over; nothing was changed"):
            model.set("champion", 1, [2, 1])
    monkeypatch.setattr(aliases, "_HOLD_S", 0.0)
    with pytest.raises(DigSegError, match="another process may have taken it over; nothing was changed"):
        set_alias(store, "digseg", "champion", 1)
    assert _champion(store) == 2
    assert _locks(store) == set()


def test_of_two_that_find_the_same_dead_lock_only_one_takes_over(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second looked before the first took over, and goes on afterwards."""
    client = MlflowClient(store, store)
    client.set_registered_model_tag("digseg", "digseg.alias-lock.dead", "nobody")
    monkeypatch.setattr(aliases, "_LEFT_S", 0.0)
    put = MlflowClient.set_registered_model_tag

    def overtaken(*arguments: object) -> None:
        monkeypatch.setattr(MlflowClient, "set_registered_model_tag", put)
        first.enter_context(aliases._locked(store, "digseg"))
        assert "digseg.alias-lock.dead" not in _locks(store)
        monkeypatch.setattr(aliases, "_LEFT_S", 60.0)
        put(*arguments)

    monkeypatch.setattr(MlflowClient, "set_registered_model_tag", overtaken)
    monkeypatch.setattr(aliases, "_WAIT_S", 0.0)
    with ExitStack() as first:
        with pytest.raises(DigSegError, match="being moved by another process"):
            set_alias(store, "digseg", "champion", 1)
        assert len(_locks(store)) == 1
    assert _champion(store) == 2
    assert _locks(store) == set()


def test_over_sqlite_one_of_many_movers_wins_each_move_also_after_one_was_killed(store: str, tmp_path: Path) -> None:
    _race(store, store, tmp_path)


@pytest.mark.cluster
def test_over_http_one_of_many_movers_wins_each_move_also_after_one_was_killed(
    store: str, server: MlflowServer, tmp_path: Path
) -> None:
    server.start()
    _race(server.uri, store, tmp_path)


# Holds the lock until it is killed.
HOLDER = """
import sys, time
from digseg.registry import aliases

with aliases._locked(sys.argv[1], "digseg"):
    print("held", flush=True)
    time.sleep(3600)
"""

# Compares and moves six times, and says how often it was not overtaken.
MOVER = """
import sys
from digseg.registry import aliases
from digseg.registry.models import aliased_version

aliases._LEFT_S = 10.0
store, moves = sys.argv[1], 0
print("ready", flush=True)
sys.stdin.readline()
for _ in range(6):
    before = aliased_version("digseg", "champion", store)
    try:
        aliases.move_alias(store, "digseg", "champion", 3 - before, expected=before)
        moves += 1
    except aliases.AliasMovedError:
        pass
print(moves)
"""


def _race(uri: str, store: str, folder: Path) -> None:
    """Every move of three processes is in the history, one after the other: none was made on top of another."""
    holder = _started(HOLDER, uri)
    assert _line(holder) == "held"
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate(timeout=60)
    assert len(_locks(store)) == 1
    movers = [_started(MOVER, uri) for _ in range(3)]
    for mover in movers:
        assert _line(mover) == "ready"
    for mover in movers:
        assert mover.stdin is not None
        mover.stdin.write("go\n")
        mover.stdin.flush()
    said = [mover.communicate(timeout=240) for mover in movers]
    assert [mover.returncode for mover in movers] == [0, 0, 0], said
    moves = sum(int(output) for output, _ in said)
    history = MlflowClient(store, store).get_registered_model("digseg").tags["digseg.history.champion"]
    assert moves >= 6
    assert history == ",".join(str(2 - number % 2) for number in range(moves + 1))
    assert _champion(store) == int(history[-1])
    assert _locks(store) == set()


def _started(script: str, uri: str) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", script, uri], text=True, **pipes)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _locks(store: str) -> set[str]:
    tags = MlflowClient(store, store).get_registered_model("digseg").tags
    return {key for key in tags if key.startswith("digseg.alias-lock.")}
