"""Joining the Ray cluster this process belongs to, or starting one on this machine for as long as it is needed."""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from digseg.config.schema import ClusterConfig
from digseg.errors import DigSegError

# Read by Ray when it is imported: no phone-home, and CPU tasks keep the accelerators' environment as it is.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray

CONNECT_TIMEOUT_S = 10.0


@contextmanager
def ray_session(cluster: ClusterConfig | None = None) -> Iterator[None]:
    """Ray for the duration of the block.

    In this order: a session that already runs in this process is used as it is; ``cluster.address`` or
    ``RAY_ADDRESS`` (which every submitted job has) is joined; else a local cluster is started, with enough CPUs
    for the fewest of ``cluster.workers``. Only what was started or joined here is shut down.

    Raises:
        DigSegError: the cluster at the given address cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    address = (cluster.address if cluster else None) or os.environ.get("RAY_ADDRESS")
    with _venv_on_path():
        if address:
            _join(address)
        else:
            _start(cluster)
        try:
            yield
        finally:
            ray.shutdown()


def free_gpus() -> float:
    """GPUs of the cluster that no task or actor holds now; needs a session."""
    return float(ray.available_resources().get("GPU", 0))


def _join(address: str) -> None:
    try:
        _check_listening(address)
        ray.init(address=address, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as error:
        raise DigSegError(
            f"cannot join the Ray cluster at {address!r}: {error}. Start it, or unset RAY_ADDRESS and "
            "cluster.address to run on this machine alone; a cluster on other machines also needs its token "
            "(RAY_AUTH_MODE=token)"
        ) from error


def _check_listening(address: str) -> None:
    """Ask whether anybody is at ``host:port``: Ray itself tries for minutes before it gives up."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()


def _start(cluster: ClusterConfig | None) -> None:
    cores = len(os.sched_getaffinity(0))
    wanted = math.ceil(cluster.min_workers * cluster.cpus_per_worker) if cluster else 1
    ray.init(
        address="local",
        # More workers than cores is slow but runs; with fewer CPUs than workers Ray would wait for ever.
        num_cpus=max(cores, wanted),
        include_dashboard=False,
        # The only warning of a sound start is that a token was made, which needs nothing of the user.
        logging_level=logging.ERROR,
    )


@contextmanager
def _venv_on_path() -> Iterator[None]:
    """Programs beside the interpreter (ninja, ray) are found by what runs below, activated or not."""
    before = os.environ.get("PATH", "")
    programs = str(Path(sys.executable).parent)
    if programs not in before.split(os.pathsep):
        os.environ["PATH"] = f"{programs}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before
