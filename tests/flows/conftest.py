"""One emulator for all flow tests; each test gets a broker of its own on a fresh database."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from emulator import Emulator, running
from tests.broker_world import World, world
from tests.postgres import ExternalServer, PostgresServer
from tests.web_stage import Stage, staged


@pytest.fixture(scope="session")
def vendors() -> Iterator[Emulator]:
    """Run both vendors in this process for the whole session."""
    with running(config={}) as emulator:
        yield emulator


@pytest.fixture
def stage(vendors: Emulator, tmp_path: Path) -> Iterator[Stage]:
    """Give a broker on SQLite."""
    with staged(vendors, f"sqlite:///{tmp_path / 'drawbridge.db'}", tmp_path / "state") as stage:
        yield stage


@pytest.fixture
def either_stage(vendors: Emulator, tmp_path: Path, database_url: str) -> Iterator[Stage]:
    """Give a broker on each kind of database in turn."""
    with staged(vendors, database_url, tmp_path / "state") as stage:
        yield stage


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def standing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One world of two hosts on each kind of database for all tests of a file."""
    directory: Path = tmp_path_factory.mktemp("world")
    url = f"sqlite:///{directory / 'drawbridge.db'}"
    if request.param == "postgresql":
        server: PostgresServer | ExternalServer = request.getfixturevalue("postgres_server")
        url = server.create_database()
    with world(url, directory) as opened:
        yield opened


@pytest.fixture
def made(standing: World) -> Iterator[World]:
    """The world, empty."""
    standing.clear()
    yield standing
    standing.clear()
