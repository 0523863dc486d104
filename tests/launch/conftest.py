from collections.abc import Iterator

import pytest
from small_world import World, small_world

from digseg.cluster.runtime import ray_session
from digseg.config.schema import ClusterConfig


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A registered model, its run and its data; one for all tests of a session."""
    return small_world(tmp_path_factory.getbasetemp() / "world")


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    """One local Ray for all tests that ask for it; what they start joins it."""
    with ray_session(ClusterConfig(workers=2)):
        yield
