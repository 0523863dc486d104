"""A training run in MLflow: parameters, configuration, data and environment once, metrics as they come."""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from digseg.config import Config, dump_config
from digseg.errors import DigSegError
from digseg.registry import lineage
from digseg.registry.delivery import BATCH, Delivery, Opened
from digseg.registry.store import StoreAwayError, artifact_location, connect, first_line, is_absent, tracking_uri
from digseg.training.files import write_whole
from digseg.training.logging import RunStatus

RECORD_NAME = "mlflow_run.json"

_FINISH_TIMEOUT_S = 60.0
_STATUSES: dict[RunStatus, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
# Limits of MLflow on a parameter's value and a dataset's digest.
_PARAM_LENGTH = 6000
_DIGEST_LENGTH = 36

# Facts that are choices of the run, and so parameters too.
_CHOSEN = ("attention_kernel",)

# Figures of a corpus that become metrics of an evaluation.
_CORPUS_FIGURES = (
    "miou",
    "pixel_accuracy",
    "mean_accuracy",
    "frequency_weighted_iou",
    "mean_dice",
    "boundary_iou",
    "boundary_f1",
    "calibration_error",
)

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class MlflowRun:
    """The MLflow run of a DigSeg run; what `digseg.training.logging.RunLogger` asks for.

    The run's name identifies it: its id is kept in `run.storage/run.name/mlflow_run.json`, and a process that
    starts the same run again continues it if the store still knows it. Metrics are handed to a thread, so
    that no training step waits for the store; those of steps that the store already has are not repeated.

    A store that is away does not stop a run that it once knew: what is to be logged waits, and is delivered in
    order when the store is back. What a run's end still finds waiting is in the run's own `metrics.jsonl`;
    `settle` delivers it from there.
    """

    def __init__(self, config: Config, world_size: int | None = None) -> None:
        self._config = config
        self._world_size = world_size or config.cluster.world_size
        self._uri = tracking_uri(config)
        self._record_path = Path(config.run.storage) / config.run.name / RECORD_NAME
        self._connected: MlflowClient | None = None
        self._run_id: str | None = None
        self._delivery: Delivery | None = None

    @property
    def tracking_uri(self) -> str:
        """The store that the run is in."""
        return self._uri

    @property
    def run_id(self) -> str:
        """Id of the run, which is created if it does not exist yet.

        Raises:
            DigSegError: the store cannot be reached.
        """
        if self._run_id is None:
            self._run_id = self._continued() or self._created()
        return self._run_id

    def start(
        self, config: Mapping[str, Any], dataset_digests: Mapping[str, str], facts: Mapping[str, str] | None = None
    ) -> None:
        """Open or continue the run: parameters, resolved configuration, datasets, revision, environment and facts.

        Raises:
            DigSegError: the store refuses the run, or cannot be reached and does not know it yet.
        """

        def opened() -> Opened:
            self._open(config, dataset_digests, facts or {})
            return Opened(self._client, self.run_id, self._last_steps())

        try:
            ready = opened()
        except (MlflowException, StoreAwayError) as error:
            if _read_record(self._record_path).get("tracking_uri") != self._uri:
                if isinstance(error, StoreAwayError):
                    raise
                raise DigSegError(f"MLflow at {self._uri} refuses the run: {first_line(error)}") from error
            _log.warning("%s; the run goes on, and what it logs is delivered later", first_line(error))
            self._delivery = Delivery(opened)
        else:
            self._delivery = Delivery(lambda: ready)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Queue figures of a step of a started run, steps ascending; returns at once. A step that the store
        already has is left out; values that are not finite are logged as they are."""
        assert self._delivery is not None, "start() comes first"
        now_ms = time.time_ns() // 1_000_000
        self._delivery.put([Metric(metric_name(name), float(value), now_ms, step) for name, value in values.items()])

    def pictures(self, folder: Path) -> None:
        """Have the files of `folder` attached that the run does not have yet; returns at once."""
        assert self._delivery is not None, "start() comes first"
        self._delivery.attach(folder)

    def tags(self, values: Mapping[str, str]) -> None:
        """Have tags of the run set, in place of former ones; returns at once."""
        assert self._delivery is not None, "start() comes first"
        self._delivery.tag(values)

    def finish(self, status: RunStatus) -> None:
        """Write what is queued and close the run; where the store is away, note that both are still to be done."""
        delivered = self._delivery is None or self._delivery.close(_FINISH_TIMEOUT_S)
        self._delivery = None
        try:
            if delivered:
                self._client.set_terminated(self.run_id, _STATUSES[status])
                self._save_record(self.run_id)
                return
        except (MlflowException, StoreAwayError) as error:
            _log.warning("MLflow did not take the end of the run: %s", first_line(error))
        run_id = self._run_id or _read_record(self._record_path).get("run_id")
        self._save_record(str(run_id), ended=status)
        _log.warning(
            "the last figures and the end of the run did not reach MLflow at %s; the run's metrics.jsonl has them, and "
            "the same command again delivers them",
            self._uri,
        )

    def abandon(self) -> None:
        """Close the run as failed, if it is still open: the process that logged to it was lost."""
        try:
            self._run_id = self._continued()
            if self._run_id is not None and self._client.get_run(self._run_id).info.status == "RUNNING":
                self.finish("failed")
        except (MlflowException, StoreAwayError) as error:
            _log.warning("%s", first_line(error))

    def settle(self, lines: Iterable[Mapping[str, Any]], pictures: Path, tags: Mapping[str, str]) -> bool:
        """Deliver what the end of the run found waiting, if anything; whether the store has all of the run now.

        Args:
            lines: the run's `metrics.jsonl`.
            pictures: the folder of the run's pictures, if it has any.
            tags: as the trainer set them last.
        """
        ended = _read_record(self._record_path).get("ended")
        try:
            ready = Opened(self._client, self.run_id, self._last_steps())
        except (MlflowException, StoreAwayError) as error:
            _log.warning("%s", first_line(error))
            return False
        if ended is not None:
            self._delivery = Delivery(lambda: ready)
            for line in lines:
                self.metrics(line["step"], {name: value for name, value in line.items() if name != "step"})
            if pictures.is_dir():
                self.pictures(pictures)
            self.tags(tags)
            self.finish(ended)
        return "ended" not in _read_record(self._record_path)

    def log_images(self, paths: Sequence[Path], folder: str = "pictures") -> None:
        """Attach picture files; MLflow's page shows them."""
        for path in paths:
            self._client.log_artifact(self.run_id, str(path), folder)

    @property
    def _client(self) -> MlflowClient:
        if self._connected is None:
            self._connected = connect(self._uri, create=True)
        return self._connected

    def _open(self, config: Mapping[str, Any], dataset_digests: Mapping[str, str], facts: Mapping[str, str]) -> None:
        self._client.update_run(self.run_id, status="RUNNING")
        chosen = {name: facts[name] for name in _CHOSEN if name in facts}
        self._log_parameters(flattened({**config, **chosen}))
        tags = {
            **lineage.source_revision(),
            **facts,
            "world_size": str(self._world_size),
            "config_sha256": lineage.mapping_digest(config),
            "run_directory": str(self._record_path.parent),
            **{f"dataset.{name}": digest for name, digest in dataset_digests.items()},
        }
        self._log_tags(tags)
        self._client.log_inputs(self.run_id, list(_dataset_inputs(self._config.data.root, dataset_digests)))
        self._client.log_text(self.run_id, dump_config(self._config), "config.yaml")
        self._client.log_dict(self.run_id, lineage.environment(), "environment.json")

    def _continued(self) -> str | None:
        """The recorded run, if this store still has it."""
        run_id = _read_record(self._record_path).get("run_id")
        if run_id is None:
            return None
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if is_absent(error):
                return None
            raise  # the store fails; it may still have the run
        return str(run_id) if run.info.lifecycle_stage == "active" else None

    def _created(self) -> str:
        run = self._client.create_run(
            experiment_id(self._client, self._uri, self._config.tracking.experiment),
            run_name=self._config.run.name,
            tags={"mlflow.source.name": "launch/train.py", "mlflow.source.type": "JOB"},
        )
        self._save_record(run.info.run_id)
        return str(run.info.run_id)

    def _save_record(self, run_id: str, ended: str | None = None) -> None:
        """Note the run's id, and how the run ended if the store does not know it yet."""
        self._record_path.parent.mkdir(parents=True, exist_ok=True)
        record = {"run_id": run_id, "tracking_uri": self._uri, **({"ended": ended} if ended else {})}
        write_whole(self._record_path, json.dumps(record, indent=1))

    def _last_steps(self) -> dict[str, int]:
        """The last step of each metric that the store has. The store is asked, not a note of what was sent to
        it: a process that is killed cannot tell which of its last figures arrived."""
        return {metric.key: metric.step for metric in self._client.get_run(self.run_id).data.to_proto().metrics}

    def _log_parameters(self, parameters: Mapping[str, str]) -> None:
        """Parameters cannot be changed in MLflow: a continued run keeps its first ones, and says what
        changed."""
        known = self._client.get_run(self.run_id).data.params
        new = [Param(key, value) for key, value in parameters.items() if key not in known]
        for chunk in _chunks(new):
            self._client.log_batch(self.run_id, params=chunk)
        changed = [f"{key}={value}" for key, value in parameters.items() if known.get(key, value) != value]
        if changed:
            self._log_tags({"changed_on_resume": ", ".join(changed)[:_PARAM_LENGTH]})

    def _log_tags(self, tags: Mapping[str, str]) -> None:
        for chunk in _chunks([RunTag(key, value) for key, value in tags.items()]):
            self._client.log_batch(self.run_id, tags=chunk)


def log_evaluation(uri: str, run_id: str, result: Mapping[str, Any], pages: Mapping[str, str] | None = None) -> str:
    """Add an evaluation (as `digseg.cluster.evaluate.evaluate_models` gives it, with its `model` and `data`) as a
    child of the run that trained the model: one metric a figure, the whole as `evaluation.json`, and pages (name ->
    text). The parent gets each corpus' mIoU, unless an oracle was asked. Corpora may also stand under `held_out`.

    Returns:
        The id of the child.

    Raises:
        DigSegError: the store cannot be reached, or has no such run.
    """
    client = connect(uri)
    corpora = {**result["corpora"], **result.get("held_out", {})}
    headline = {"eval.mean_iou": result["mean_iou"]}
    headline |= {f"eval.{name}.miou": corpus["miou"] for name, corpus in corpora.items()}
    figures: dict[str, float | None] = dict(headline)
    for name, corpus in corpora.items():
        figures |= {f"eval.{name}.{key}": corpus[key] for key in _CORPUS_FIGURES if key != "miou"}
        figures |= {f"eval.{name}.iou.{label}": iou for label, iou in corpus["classes"].items()}
    for name, classes in result.get("synonyms", {}).items():
        for label, wordings in classes.items():
            figures |= {f"eval.{name}.synonym.{label}.{wording}": iou for wording, iou in wordings.items()}
    label = f"evaluation: {result['protocol']}{' (oracle)' if result['oracle'] else ''}"
    try:
        parent = client.get_run(run_id)
        tags = {"mlflow.parentRunId": run_id, "digseg.kind": "evaluation", **lineage.source_revision()}
        child = client.create_run(parent.info.experiment_id, run_name=label, tags=tags)
        child_id = str(child.info.run_id)
        parameters = {"model": result["model"]["uri"], "data": result["data"]}
        parameters |= {"protocol": result["protocol"], "oracle": str(result["oracle"]).lower()}
        client.log_batch(child_id, params=[Param(key, value) for key, value in parameters.items()])
        _log_figures(client, child_id, figures)
        if not result["oracle"]:
            _log_figures(client, run_id, headline)
        client.log_dict(child_id, dict(result), "evaluation.json")
        for name, text in (pages or {}).items():
            client.log_text(child_id, text, name)
        client.set_terminated(child_id, "FINISHED")
    except MlflowException as error:
        raise DigSegError(f"MLflow at {uri} does not take the evaluation: {first_line(error)}") from error
    return child_id


def _log_figures(client: MlflowClient, run_id: str, figures: Mapping[str, float | None]) -> None:
    now_ms = time.time_ns() // 1_000_000
    metrics = [
        Metric(metric_name(name), value, now_ms, 0)
        for name, value in figures.items()
        if value is not None and math.isfinite(value)
    ]
    for chunk in _chunks(metrics):
        client.log_batch(run_id, metrics=chunk)


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as MLflow parameters: `training.steps` -> "1000"; lists become JSON."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            flat[f"{prefix}{key}"] = text[:_PARAM_LENGTH]
    return flat


def metric_name(name: str) -> str:
    """The name with characters that MLflow refuses (it knows letters, digits, and _ - . / : space)
    replaced."""
    return re.sub(r"[^\w\-./: ]", "_", name, flags=re.ASCII)


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """Id of the experiment, created if the store does not have it.

    Raises:
        DigSegError: the experiment was deleted and waits in MLflow's trash.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_location(uri)))
        except MlflowException:
            # Another process was quicker.
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise DigSegError(
            f"tracking.experiment: {name!r} was deleted in {uri}; restore it (mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}) or choose another name"
        )
    return str(experiment.experiment_id)


def _dataset_inputs(root: str, digests: Mapping[str, str]) -> Iterator[DatasetInput]:
    for name, digest in digests.items():
        source = json.dumps({"uri": f"{root}/{name}/manifest.json", "sha256": digest})
        dataset = Dataset(name=name, digest=digest[:_DIGEST_LENGTH], source_type="digseg_shards", source=source)
        yield DatasetInput(dataset, tags=[InputTag("mlflow.data.context", "training")])


def _chunks(items: list[_T]) -> Iterator[list[_T]]:
    return (items[start : start + BATCH] for start in range(0, len(items), BATCH))


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return record if isinstance(record, dict) else {}
