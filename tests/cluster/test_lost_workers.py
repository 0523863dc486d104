"""What a user is told where workers are lost and none may be started anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from small_world import small_config

from digseg.cluster.lost_workers import ConnectionLostError, explanation
from digseg.training.preemption import Notice, RunStoppedError
from digseg.training.run import RunDirectory

DIED = WorkerHealthCheckFailedError("Worker info: (hostname='node-7', pid=42)", RuntimeError("gone"))
HUNG = WorkerHealthCheckTimeoutError("A worker health check has been hanging")
STOPPED = RunStoppedError(Notice.LEAVE, "small", 5)
FOLLOWED = ConnectionLostError("lost the connection to another one: reset by peer")


@pytest.mark.parametrize(
    ("failures", "told"),
    [
        ({0: FOLLOWED, 1: DIED}, "has ended, as the worker of rank 1 died (process 42 on node-7); and no restart"),
        ({1: HUNG}, "as the worker of rank 1 did not answer for 600 s (cluster.hang_timeout_s); and no"),
        ({0: STOPPED}, "as the worker of rank 0 saved and left, as its machine or another one was announced"),
        ({0: FOLLOWED}, "as the worker of rank 0 lost the connection to another one: reset by peer; and no"),
        ({1: DIED, 0: HUNG}, "as the worker of rank 0 did not answer for 600 s (cluster.hang_timeout_s); the worker"),
    ],
)
def test_what_was_lost_is_told_without_what_followed_from_it(
    tmp_path: Path, failures: dict[int, Exception], told: str
) -> None:
    error = explanation(failures, small_config(tmp_path, cluster={"max_failures": 2}))
    assert told in str(error)
    assert "no restart is left (cluster.max_failures: 2). It has no checkpoint yet: the same command" in str(error)


def test_how_far_the_run_is_saved_is_told(tmp_path: Path) -> None:
    config = small_config(tmp_path, training={"steps": 9})
    directory = RunDirectory(config)
    (directory.checkpoints / "step-00000005").mkdir(parents=True)
    directory.metrics.write_text(json.dumps({"step": 7}) + "\n")
    assert str(explanation({0: STOPPED}, config)).endswith(
        "It is saved up to step 5 of 9. The same command again goes on from there"
    )
    assert str(explanation({0: DIED}, config)).endswith(
        "It is saved up to step 5 of 9; the steps after that are lost, although its loss curve went on to step 7. The "
        "same command again goes on from there"
    )


@pytest.mark.parametrize("failures", [{}, {0: ZeroDivisionError()}, {0: FOLLOWED, 1: ZeroDivisionError()}])
def test_defect_of_a_worker_is_not_taken_for_a_loss(tmp_path: Path, failures: dict[int, Exception]) -> None:
    assert explanation(failures, small_config(tmp_path)) is None
