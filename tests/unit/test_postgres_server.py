"""The PostgreSQL server of the tests: what the suites that crash and restart databases lean on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest

from tests.postgres import (
    ExternalServer,
    PostgresServer,
    PostgresUnavailableError,
    start_server,
    temporary_server,
)

ROOT = Path(__file__).parents[2]


def rows_in(url: str) -> int:
    with psycopg.connect(url) as connection:
        counted = connection.execute("SELECT count(*) FROM kept").fetchone()
    return int(counted[0]) if counted else -1


def insert_a_row(url: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS kept (id int)")
        connection.execute("INSERT INTO kept VALUES (1)")


def test_each_test_gets_an_empty_database_of_its_own(
    postgres_server: PostgresServer | ExternalServer, postgres_url: str
) -> None:
    """Two databases of one server share nothing, and a dropped one is gone although a connection is open."""
    other = postgres_server.create_database()
    insert_a_row(other)
    with psycopg.connect(other):
        postgres_server.drop_database(other)
    with psycopg.connect(postgres_url) as connection:
        tables = connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone()
    assert tables == (0,)
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(other)


def test_database_is_utf8_durable_and_compares_by_code_point(postgres_url: str) -> None:
    """The settings that tests of durability and ordering rest on are those of the running server."""
    with psycopg.connect(postgres_url) as connection:
        facts = {
            name: connection.execute(f"SHOW {name}").fetchone()
            for name in ("server_encoding", "synchronous_commit")
        }
        ordered = connection.execute("SELECT 'Z' < 'a'").fetchone()
    assert facts == {"server_encoding": ("UTF8",), "synchronous_commit": ("on",)}
    assert ordered == (True,)


def test_named_server_gives_databases_too(postgres_url: str) -> None:
    """A server somebody names by URL is used through that URL, and only what was made there is dropped."""
    named = ExternalServer(postgres_url)
    made = named.create_database()
    insert_a_row(made)
    named.drop_database(made)
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(made)
    with pytest.raises(ValueError, match="was not made by create_database"):
        named.drop_database(named.url("postgres"))


def test_directory_closed_to_the_servers_account_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started by root, PostgreSQL runs as somebody else, who must be able to reach its files."""
    closed = tmp_path / "closed"
    (closed / "own").mkdir(parents=True)
    closed.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(PostgresUnavailableError, match="closed to other users"):
        start_server(closed / "own")


@pytest.mark.postgres
def test_committed_rows_survive_kill_and_restart_on_the_same_port() -> None:
    """A killed server comes back with what was committed, under the URL its clients already have."""
    with temporary_server() as server:
        url = server.create_database()
        insert_a_row(url)
        server.kill()
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(url)
        server.start()
        insert_a_row(url)
        server.restart()
        assert rows_in(url) == 2


@pytest.mark.postgres
def test_server_of_a_killed_test_run_is_stopped_and_removed() -> None:
    """Nobody is left to clean up after kill -9 of the run, and still no server and no file stays behind."""
    program = (
        "import tempfile, time\nfrom pathlib import Path\nfrom tests.postgres import start_server\n"
        "directory = Path(tempfile.mkdtemp(prefix='drawbridge-postgres-'))\n"
        "print(directory, start_server(directory).url(), flush=True)\ntime.sleep(600)"
    )
    run = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    directory, url = run.stdout.readline().split()
    psycopg.connect(url).close()
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    run.stdout.close()
    deadline = time.monotonic() + 30
    while Path(directory).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(directory).exists()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(url)
