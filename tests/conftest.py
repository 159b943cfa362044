"""What every test gets: sockets on loopback only, PostgreSQL when it asks for it, parts left out by name."""

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.telemetry import logs
from tests.loopback import loopback_only
from tests.postgres import ExternalServer, PostgresServer, chosen_server

PARTS = {"postgres": "PostgreSQL", "browser": "a headless Chromium"}
POSTGRES_FIXTURES = {"postgres_server", "postgres_url"}

left_out_key = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a part be left out, which is then printed."""
    for part, need in PARTS.items():
        parser.addoption(
            f"--without-{part}", action="store_true", help=f"leave out the tests that need {need}"
        )


def pytest_configure(config: pytest.Config) -> None:
    """Start counting what is left out."""
    config.stash[left_out_key] = Counter()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test with the parts it needs and leave out those it was told to go without."""
    for item in items:
        if POSTGRES_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.postgres)
        if (Path(config.rootpath) / "tests" / "browser") in item.path.parents:
            item.add_marker(pytest.mark.browser)
    unwanted = [part for part in PARTS if config.getoption(f"--without-{part}")]
    leaving = {item: part for item in items for part in unwanted if item.get_closest_marker(part)}
    if leaving:
        config.stash[left_out_key].update(leaving.values())
        config.hook.pytest_deselected(items=list(leaving))
        items[:] = [item for item in items if item not in leaving]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the process that reports, when the tests run in several."""
    if hasattr(session.config, "workeroutput"):
        left_out: Counter[str] = session.config.stash[left_out_key]
        session.config.workeroutput["left_out"] = dict(left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Hear what each of several processes left out; all of them leave out the same."""
    told = getattr(node, "workeroutput", {}).get("left_out", {})
    node.config.stash[left_out_key] = Counter(told)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what was left out, so that a green run never looks like more than it is."""
    for part in PARTS:
        if config.getoption(f"--without-{part}"):
            count = config.stash[left_out_key][part]
            terminalreporter.write_line(f"LEFT OUT on request: {part} ({count} tests need {PARTS[part]})")


@pytest.fixture(autouse=True, scope="session")
def _loopback_only() -> Iterator[None]:
    """Keep every socket of the test process on this machine."""
    with loopback_only():
        yield


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """Undo what a test does to the process-wide log, so that no other test hears its words elsewhere."""
    root = logging.getLogger()
    stream, handlers, level = logs._stream, list(root.handlers), root.level
    yield
    logs._stream = stream
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer | ExternalServer]:
    """Give a real PostgreSQL server, one for the whole run."""
    with chosen_server() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer | ExternalServer) -> Iterator[str]:
    """Give the URL of an empty PostgreSQL database, dropped after the test."""
    url = postgres_server.create_database()
    yield url
    postgres_server.drop_database(url)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Give the URL of an empty database; a test that asks for it runs once for each kind of database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'drawbridge.db'}"
    return str(request.getfixturevalue("postgres_url"))
