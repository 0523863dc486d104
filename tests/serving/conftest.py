import pytest
from small_world import World, small_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A registered model, its run and its data; one for all tests of a session."""
    return small_world(tmp_path_factory.getbasetemp() / "world")
