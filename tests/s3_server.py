"""An S3 server of a test's own on a free loopback port, in this process."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pytest
from moto.server import ThreadedMotoServer

BUCKET = "shards"


@contextmanager
def start_s3() -> Iterator[dict[str, str]]:
    """Serve an empty bucket, :data:`BUCKET`; gives the environment that leads a client to it.

    This process is such a client for the duration of the block.
    """
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    # All servers of one process share what they store.
    urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset", method="POST")).close()
    environment = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    s3 = fsspec.get_filesystem_class("s3")
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            # File systems are kept by their arguments, which do not hold the endpoint.
            s3.clear_instance_cache()
            s3().mkdir(BUCKET)
            yield environment
    finally:
        s3.clear_instance_cache()
        server.stop()
