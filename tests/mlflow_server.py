"""A real MLflow tracking server of a test's own, which can be stopped and started again; and one that is sick."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import requests

START_TIMEOUT_S = 120


ADMIN, ADMIN_PASSWORD = "admin", "the-admins-own-password"

_ACCOUNTS = """
[mlflow]
default_permission = READ
database_uri = sqlite:///{folder}/accounts.db
admin_username = {user}
admin_password = {password}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


class MlflowServer:
    """``mlflow server`` on a free port, its store below ``folder``. Ended by its process id.

    Args:
        accounts: ask for a name and password (``--app-name basic-auth``); at first there is the account ``ADMIN``.
    """

    def __init__(self, folder: Path, accounts: bool = False) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self._folder = folder
        self._accounts = accounts
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or start it again on the same store, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        store = f"sqlite:///{self._folder}/mlflow.db"
        files = str(self._folder / "files")
        options = ["--workers", "1", "--backend-store-uri", store, "--artifacts-destination", files]
        # Its workers for jobs that nobody gives it here would take a dozen processes.
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        if self._accounts:
            options += ["--app-name", "basic-auth"]
            settings = self._folder / "accounts.ini"
            settings.write_text(_ACCOUNTS.format(folder=self._folder, user=ADMIN, password=ADMIN_PASSWORD))
            environment |= {"MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_FLASK_SERVER_SECRET_KEY": "of this test"}
        with self._log.open("a") as output:
            self._process = subprocess.Popen(
                [*command, *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                env=environment,
                start_new_session=True,
            )
        self._wait_until_healthy(self._process)

    def administer(self, call: str, **values: str) -> None:
        """A request of the administrator's about accounts, such as ``2.0/mlflow/users/create``."""
        account = (ADMIN, ADMIN_PASSWORD)
        answer = requests.post(f"{self.uri}/api/{call}", json=values, auth=account, timeout=START_TIMEOUT_S)
        assert answer.ok, answer.text

    def stop(self) -> None:
        """End it at once, as a crash would."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None

    def _wait_until_healthy(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert process.poll() is None, self._log.read_text()
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"the server did not come up:\n{self._log.read_text()}")


@contextmanager
def answering(status: HTTPStatus) -> Iterator[str]:
    """URL of what stands before a server, as nginx would, and answers its requests with `status`: a proxy that asks
    for a name and password, or one whose server fails. Only `/health` is well."""

    class Proxy(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            self.send_response(HTTPStatus.OK if self.path == "/health" else status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
