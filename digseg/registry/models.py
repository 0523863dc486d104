"""Registered models by URI: what exists, where its files are, which alias names it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import mlflow.artifacts
import yaml
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from digseg.errors import DigSegError, nearest
from digseg.registry import aliases
from digseg.registry.intact import ARTIFACT
from digseg.registry.lineage import directory_digest
from digseg.registry.store import connect, default_tracking_uri, first_line, fluent, is_absent

_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")
_FORMS = "models:/NAME@ALIAS, models:/NAME/VERSION or an exported model's directory"
_MIOU = "miou."  # how the tags of a corpus' mIoU begin


@dataclass(frozen=True)
class ModelRef:
    """Which model: a registered version (`version` is None for a plain directory)."""

    name: str
    version: int | None
    alias: str | None
    run_id: str | None
    tracking_uri: str | None
    sha256: str | None = None  # of the exported directory's files

    @property
    def uri(self) -> str:
        """The URI that names exactly this version for good, whatever its aliases do."""
        return f"models:/{self.name}/{self.version}" if self.version is not None else self.name

    def as_json(self) -> dict[str, Any]:
        """Plain values for a legend or a report."""
        return {
            "name": self.name,
            "version": self.version,
            "alias": self.alias,
            "run_id": self.run_id,
            "sha256": self.sha256,
            "uri": self.uri,
        }


@dataclass(frozen=True)
class ListedVersion:
    """One row of `list_versions`."""

    name: str
    version: int
    aliases: tuple[str, ...]
    created_ms: int
    mean_iou: str | None
    run_id: str | None


def resolve(uri: str, tracking_uri: str | None = None) -> tuple[Path, ModelRef]:
    """The local directory of an exported model, and which model it is.

    Args:
        uri: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or the path of an exported (or MLflow) model directory.
        tracking_uri: the store; by default $MLFLOW_TRACKING_URI, else the local SQLite database.

    Files of a remote store are copied once into the cache ($DIGSEG_CACHE, else ~/.cache/digseg).

    Raises:
        DigSegError: no such directory, model, alias or version (with those that exist), an empty registry, or a
            store that cannot be reached.
    """
    if not uri.startswith("models:"):
        return _directory(uri)
    match = _URI.fullmatch(uri)
    if match is None:
        raise DigSegError(f"model URI {uri!r} is not understood; expected {_FORMS}")
    store = tracking_uri or default_tracking_uri()
    client = connect(store)
    model = _registered(client, match["name"], store)
    alias, number = match["alias"], match["version"]
    if alias is not None:
        number = _aliased(model, alias)
    version = _version(client, model, number)
    exported = _exported(_files(client, version, store))
    digest = _checked_digest(exported, version)
    return exported, ModelRef(model.name, int(version.version), alias, version.run_id or None, store, digest)


def aliased_version(name: str, alias: str, tracking_uri: str | None = None) -> int | None:
    """The version that `models:/name@alias` means, or None where there is no such alias.

    Raises:
        DigSegError: no such model, or a store that cannot be reached.
    """
    store = tracking_uri or default_tracking_uri()
    version = _registered(connect(store), name, store).aliases.get(alias)
    return None if version is None else int(version)


def version_aliases(client: MlflowClient, version: ModelVersion) -> tuple[str, ...]:
    """The aliases that mean a version, sorted."""
    return _aliases_of(client.get_registered_model(version.name), version)


def set_alias(name: str, version: int, alias: str, tracking_uri: str | None = None) -> None:
    """Let `models:/name@alias` mean this version.

    Raises:
        DigSegError: no such model or version, or a name that cannot be an alias.
    """
    store = tracking_uri or default_tracking_uri()
    client = connect(store)
    _version(client, _registered(client, name, store), str(version))
    aliases.set_alias(store, name, alias, version)


def tag_evaluation(model: ModelRef, result: Mapping[str, Any]) -> None:
    """Put the mIoU of each corpus evaluated on a registered version, and the mean over all corpora that it was ever
    evaluated on, where `list_versions` finds it.

    Raises:
        DigSegError: a store that cannot be reached, or a version that is gone.
    """
    if model.version is None or model.tracking_uri is None:
        return
    client = connect(model.tracking_uri)
    try:
        known = client.get_model_version(model.name, str(model.version)).tags
        for key, value in evaluation_tags(result, known).items():
            client.set_model_version_tag(model.name, str(model.version), key, value)
    except MlflowException as error:
        raise DigSegError(f"{model.uri} cannot be tagged: {first_line(error)}") from error


def evaluation_tags(result: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, str]:
    """`miou.CORPUS` of an evaluation, as tags of a version, and `mean_iou`: the mean of these and of those of other
    corpora among the tags that are `known`."""
    figures = {f"{_MIOU}{name}": corpus["miou"] for name, corpus in result["corpora"].items()}
    figures = {key: value for key, value in figures.items() if value is not None}
    every = {key: float(value) for key, value in known.items() if key.startswith(_MIOU)} | figures
    if every:
        figures["mean_iou"] = fmean(every.values())
    return {key: f"{value:.4f}" for key, value in figures.items()}


def list_versions(tracking_uri: str | None = None) -> list[ListedVersion]:
    """All registered versions that hold a DigSeg model or anything else, newest first within a model.

    Raises:
        DigSegError: a store that cannot be reached.
    """
    client = connect(tracking_uri or default_tracking_uri())
    rows = []
    for model in sorted(_all_models(client), key=lambda model: str(model.name)):
        for version in _all_versions(client, model.name):
            rows.append(
                ListedVersion(
                    name=model.name,
                    version=int(version.version),
                    aliases=_aliases_of(model, version),
                    created_ms=int(version.creation_timestamp),
                    mean_iou=version.tags.get("mean_iou"),
                    run_id=version.run_id or None,
                )
            )
    return rows


def _directory(path: str) -> tuple[Path, ModelRef]:
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise DigSegError(f"no model directory {directory}; expected {_FORMS}")
    # The model's code takes seconds to import; looking into the registry does not need it.
    from digseg.model.card import read_card

    exported = _exported(directory) if (directory / "MLmodel").is_file() else directory
    run_id = read_card(exported).metadata.get("run_id")
    return exported, ModelRef(str(path), None, None, run_id, None, directory_digest(exported))


def _checked_digest(exported: Path, version: ModelVersion) -> str:
    """sha256 of the exported directory, which has to be what was registered."""
    digest, registered = directory_digest(exported), version.tags.get("model_sha256")
    if registered is not None and digest != registered:
        raise DigSegError(
            f"models:/{version.name}/{version.version}: the files in {exported} are not those that were registered "
            f"(sha256 {digest[:12]}..., registered {registered[:12]}...): they were changed or damaged. Put the "
            "original files back (a copy in the cache is fetched anew once it is removed), or register the model anew"
        )
    return digest


def _registered(client: MlflowClient, name: str, store: str) -> RegisteredModel:
    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if not is_absent(error):
            raise DigSegError(f"the registry {store} cannot be asked for {name!r}: {first_line(error)}") from error
    names = [model.name for model in _all_models(client)]
    if not names:
        raise DigSegError(f"no model is registered in {store}: train and register one first (make demo)")
    raise DigSegError(f"no registered model {name!r} in {store}{nearest(name, names)}")


def _aliased(model: RegisteredModel, alias: str) -> str:
    versions = {name: str(version) for name, version in model.aliases.items()}
    if alias not in versions:
        known = ", ".join(f"{name} (version {version})" for name, version in sorted(versions.items()))
        hint = f"its aliases: {known}" if known else "it has no alias; name a version instead"
        raise DigSegError(f"model {model.name!r} has no alias {alias!r}; {hint}")
    return versions[alias]


def _aliases_of(model: RegisteredModel, version: ModelVersion) -> tuple[str, ...]:
    return tuple(sorted(alias for alias, number in model.aliases.items() if str(number) == str(version.version)))


def _version(client: MlflowClient, model: RegisteredModel, number: str) -> ModelVersion:
    try:
        version = client.get_model_version(model.name, number)
    except MlflowException as error:
        if not is_absent(error):
            raise DigSegError(f"models:/{model.name}/{number} cannot be asked for: {first_line(error)}") from error
        existing = ", ".join(str(version.version) for version in reversed(_all_versions(client, model.name)))
        hint = f"its versions: {existing}" if existing else "it has none"
        raise DigSegError(f"model {model.name!r} has no version {number}; {hint}") from None
    if version.status != "READY":
        raise DigSegError(
            f"version {number} of model {model.name!r} is not ready ({version.status}: {version.status_message})"
        )
    return version


def _files(client: MlflowClient, version: ModelVersion, store: str) -> Path:
    """The version's MLflow model directory: in place on this machine, else copied into the cache."""
    uri = f"models:/{version.name}/{version.version}"
    try:
        location = _location(client, version)
        if (path := _local_path(location)) is not None:
            if path.is_dir():
                return path
            raise DigSegError(
                f"{uri}: its files should be in {path}, but nothing is there; they were moved or deleted, or lie "
                "on another machine (then use a tracking server, or a storage that all machines share)"
            )
        # A version is immutable, its number is not: a new database starts at 1 again.
        identity = f"{store}\0{uri}\0{location}\0{version.creation_timestamp}"
        target = _cache() / hashlib.sha256(identity.encode()).hexdigest()[:24]
        if not target.is_dir():
            _download(uri, store, target)
        return target
    except MlflowException as error:
        raise DigSegError(f"the files of {uri} cannot be fetched from {store}: {first_line(error)}") from error


def _location(client: MlflowClient, version: ModelVersion) -> str:
    """Where the version's files are stored; a version logged by MLflow 3 refers to a logged model by its id."""
    location = str(client.get_model_version_download_uri(version.name, version.version))
    if location.startswith("models:/"):
        location = str(client.get_logged_model(location.removeprefix("models:/")).artifact_location)
    return location


def _local_path(location: str) -> Path | None:
    parts = urlsplit(location)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    return Path(location) if not parts.scheme else None


def _download(uri: str, store: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with fluent(store):
            fetched = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(partial)))
        # Another process that was quicker has the same files.
        with contextlib.suppress(OSError):
            fetched.rename(target)
        if not target.is_dir():
            raise DigSegError(f"the files of {uri} cannot be put into the cache {target.parent}")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _cache() -> Path:
    root = os.environ.get("DIGSEG_CACHE") or Path.home() / ".cache" / "digseg"
    return Path(root) / "models"


def _exported(model_dir: Path) -> Path:
    """The exported directory inside an MLflow model directory."""
    try:
        description = yaml.safe_load((model_dir / "MLmodel").read_text())
        relative = description["flavors"]["python_function"]["artifacts"][ARTIFACT]["path"]
    except FileNotFoundError:
        raise DigSegError(f"{model_dir} holds no model: it has no file MLmodel") from None
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        raise DigSegError(f"{model_dir} is an MLflow model, but not one that DigSeg registered") from None
    return model_dir / str(relative)


def _all_models(client: MlflowClient) -> list[RegisteredModel]:
    models: list[RegisteredModel] = []
    token = None
    while True:
        page = client.search_registered_models(page_token=token)
        models.extend(page)
        token = page.token
        if not token:
            return models


def _all_versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    """Newest first."""
    quoted = name.replace("'", "\\'")
    versions = list(client.search_model_versions(f"name='{quoted}'", max_results=1000))
    return sorted(versions, key=lambda version: int(version.version), reverse=True)
