"""Which MLflow store is meant, and a client for it that fails at once, with a reason, where the store is
absent."""

from __future__ import annotations

import logging
import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from digseg.config import Config, RunConfig
from digseg.config.load import base_directory
from digseg.errors import DigSegError

_SQLITE = "sqlite:///"
_SQLITE_MAGIC = b"SQLite format 3\0"
_PROBE_TIMEOUT_S = 5.0
_ENVIRONMENT = "MLFLOW_TRACKING_URI"


class StoreAwayError(DigSegError):
    """A store that does not answer, or fails; it may be well again later."""


def tracking_uri(config: Config) -> str:
    """The store of a run: `tracking.uri`, else $MLFLOW_TRACKING_URI, else SQLite in `run.storage`."""
    return _normalised(config.tracking.uri) if config.tracking.uri else default_tracking_uri(config.run.storage)


def default_tracking_uri(storage: str | Path | None = None) -> str:
    """$MLFLOW_TRACKING_URI, else SQLite in `storage` (the configuration's default storage if not given)."""
    if uri := os.environ.get(_ENVIRONMENT):
        return _normalised(uri)
    folder = base_directory() / (storage if storage is not None else RunConfig().storage)
    return f"{_SQLITE}{folder / 'mlflow.db'}"


def connect(uri: str, *, create: bool = False) -> MlflowClient:
    """A client of the tracking and registry store at `uri`.

    Args:
        create: make a SQLite database that does not exist yet; otherwise its absence is an error.

    Raises:
        StoreAwayError: a store that does not answer, or fails.
        DigSegError: a missing database, refused credentials, or a kind of store that is not supported.
    """
    uri = _normalised(uri)
    if (database := sqlite_path(uri)) is not None:
        if create:
            database.parent.mkdir(parents=True, exist_ok=True)
        elif not database.exists():
            raise DigSegError(
                f"no MLflow database at {database}: train a model first (make demo, or launch/train.py), or "
                "name another store with --tracking-uri or MLFLOW_TRACKING_URI"
            )
        _check_is_database(database)
    elif urlsplit(uri).scheme in ("http", "https"):
        _probe(uri)
    # Creating a database logs every migration at INFO.
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Loading the store makes SQLAlchemy warn about what MLflow uses of it.
            warnings.simplefilter("ignore", DeprecationWarning)
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError) as error:
        if getattr(error, "get_http_status_code", int)() in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise DigSegError(
                f"the MLflow server {uri} refuses these credentials ({first_line(error)}): set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            ) from error
        raise StoreAwayError(f"the MLflow store {uri} cannot be used: {first_line(error)}") from error
    return client


@contextmanager
def fluent(uri: str) -> Iterator[None]:
    """Point MLflow's module-level functions at `uri` for a while, and back afterwards.

    MLflow keeps these settings in environment variables, which child processes (Ray's workers) would inherit.
    """
    before = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before["MLFLOW_TRACKING_URI"])
        mlflow.set_registry_uri(before["MLFLOW_REGISTRY_URI"])
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def artifact_location(uri: str) -> str | None:
    """Where a new experiment keeps its artifacts: beside a SQLite database; a server decides itself
    (None)."""
    database = sqlite_path(_normalised(uri))
    return (database.parent / "mlartifacts").as_uri() if database is not None else None


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite URI, else None."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def is_absent(error: MlflowException) -> bool:
    """Whether a store says that it does not have what it was asked for; else it failed, and may have it."""
    return bool(error.error_code == "RESOURCE_DOES_NOT_EXIST")


def first_line(error: Exception) -> str:
    """What an exception says, without MLflow's long tails."""
    return str(error).strip().partition("\n")[0]


def _normalised(uri: str) -> str:
    """The URI with a relative SQLite path made absolute: workers run in other directories than the
    launcher."""
    if uri.startswith(_SQLITE):
        return f"{_SQLITE}{base_directory() / uri.removeprefix(_SQLITE)}"
    scheme = urlsplit(uri).scheme
    if scheme in ("", "file"):
        raise DigSegError(
            f"tracking URI {uri!r}: MLflow's file store is no longer supported; use "
            f"sqlite:///{uri.removeprefix('file://').rstrip('/') or '.'}/mlflow.db or the URL of a server"
        )
    return uri


def _check_is_database(path: Path) -> None:
    """MLflow would try for a quarter of a minute to read a file of another kind."""
    try:
        if not path.exists():
            return
        with path.open("rb") as file:
            start = file.read(len(_SQLITE_MAGIC))
    except OSError as error:
        raise DigSegError(f"the MLflow database {path} cannot be read: {error.strerror or error}") from error
    if start not in (b"", _SQLITE_MAGIC):
        raise DigSegError(f"the MLflow store {path} cannot be used: it is not a SQLite database")


def _probe(uri: str) -> None:
    """Ask the server for its health: MLflow's own retries would take minutes to say that nobody is there."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_PROBE_TIMEOUT_S):
            pass
    except urllib.error.HTTPError:
        return  # it answers; whether the request was liked is for MLflow to find out
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise StoreAwayError(
            f"the MLflow server {uri} does not answer ({reason}): start it, or correct --tracking-uri, "
            "tracking.uri or MLFLOW_TRACKING_URI"
        ) from error
