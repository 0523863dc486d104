"""A run on disk: its directory, its result, and whether a configuration may continue it.

::

    <run.storage>/<run.name>/config.yaml      the resolved configuration
                             checkpoints/     see digseg.training.checkpoint
                             metrics.jsonl    the loss curve
                             skipped.json     steps that were left out or are passed over, with their samples, if any
                             ledger.json      where the time went
                             profile/         traces of the steps of training.profile, if any
                             validation/      pictures of what was predicted while training, if it was validated
                             samples/         which samples each step took, where training.log_samples is set
                             stop             there while the workers are asked to save and end (under Ray)
                             lock             held by who submitted the run; written when that was
                             trained          held by who trains it, see digseg.training.locks
                             model/           the exported model, once all steps are taken
                             result.json      the TrainingResult, once the model is there
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import ValidationError

from digseg.config import Config, dump_config
from digseg.data.format import load_manifest
from digseg.errors import DigSegError
from digseg.training.checkpoint import SCORE, best_checkpoint, published_state
from digseg.training.deepspeed_config import deepspeed_config
from digseg.training.files import write_whole
from digseg.training.guard import SkippedSteps
from digseg.training.logging import read_metrics

# Settings that say what the run is: the samples it sees, and the weights it has.
_IDENTITY = ("model", "data", "run.seed", "training.global_batch_size")
# Settings of the data that change how it is read, not what is read.
_READING = ("root", "workers", "prefetch", "decoded_cache_mb", "cache_dir", "cache_bytes", "max_corrupt")


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a finished run gave. ``first_loss`` is step 1's, ``last_loss`` the mean of the last window."""

    steps: int
    first_loss: float
    last_loss: float
    images_per_second: float
    checkpoint_dir: str
    model_dir: str
    world_size: int
    zero_stage: int
    attention_kernel: str = ""


class RunDirectory:
    """The paths of a run and the small files that tell of it."""

    def __init__(self, config: Config) -> None:
        self.path = Path(config.run.storage) / config.run.name
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.model = self.path / "model"
        self.skipped = self.path / "skipped.json"
        self.ledger = self.path / "ledger.json"
        self.validation = self.path / "validation"
        self.profile = self.path / "profile"
        self.samples = self.path / "samples"
        self.stop = self.path / "stop"
        self.lock = self.path / "lock"
        self.trained = self.path / "trained"
        self._result = self.path / "result.json"

    def submitted_at(self) -> float:
        """When the run was last submitted, by the lock's file (Unix time, s); now where nobody holds runs."""
        return self.lock.stat().st_mtime if self.lock.exists() else time.time()

    def tags(self) -> dict[str, str]:
        """Which checkpoint is the best and which steps were skipped, as tags of the run; none where none was."""
        skipped = {"skipped_steps": SkippedSteps(self.skipped).tag()} if self.skipped.exists() else {}
        return self._best_tags() | skipped

    def _best_tags(self) -> dict[str, str]:
        best = best_checkpoint(self.checkpoints)
        if not best:
            return {}
        path = self.checkpoints / best["checkpoint"]
        return {"best.checkpoint": str(path), "best.step": str(best["step"]), "best.miou": f"{best[SCORE]:.4f}"}

    def write_config(self, config: Config) -> None:
        """Make the directory and leave the resolved configuration in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / "config.yaml", dump_config(config))
        # A run that is continued with more steps is not finished any more.
        self._result.unlink(missing_ok=True)

    def write_result(self, result: TrainingResult) -> None:
        """Mark the run as finished."""
        write_whole(self._result, json.dumps(asdict(result), indent=2, sort_keys=True) + "\n")

    def result(self) -> TrainingResult | None:
        """The result of the finished run, else None."""
        try:
            return TrainingResult(**json.loads(self._result.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None


def finished_result(config: Config) -> TrainingResult | None:
    """The result of a run that has already taken ``training.steps`` steps, else None.

    Raises:
        DigSegError: the run of this name was another one (see :func:`check_continues`).
    """
    directory = RunDirectory(config)
    state = published_state(directory.checkpoints)
    if state is not None:
        check_continues(state, config)
    result = directory.result()
    return result if result is not None and result.steps >= config.training.steps else None


def check_run(config: Config, world_size: int) -> None:
    """Find what would stop the run before processes are started for it.

    Raises:
        DigSegError: shards are missing, ``world_size`` processes cannot share a batch, ``training.deepspeed``
            sets a derived key, or the run of this name has checkpoints that cannot be converted.
    """
    for corpus in config.data.corpora:
        load_manifest(config.data.root, corpus.name, corpus.split)
    if config.training.validation.every is not None:
        for asked in config.evaluation.corpora:
            load_manifest(config.data.root, asked.name, asked.split)
    deepspeed_config(config, world_size, num_parameters=1)
    directory = RunDirectory(config)
    state = published_state(directory.checkpoints)
    if state is not None:
        check_layout(state, config)


def check_layout(state: Mapping[str, Any], config: Config) -> None:
    """Refuse a checkpoint whose optimizer state cannot be brought to the ZeRO stage that is asked for.

    Any world size goes on from any other, and stages 1 to 3 from one another.

    Raises:
        DigSegError: one of the stages is 0, which DeepSpeed does not convert; the text says how to go on.
    """
    saved, stage = state["zero_stage"], config.training.zero_stage
    if saved != stage and 0 in (saved, stage):
        raise DigSegError(
            f"run {config.run.name!r} in {config.run.storage}: the checkpoint of step {state['step']} was written "
            f"with ZeRO stage {saved} and cannot be turned into stage {stage}; continue with "
            f"training.zero_stage={saved}, or start anew under another run.name"
        )


def check_same_data(state: Mapping[str, Any], digests: Mapping[str, str], config: Config) -> None:
    """Refuse to continue a checkpoint's run on other shards.

    Args:
        digests: of the manifests now, by ``corpus/split``.

    Raises:
        DigSegError: names the splits that changed.
    """
    changed = sorted(name for name, digest in digests.items() if state["datasets"].get(name) != digest)
    if changed:
        raise DigSegError(
            f"the shards of {', '.join(changed)} in {config.data.root} changed since the checkpoint of step "
            f"{state['step']} was written, so its place in the data means nothing now; choose another run.name, or "
            "point data.root at the former shards"
        )


def check_same_base(state: Mapping[str, Any], frozen_sha256: str | None, config: Config) -> None:
    """Refuse to continue a checkpoint of adapters on other weights than they were trained on.

    Raises:
        DigSegError: the pretrained U-Net is another one now.
    """
    if state.get("frozen_sha256") != frozen_sha256:
        raise DigSegError(
            f"the weights in model.pretrained ({config.model.pretrained}) changed since the checkpoint of step "
            f"{state['step']} was written, and its adapters belong to the former ones; choose another run.name, or "
            "point model.pretrained at them"
        )


def check_continues(state: Mapping[str, Any], config: Config) -> None:
    """Refuse to continue a checkpoint's run with settings that make it another run.

    Raises:
        DigSegError: names every differing key with both values.
    """
    before, now = _identity(_as_read_now(state["config"])), _identity(config.model_dump(mode="json"))
    differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if differing:
        changes = "; ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in differing)
        raise DigSegError(
            f"run {config.run.name!r} in {config.run.storage} cannot go on: {changes}. "
            "Choose another run.name, or set these keys back"
        )


def summarise(metrics_path: Path) -> tuple[float, float, float]:
    """First and last loss and the median images/s of a run's ``metrics.jsonl``.

    The first line is left out of the rate where there are others: its step pays for the start-up.
    """
    lines = read_metrics(metrics_path)
    rates = [line["images_per_second"] for line in lines]
    return lines[0]["loss"], lines[-1]["loss"], median(rates[1:] or rates)


def _as_read_now(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A saved configuration with the defaults of settings that have come since, which is how it was trained; one with
    settings that are gone stays as it is, so that they show as differences."""
    try:
        return Config.model_validate(saved).model_dump(mode="json")
    except ValidationError:
        return saved


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section in _IDENTITY:
        value: Any = config
        for key in section.split("."):
            value = value[key]
        flat |= _flattened(value, section)
    return {key: value for key, value in flat.items() if key not in {f"data.{name}" for name in _READING}}


def _flattened(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for key, part in value.items() for k, v in _flattened(part, f"{path}.{key}").items()}
