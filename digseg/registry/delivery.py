"""Metrics on their way to MLflow: a thread that tries on until the store takes them, in order and once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mlflow.entities import Metric, RunTag
from mlflow.tracking import MlflowClient

from digseg.registry.store import first_line
from digseg.registry.system_metrics import SystemMetrics

BATCH = 100  # entities that MLflow takes in one call

_FLUSH_INTERVAL_S = 2.0
_SYSTEM_INTERVAL_S = 15.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A run in a store that answers, and the last step of each metric that it has.

    The store is asked, not a note of what was sent to it: a process that is killed cannot tell which of its last
    figures arrived.
    """

    client: MlflowClient
    run_id: str
    last_steps: dict[str, int]


class Delivery:
    """Delivers what is put in, files of folders, and figures of this machine every `_SYSTEM_INTERVAL_S`. A store that
    fails is tried again, without end while the run goes on; it never stops the run.

    Args:
        opened: opens the run; called in the thread, again and again until it succeeds.
    """

    def __init__(self, opened: Callable[[], Opened]) -> None:
        self._open = opened
        self._opened: Opened | None = None
        self._queue: list[Metric] = []
        self._folders: set[Path] = set()
        self._tags: dict[str, str] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._give_up_at = float("inf")
        self._system = SystemMetrics()
        self._sampled_at = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="mlflow-delivery", daemon=True)
        self._thread.start()

    def put(self, metrics: Sequence[Metric]) -> None:
        """Queue metrics; returns at once."""
        with self._lock:
            self._queue.extend(metrics)

    def attach(self, folder: Path) -> None:
        """Have the files of ``folder`` attached that the run does not have yet, under the folder's name; returns at
        once."""
        with self._lock:
            self._folders.add(folder)

    def tag(self, values: Mapping[str, str]) -> None:
        """Have tags set, in place of former ones; returns at once."""
        with self._lock:
            self._tags.update(values)

    def close(self, timeout_s: float) -> bool:
        """Deliver what is queued, trying for at most `timeout_s`; whether all of it arrived."""
        self._give_up_at = time.monotonic() + timeout_s
        self._closing.set()
        self._thread.join(timeout_s)
        with self._lock:
            waiting = self._queue or self._folders or self._tags
        # Pictures that are being uploaded wait no more, but have not arrived while the thread is at it.
        return self._opened is not None and not waiting and not self._thread.is_alive()

    def _work(self) -> None:
        failing = False
        while True:
            last = self._closing.wait(_FLUSH_INTERVAL_S)
            try:
                self._sample()
                self._flush()
                failing = False
            except Exception as error:  # whatever the store does must not end the training
                if not failing:
                    _log.warning("MLflow does not take metrics, trying on: %s", first_line(error))
                failing = True
            if last and (not failing or time.monotonic() > self._give_up_at):
                return
            if last:
                time.sleep(_FLUSH_INTERVAL_S)

    def _flush(self) -> None:
        if self._opened is None:
            self._opened = self._open()
        while True:
            with self._lock:
                batch = self._queue[:BATCH]
            if not batch:
                break
            new = self._not_there(batch)
            if new:
                self._opened.client.log_batch(self._opened.run_id, metrics=new)
            self._opened.last_steps.update({metric.key: metric.step for metric in new})
            with self._lock:
                del self._queue[: len(batch)]
        self._set_tags(self._opened)
        self._attach_new_files(self._opened)

    def _set_tags(self, opened: Opened) -> None:
        with self._lock:
            tags = dict(self._tags)
        if tags:
            opened.client.log_batch(opened.run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        with self._lock:
            self._tags = {name: value for name, value in self._tags.items() if tags.get(name) != value}

    def _attach_new_files(self, opened: Opened) -> None:
        with self._lock:
            folders, self._folders = self._folders, set()
        try:
            for folder in sorted(folders):
                there = {
                    PurePosixPath(file.path).name for file in opened.client.list_artifacts(opened.run_id, folder.name)
                }
                for path in sorted(folder.iterdir()):
                    if path.name not in there:
                        opened.client.log_artifact(opened.run_id, str(path), folder.name)
        except Exception:
            with self._lock:
                self._folders |= folders
            raise

    def _not_there(self, batch: Sequence[Metric]) -> list[Metric]:
        """Those metrics whose step comes after the last one of their key."""
        assert self._opened is not None
        last, new = dict(self._opened.last_steps), []
        for metric in batch:
            if metric.step > last.get(metric.key, -1):
                last[metric.key] = metric.step
                new.append(metric)
        return new

    def _sample(self) -> None:
        """Queue the machine's figures when it is time; their steps count the samples of all processes of the run."""
        if time.monotonic() - self._sampled_at < _SYSTEM_INTERVAL_S or self._opened is None:
            return
        self._sampled_at, now_ms = time.monotonic(), time.time_ns() // 1_000_000
        values = self._system.sample()
        last = self._opened.last_steps
        self.put([Metric(name, value, now_ms, last.get(name, -1) + 1) for name, value in values.items()])
