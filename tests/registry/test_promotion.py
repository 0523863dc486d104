"""What a promoter is told where the store fails on the way; `tests/launch/test_promote_launch.py` has the rest."""

from __future__ import annotations

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from digseg.config import Gate
from digseg.errors import DigSegError
from digseg.registry.models import ModelRef, aliased_version
from digseg.registry.promotion import Decision, carry_out, undo


@pytest.mark.parametrize("call", ["set_model_version_tag", "create_run", "log_dict"])
def test_a_record_that_fails_after_the_alias_moved_is_told_with_the_move(
    call: str, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _break(call, monkeypatch)
    with pytest.raises(DigSegError, match=r"@champion is version 1 now; but MLflow .* lacks .*: database is locked"):
        carry_out(_decision(store, compared_with=2))
    assert aliased_version("digseg", "champion", store) == 1


def test_a_record_that_fails_where_no_alias_moved_says_so(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _break("create_run", monkeypatch)
    with pytest.raises(DigSegError, match=r"nothing was changed, compare anew; but MLflow .* lacks part of the record"):
        carry_out(_decision(store, compared_with=1))
    assert aliased_version("digseg", "champion", store) == 2


def test_a_history_that_fails_after_the_alias_moved_is_told_with_the_move(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _break("set_registered_model_tag", monkeypatch, about="digseg.history")
    with pytest.raises(DigSegError, match=r"@champion is version 1 now, but what it was before could not be noted"):
        carry_out(_decision(store, compared_with=2))
    assert aliased_version("digseg", "champion", store) == 1


def test_a_rollback_whose_record_fails_is_told_with_the_move(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    carry_out(_decision(store, compared_with=2))
    _break("create_run", monkeypatch)
    with pytest.raises(DigSegError, match=r"@champion is version 2 again; but MLflow .* lacks part of the record"):
        undo(store, "digseg", "champion")
    assert aliased_version("digseg", "champion", store) == 2


def _break(call: str, monkeypatch: pytest.MonkeyPatch, about: str = "") -> None:
    """Let a call of MLflow's client, if it is about something, fail as on a database that another process holds."""
    real = getattr(MlflowClient, call)

    def failing(*arguments: object, **options: object) -> object:
        if any(about in str(argument) for argument in arguments):
            raise MlflowException("database is locked")
        return real(*arguments, **options)

    monkeypatch.setattr(MlflowClient, call, failing)


def _decision(store: str, compared_with: int) -> Decision:
    """That version 1 may become champion."""
    challenger, champion = (ModelRef("digseg", version, None, None, store) for version in (1, compared_with))
    return Decision(challenger, champion, "champion", Gate(), None, {})
