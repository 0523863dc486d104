import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow_server import MlflowServer
from small_world import World, small_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A registered model, its run and its data; one for all tests of a session."""
    return small_world(tmp_path_factory.getbasetemp() / "world")


@pytest.fixture
def store(tmp_path: Path, world: World) -> str:
    """A copy of the world's database (making one takes seconds): digseg/1 is challenger, digseg/2 champion."""
    shutil.copy(world.tracking_uri.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    """A real tracking server, for the test to start: on the database of `store` where it asks for that, else on an
    empty one."""
    server = MlflowServer(tmp_path)
    yield server
    server.stop()
