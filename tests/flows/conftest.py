"""One emulator for all flow tests; each test gets a broker of its own on a fresh database."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from emulator import Emulator, running
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
