"""Finding the store, and saying quickly that it is not there."""

from __future__ import annotations

import os
import socket
import time
from http import HTTPStatus
from pathlib import Path

import mlflow
import pytest
from mlflow_server import ADMIN, MlflowServer, answering
from small_world import small_config

from digseg.errors import DigSegError
from digseg.registry.aliases import move_alias
from digseg.registry.models import aliased_version, list_versions, resolve
from digseg.registry.store import connect, default_tracking_uri, fluent, tracking_uri


def test_the_store_is_configured_or_in_the_environment_or_beside_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIGSEG_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    unset = small_config(tmp_path, tracking={"uri": None})
    assert tracking_uri(unset) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert default_tracking_uri() == f"sqlite:///{tmp_path}/outputs/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracking_uri(unset) == default_tracking_uri() == "http://server:5000"
    relative = small_config(tmp_path, tracking={"uri": "sqlite:///here/mlflow.db"})
    assert tracking_uri(relative) == f"sqlite:///{tmp_path}/here/mlflow.db"


def test_looking_into_a_database_that_is_not_there_does_not_make_one(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    with pytest.raises(DigSegError, match=rf"no MLflow database at {database}"):
        connect(f"sqlite:///{database}")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database_is_reported(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    database.write_text("not a database")
    with pytest.raises(DigSegError, match=r"mlflow\.db cannot be used"):
        connect(f"sqlite:///{database}")


def test_a_server_that_is_not_there_is_reported_in_seconds() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        before = time.monotonic()
        with pytest.raises(DigSegError, match="does not answer"):
            connect(f"http://127.0.0.1:{unused.getsockname()[1]}")
        assert time.monotonic() - before < 10


def test_a_server_that_never_answers_is_reported_in_seconds() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        before = time.monotonic()
        with pytest.raises(DigSegError, match="does not answer"):
            connect(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - before < 15


@pytest.mark.cluster
def test_a_server_with_accounts_is_used_with_the_rights_of_the_account(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sign_in(name: str, password: str) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)

    server = MlflowServer(tmp_path, accounts=True)  # on the database of `store`
    server.start()
    try:
        with pytest.raises(DigSegError, match=rf"{server.uri} refuses these credentials .*set MLFLOW_TRACKING_USERN"):
            list_versions(server.uri)
        sign_in(ADMIN, "not-the-admins-password")
        with pytest.raises(DigSegError, match=rf"{server.uri} refuses these credentials .*set MLFLOW_TRACKING_USERN"):
            resolve("models:/digseg@champion", server.uri)
        for name in ("reader", "promoter"):
            server.administer("2.0/mlflow/users/create", username=name, password=f"password-of-{name}")
        model = {"resource_type": "registered_model", "resource_id": "digseg"}
        server.administer("3.0/mlflow/users/permissions/grant", username="promoter", permission="EDIT", **model)

        sign_in("reader", "password-of-reader")
        assert len(list_versions(server.uri)) == 2
        with pytest.raises(DigSegError, match=r"does not move aliases of 'digseg': .*Permission denied"):
            move_alias(server.uri, "digseg", "champion", 1, expected=2)
        assert aliased_version("digseg", "champion", server.uri) == 2
        sign_in("promoter", "password-of-promoter")
        move_alias(server.uri, "digseg", "champion", 1, expected=2)
        assert aliased_version("digseg", "champion", store) == 1
    finally:
        server.stop()


def test_wrong_credentials_before_a_server_are_told_apart_from_an_absent_one() -> None:
    with answering(HTTPStatus.UNAUTHORIZED) as uri, pytest.raises(DigSegError, match=rf"{uri} refuses .*_USERNAME"):
        connect(uri)


@pytest.mark.parametrize("uri", ["mlruns", "file:///data/mlruns"])
def test_file_stores_are_refused_with_what_to_use_instead(uri: str) -> None:
    with pytest.raises(DigSegError, match=r"file store .* use sqlite:///.*mlruns/mlflow\.db"):
        connect(uri)


@pytest.mark.parametrize("before", [None, "http://server:5000"])
def test_pointing_mlflow_somewhere_leaves_no_trace(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    if before is None:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    else:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", before)
    environment = dict(os.environ)
    uri = mlflow.get_tracking_uri()
    with fluent("http://elsewhere:5000"):
        assert mlflow.get_tracking_uri() == mlflow.get_registry_uri() == "http://elsewhere:5000"
    assert mlflow.get_tracking_uri() == mlflow.get_registry_uri() == uri
    assert dict(os.environ) == environment
    mlflow.set_tracking_uri(None)
