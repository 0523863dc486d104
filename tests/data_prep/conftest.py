from collections.abc import Iterator

import pytest

from digseg.cluster.runtime import ray_session


@pytest.fixture(scope="module")
def ray_running() -> Iterator[None]:
    """Ray, for all tests of a module that shard or encode."""
    with ray_session():
        yield
