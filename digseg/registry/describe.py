"""What a registered version is, how two differ, and what a prediction goes back to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow.artifacts
import yaml
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from digseg.errors import DigSegError
from digseg.model.card import ModelCard, read_card
from digseg.registry import lineage
from digseg.registry.models import ModelRef, resolve, version_aliases
from digseg.registry.store import connect, first_line, fluent, is_absent

_DATASET = "dataset."


@dataclass(frozen=True)
class Description:
    """A registered version: its tags, its run's parameters, and its card."""

    reference: ModelRef
    aliases: tuple[str, ...]
    created_ms: int
    tags: dict[str, str]
    parameters: dict[str, str]
    card: ModelCard

    @property
    def datasets(self) -> dict[str, str]:
        """corpus/split -> digest of its manifest, of the splits trained on."""
        return {key.removeprefix(_DATASET): value for key, value in self.tags.items() if key.startswith(_DATASET)}

    @property
    def figures(self) -> dict[str, str]:
        """`miou.CORPUS` of each corpus' last evaluation, and `mean_iou`, their mean."""
        return {key: value for key, value in self.tags.items() if key == "mean_iou" or key.startswith("miou.")}


@dataclass(frozen=True)
class Fact:
    """A step on the way back from a prediction: what it is, its value, and what a check of it said."""

    what: str
    value: str
    check: str = ""


def describe(uri: str, tracking_uri: str | None = None) -> Description:
    """A registered version, its files checked.

    Raises:
        DigSegError: as `resolve` says, or a directory instead of a registered version.
    """
    directory, reference = resolve(uri, tracking_uri)
    if reference.version is None or reference.tracking_uri is None:
        raise DigSegError(
            f"{uri} is a directory; name a registered version (models:/NAME@ALIAS or models:/NAME/VERSION)"
        )
    client = connect(reference.tracking_uri)
    version = client.get_model_version(reference.name, str(reference.version))
    return Description(
        reference,
        version_aliases(client, version),
        int(version.creation_timestamp),
        dict(version.tags),
        _parameters(client, reference.run_id),
        read_card(directory),
    )


def differences(first: Description, second: Description) -> list[tuple[str, str, str]]:
    """(what, of the first, of the second) for all that differs: figures, data, settings, source; "-" is nothing."""
    rows = []
    for of_first, of_second in (
        (first.figures, second.figures),
        ({"classes": _names(first)}, {"classes": _names(second)}),
        (_prefixed(_DATASET, first.datasets), _prefixed(_DATASET, second.datasets)),
        (first.parameters, second.parameters),
        (_source(first), _source(second)),
    ):
        for key in sorted(of_first.keys() | of_second.keys()):
            pair = of_first.get(key, "-"), of_second.get(key, "-")
            if pair[0] != pair[1]:
                rows.append((key, *pair))
    return rows


def trace(source: str, tracking_uri: str | None = None) -> list[Fact]:
    """The way back from a prediction (its `.legend.json`) or a model URI: version, run, checkpoint, configuration,
    source and data, each checked where that is possible.

    Raises:
        DigSegError: a file that is no legend, a model that is not registered, or one that is another than the
            prediction's.
    """
    facts, uri = [], source
    predicted_by: Mapping[str, Any] = {}
    if source.endswith(".json"):
        predicted_by = _model_of_legend(Path(source))
        uri = str(predicted_by["uri"])
        facts.append(Fact("prediction", source))
    version = describe(uri, tracking_uri)
    reference, tags = version.reference, version.tags
    if predicted_by and predicted_by["sha256"] != reference.sha256:
        raise DigSegError(
            f"{source} was predicted by a model of sha256 {predicted_by['sha256']}, but {uri} in "
            f"{reference.tracking_uri} is one of {reference.sha256}: that is another registry; name the right one with "
            "--tracking-uri"
        )
    aliases = f" (@{', @'.join(version.aliases)})" if version.aliases else ""
    facts.append(Fact("model", f"{reference.uri}{aliases}"))
    registered = "as registered" if "model_sha256" in tags else "no digest was registered"
    facts.append(Fact("files", f"sha256 {reference.sha256}", registered))
    facts += _run_facts(version)
    if checkpoint := tags.get("checkpoint"):
        facts.append(Fact("checkpoint", checkpoint, _check_checkpoint(Path(checkpoint), tags["checkpoint_sha256"])))
    dirty = {"true": "with changes that were not committed", "false": "clean"}.get(tags.get("git_dirty", ""), "")
    facts.append(Fact("source", f"git {tags.get('git_revision', 'unknown')}", dirty))
    facts += [Fact("data", f"{name}, manifest {digest}") for name, digest in sorted(version.datasets.items())]
    return facts


def _run_facts(version: Description) -> list[Fact]:
    reference, tags = version.reference, version.tags
    if reference.run_id is None or reference.tracking_uri is None:
        return [Fact("run", "none: the model was registered without one")]
    run = _run(connect(reference.tracking_uri), reference.run_id)
    if run is None:
        return [Fact("run", reference.run_id, "gone from the store")]
    facts = [Fact("run", f"{reference.run_id} ({run.info.run_name})", run.info.status.lower())]
    if digest := tags.get("config_sha256"):
        facts.append(Fact("configuration", f"sha256 {digest}", _check_config(reference, digest)))
    return facts


def _check_config(reference: ModelRef, digest: str) -> str:
    """Whether the run's `config.yaml` is the configuration that was registered."""
    try:
        with fluent(str(reference.tracking_uri)):
            text = mlflow.artifacts.load_text(f"runs:/{reference.run_id}/config.yaml")
    except (MlflowException, OSError):
        return "config.yaml is gone from the run"
    return "config.yaml of the run" if lineage.mapping_digest(yaml.safe_load(text)) == digest else "config.yaml differs"


def _check_checkpoint(directory: Path, digest: str) -> str:
    manifest = directory / "manifest.json"
    if not manifest.is_file():
        return "not here (removed, or on another machine)"
    return "manifest as registered" if lineage.file_digest(manifest) == digest else "manifest differs"


def _model_of_legend(path: Path) -> Mapping[str, Any]:
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        if not {"uri", "version", "sha256"} <= model.keys():
            raise KeyError("model")
    except OSError as error:
        raise DigSegError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DigSegError(f"{path} is not a legend of digseg predict (STEM.legend.json)") from None
    if model["version"] is None:
        raise DigSegError(f"{path} was predicted by the directory {model['uri']}, which is in no registry")
    return dict(model)


def _parameters(client: MlflowClient, run_id: str | None) -> dict[str, str]:
    run = _run(client, run_id) if run_id is not None else None
    return {} if run is None else dict(run.data.params)


def _run(client: MlflowClient, run_id: str) -> Run | None:
    """A version's run, or None where it was deleted, which the version was not.

    Raises:
        DigSegError: the store fails.
    """
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if is_absent(error):
            return None
        raise DigSegError(f"the store cannot be asked for run {run_id}: {first_line(error)}") from error


def _names(version: Description) -> str:
    return ", ".join(version.card.names)


def _prefixed(prefix: str, values: Mapping[str, str]) -> dict[str, str]:
    return {f"{prefix}{key}": value for key, value in values.items()}


def _source(version: Description) -> dict[str, str]:
    keys = ("git_revision", "git_dirty", "run_name", "config_sha256", "checkpoint_sha256", "model_sha256")
    return {key: version.tags[key] for key in keys if key in version.tags}
