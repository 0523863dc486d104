"""The trainer under Ray Train: worker processes, their process group, and their restart after a loss."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from digseg.cluster.runtime import ray_session  # sets what Ray reads when it is imported; comes first

# How soon the controller notices a dead worker; Ray's default is 2 s.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
# How long workers wait for their place before their number is chosen anew: for some seconds after a node was lost, Ray
# takes it for one that is there. Ray's default is 60 s.
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
# How long workers that are to be ended may take to leave their process group, which one that hangs never does. Ray's
# default is 30 s.
os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "5")
# It would print what a worker prints a second time.
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")

import ray.train
import ray.train.torch
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

from digseg.cluster.lost_workers import ConnectionLostError, explanation
from digseg.config import Config
from digseg.console import progress, say
from digseg.errors import DigSegError, StoppedError
from digseg.training.locks import exclusive
from digseg.training.logging import read_metrics
from digseg.training.preemption import Notice, RunStoppedError, give, listen
from digseg.training.run import RunDirectory, TrainingResult, check_run, finished_result
from digseg.training.world import World, is_lost_connection

_FOLLOW_INTERVAL_S = 0.5
_NOTICE_INTERVAL_S = 0.2


def run_training(config: Config) -> TrainingResult:
    """Train with ``cluster.workers`` Ray workers.

    A run that was interrupted goes on from its last checkpoint. When a worker or its node is lost, Ray
    starts all workers anew, up to ``cluster.max_failures`` times, and they do the same. Where a range of workers
    is given, Ray starts as many as there is room for, and again when the room changes.

    Raises:
        DigSegError: the configuration or the data do not allow it, whichever process found out; a run of
            this name is being trained; or workers were lost and no restart is left.
        StoppedError: this process was sent SIGTERM, as ``ray job stop`` does; the run is saved.
    """
    finished = finished_result(config)
    if finished is not None:
        say(f"run {config.run.name!r} is finished: all {finished.steps} steps are taken")
        return finished
    check_run(config, config.world_sizes[-1])
    with exclusive(config), ray_session(config.cluster):
        _fit(config)
        result = finished_result(config)
        if result is None:  # the workers ended, and not by an error
            raise StoppedError
    return result


def _fit(config: Config) -> None:
    directory = RunDirectory(config)
    directory.path.mkdir(parents=True, exist_ok=True)
    failure = _failure_file(directory.path)
    failure.unlink(missing_ok=True)
    try:
        with _followed(config), _passing_on_sigterm(directory.stop):
            _torch_trainer(config).fit()
    except ray.train.TrainingFailedError as failed:
        _raise_recorded(failure)
        _close_tracking(config)
        lost = explanation(getattr(failed, "worker_failures", {}), config)
        if lost is None:
            raise
        raise lost from None
    _raise_recorded(failure)


def _close_tracking(config: Config) -> None:
    """Have MLflow know that nobody trains any more, where the worker that would have told it was lost."""
    if config.tracking.enabled:
        from digseg.registry.tracking import MlflowRun

        MlflowRun(config).abandon()


def _torch_trainer(config: Config) -> ray.train.torch.TorchTrainer:
    cluster = config.cluster
    # Of a whole process; where one of its threads hangs, the others wait in a collective, which has this limit too.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(cluster.hang_timeout_s)
    on_gpu = cluster.gpus_per_worker > 0
    resources = {"CPU": cluster.cpus_per_worker}
    if on_gpu:
        resources["GPU"] = cluster.gpus_per_worker
    return _Trainer(
        config,
        _train_worker,
        train_loop_config={"config": config.model_dump(mode="json")},
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=on_gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=cluster.resize_interval_s,
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=str(RunDirectory(config).path),
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )


@contextmanager
def _passing_on_sigterm(stop: Path) -> Iterator[None]:
    """Turn SIGTERM to this process into the file by which the workers are asked to save and end."""

    def on_sigterm(signum: int, frame: FrameType | None) -> None:
        say("asked to stop: the workers save and end")
        stop.touch()

    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Listening(WorkerGroupCallback):  # type: ignore[misc]
    """Lets SIGTERM to a worker mean that its machine is going to be taken.

    The handler has to be set in the worker's main thread, where Ray calls this; the trainer runs in another.
    """

    def after_worker_group_start(self, worker_group: Any) -> None:
        worker_group.execute(listen, Notice.LEAVE)


class _Trainer(ray.train.torch.TorchTrainer):  # type: ignore[misc]
    """Ray Train with as many workers as share the global batch, and no more actors than needed."""

    def __init__(self, config: Config, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._world_sizes = config.world_sizes

    def _create_default_callbacks(self) -> list[Any]:
        """Without the actors that are not needed: each costs seconds of every start.

        One hands out Ray's own data sets, which are not used here. On one machine nobody has to watch for the loss of
        others; and the one that frees a dead controller's placement group asks the dashboard about it each second, and
        complains aloud each second where there is none; here the group goes with the session.
        """
        unneeded = ["DatasetsCallback"]
        if len(ray.nodes()) == 1:
            unneeded.append("PlacementGroupCleanerCallback")
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        callbacks = super()._create_default_callbacks()
        return [*(callback for callback in callbacks if type(callback).__name__ not in unneeded), _Listening()]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            arguments["scaling_policy"] = _SharingPolicy(self.scaling_config, self._world_sizes)
        return super()._initialize_and_run_controller(**arguments)


class _SharingPolicy(ElasticScalingPolicy):  # type: ignore[misc]
    """As many workers as there is room for, of the numbers that share the global batch evenly."""

    def __init__(self, scaling_config: Any, world_sizes: tuple[int, ...]) -> None:
        super().__init__(scaling_config)
        self._world_sizes = world_sizes

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        room = super()._count_possible_workers(reserved_resources)
        return max((size for size in self._world_sizes if size <= room), default=0)


def _train_worker(arguments: dict[str, Any]) -> None:
    """What each Ray Train worker runs.

    Nothing is reported to Ray: `ray.train.report` is a barrier over all workers, and it would copy into
    Ray's store what digseg.training.checkpoint has already published, verified and pruned. The driver reads
    the result and the loss curve from the run's directory.

    A :class:`DigSegError` would only come again, so the restart that Ray makes of it ends at once. A worker that
    leaves its machine raises, so that Ray starts all anew on what is left; where the run is to end, all return.
    """
    config = Config.model_validate(arguments["config"])
    failure = _failure_file(RunDirectory(config).path)
    if failure.exists():
        return
    context = ray.train.get_context()
    world = World(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
        device=ray.train.torch.get_device(),
    )
    _watch_notices(RunDirectory(config).stop if world.is_main else None)
    try:
        # DeepSpeed, diffusers and MLflow take seconds to import, and the driver needs none of them.
        from digseg.registry.tracked_training import train_tracked

        train_tracked(config, world, show_progress=False)
    except RunStoppedError as stopped:
        if stopped.notice is Notice.END:
            return
        _hide_traceback()
        raise
    except DigSegError as error:
        _record(failure, error)
        _hide_traceback()  # the driver shows the error
        raise
    except Exception as error:
        if not is_lost_connection(error):
            raise
        _hide_traceback()  # it would tell where this worker waited, not why in vain
        first_sentence = str(error).partition("\n")[0].partition(". ")[0]
        lost = ConnectionLostError(f"lost the connection to another one: {first_sentence}")
        say(f"the worker of rank {world.rank} {lost}")
        raise lost from None


def _hide_traceback() -> None:
    """Keep Ray from showing the traceback of what this worker is about to raise."""
    logging.getLogger("ray.train.v2._internal.util").setLevel(logging.CRITICAL)


def _watch_notices(stop: Path | None) -> None:
    """Give this worker the notices that do not come as signals, for as long as it lives.

    A node that Ray drains (``ray drain-node``, or the autoscaler before a spot machine is taken) is made known to all
    workers of the run; ``ray.train.get_preemption_info`` would tell it only by a barrier over them at every step.

    Args:
        stop: the file by which the driver asks the workers to end; one of them looks for it.
    """
    preemption = get_train_context().preemption_context

    def watch() -> None:
        while True:
            if preemption.preemption_info is not None:
                give(Notice.LEAVE)
            if stop is not None and stop.exists():
                give(Notice.END)
            time.sleep(_NOTICE_INTERVAL_S)

    threading.Thread(target=watch, name="watch-notices", daemon=True).start()


def _failure_file(run_directory: Path) -> Path:
    return run_directory / "failure.json"


def _record(failure: Path, error: DigSegError) -> None:
    """Leave the error for the driver; of several workers' the first is kept (the others may follow from it)."""
    if failure.exists():
        return
    partial = failure.with_name(f".{failure.name}.{os.getpid()}")
    partial.write_text(json.dumps({"error": str(error)}))
    partial.replace(failure)


def _raise_recorded(failure: Path) -> None:
    if failure.exists():
        raise DigSegError(json.loads(failure.read_bytes())["error"]) from None


@contextmanager
def _followed(config: Config) -> Iterator[None]:
    """Show the progress of the workers here, where the user is, by following the run's loss curve."""
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(config, stop), name="follow-training", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _follow(config: Config, stop: threading.Event) -> None:
    path = RunDirectory(config).metrics
    sizes = config.world_sizes
    say(f"training: starting {sizes[0] if len(sizes) == 1 else f'{sizes[0]} to {sizes[-1]}'} workers")
    before = step = _last_logged(path)[0]
    # The bar appears with the first figures, so that its rate is not that of the start.
    while step <= before:
        if stop.wait(_FOLLOW_INTERVAL_S):
            return
        # A run that goes on from its checkpoint cuts its curve there.
        before = min(before, step)
        step, note = _last_logged(path)
    with progress("training", config.training.steps, "steps", step) as bar:
        bar.note(note)
        seen, ended = step, False
        while not ended:
            ended = stop.wait(_FOLLOW_INTERVAL_S)
            step, note = _last_logged(path)
            # After a restart the curve falls back to the checkpoint; the bar waits there.
            if step > seen:
                bar.note(note)
                bar.advance(step - seen)
                seen = step


def _last_logged(path: Path) -> tuple[int, str]:
    lines = read_metrics(path)
    if not lines:
        return 0, ""
    return lines[-1]["step"], f"loss {lines[-1]['loss']:.4f}, {lines[-1]['images_per_second']:.1f} images/s"
