"""A Ray head of a test's own, and further nodes: free ports, token authentication, ended by their process ids."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

START_TIMEOUT_S = 120


@dataclass(frozen=True)
class RayHead:
    """A running head; ``environment`` is what a client of it sets, ``address`` where a driver joins it."""

    dashboard: str
    address: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes]


@contextmanager
def start_head(folder: Path, environment: Mapping[str, str], num_cpus: int = 2) -> Iterator[RayHead]:
    """``ray start --head`` for the duration of the block; its output goes to ``folder/ray_head.log``."""
    programs = str(Path(sys.executable).parent)
    port, dashboard_port, agent_port, client_port, metrics_port = _free_ports(5)
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    # Unix sockets below this folder have short names only, so pytest's own folders are too deep.
    session = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    with (folder / "ray_head.log").open("w") as log:
        head = subprocess.Popen(
            [
                f"{programs}/ray", "start", "--head", "--block", f"--num-cpus={num_cpus}", f"--temp-dir={session}",
                f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}",
                f"--dashboard-agent-listen-port={agent_port}", f"--ray-client-server-port={client_port}",
                f"--metrics-export-port={metrics_port}", "--node-ip-address=127.0.0.1", "--disable-usage-stats",
            ],
            # Ray's own actors ask the dashboard, and would not know which of several clusters' is theirs.
            env={
                **environment, **auth, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard_port}",
                "PATH": f"{programs}:{os.environ['PATH']}",
            },
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    dashboard = f"http://127.0.0.1:{dashboard_port}"
    try:
        # A job is taken as soon as both answer: the dashboard hands it to the agent, which starts after it.
        for url in (f"{dashboard}/api/version", f"http://127.0.0.1:{agent_port}/api/healthz"):
            _wait_until_up(url, auth["RAY_AUTH_TOKEN"], head, folder / "ray_head.log")
        yield RayHead(dashboard, f"127.0.0.1:{port}", {**auth, "RAY_API_SERVER_ADDRESS": dashboard}, head)
    finally:
        # Asked to end, a head that ran jobs would take half a minute.
        kill_node(head)
        shutil.rmtree(session, ignore_errors=True)


@contextmanager
def start_node(
    folder: Path, head: RayHead, environment: Mapping[str, str], num_cpus: int = 1
) -> Iterator[subprocess.Popen[bytes]]:
    """A further node of the cluster, on this machine, for the duration of the block."""
    programs = str(Path(sys.executable).parent)
    agent_port, metrics_port = _free_ports(2)
    output = folder / f"ray_node_{agent_port}.log"
    with output.open("w") as log:
        node = subprocess.Popen(
            [
                f"{programs}/ray", "start", f"--address={head.address}", "--block", f"--num-cpus={num_cpus}",
                f"--dashboard-agent-listen-port={agent_port}", f"--metrics-export-port={metrics_port}",
                "--node-ip-address=127.0.0.1", "--object-store-memory=100000000", "--disable-usage-stats",
            ],
            env={
                **environment, **head.environment, "RAY_raylet_start_wait_time_s": str(START_TIMEOUT_S),
                "PATH": f"{programs}:{os.environ['PATH']}",
            },
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        while "Ray runtime started" not in output.read_text():
            assert node.poll() is None, output.read_text()[-3000:]
            time.sleep(0.1)
        yield node
    finally:
        kill_node(node)


def kill_node(node: subprocess.Popen[bytes]) -> None:
    """Take a head or a node away as a machine goes: all its processes at once."""
    # Workers are in groups of their own, and would live for a moment longer.
    processes = psutil.Process(node.pid).children(recursive=True) if node.poll() is None else []
    with contextlib.suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    node.wait()


def _free_ports(count: int) -> list[int]:
    """Ports nobody listens on, below those that Linux gives to outgoing connections and above Ray's own workers'."""
    ports: set[int] = set()
    while len(ports) < count:
        port = 20_000 + secrets.randbelow(12_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.add(port)
    return list(ports)


def _wait_until_up(url: str, token: str, head: subprocess.Popen[bytes], log: Path) -> None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, OSError) as error:
            if head.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the head is not up: {error}\n{log.read_text()[-3000:]}") from error
            time.sleep(0.2)
