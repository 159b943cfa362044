"""How one process notices what another one changed, on SQLite and on PostgreSQL."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from app.clock import Clock
from app.db.engine import Database
from app.db.epoch import EpochName, EpochWatch, bump
from app.db.migrate import migrate
from app.errors import DatabaseUnavailable
from tests.postgres import PostgresServer, temporary_server
from tests.waiting import until

ROOT = Path(__file__).parents[2]
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


class JumpingClock(Clock):
    """Its monotonic time can be moved; waiting is real."""

    ahead = 0.0

    def elapsed(self) -> float:
        return super().elapsed() + self.ahead


@pytest.fixture
def clock() -> JumpingClock:
    """A clock of which the test moves the hands."""
    return JumpingClock()


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A PostgreSQL server that a test may kill."""
    with temporary_server() as server:
        yield server


def migrated(url: str, clock: Clock, tmp_path: Path) -> tuple[Database, Database]:
    """The main database and that of the trail, ready for use."""
    main = Database(url, clock=clock, state_dir=tmp_path / "state")
    audit = main
    if main.dialect == "sqlite":
        audit = Database(f"sqlite:///{tmp_path}/trail.db", clock=clock, state_dir=tmp_path / "state")
    migrate(main, audit)
    return main, audit


@pytest.fixture
def database(database_url: str, clock: JumpingClock, tmp_path: Path) -> Iterator[Database]:
    """A migrated database."""
    main, audit = migrated(database_url, clock, tmp_path)
    yield main
    main.dispose()
    audit.dispose()


@pytest.fixture
def watch(database: Database, clock: JumpingClock) -> Iterator[EpochWatch]:
    """A watch whose thread a test may start."""
    watch = EpochWatch(database, clock)
    yield watch
    watch.stop()


def change(database: Database, name: EpochName) -> int:
    """What every change does."""
    with database.write() as connection:
        return bump(connection, name)


class TestBump:
    def test_counters_grow_by_one_and_apart(self, database: Database, watch: EpochWatch) -> None:
        """Each bump says the number its change goes by."""
        assert [change(database, "access") for _ in range(3)] == [1, 2, 3]
        assert change(database, "connections") == 1
        seen = watch.look()
        assert (seen.access, seen.connections) == (3, 1)

    def test_what_is_rolled_back_was_never_counted(self, database: Database, watch: EpochWatch) -> None:
        """The counter moves with the change or not at all."""

        def change_and_fail() -> None:
            with database.write() as connection:
                bump(connection, "access")
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            change_and_fail()
        assert watch.look().access == 0

    def test_sixteen_threads_get_sixteen_numbers(self, database: Database) -> None:
        """No two changes share a number."""
        with ThreadPoolExecutor(16) as pool:
            numbers = list(pool.map(lambda _: change(database, "connections"), range(16)))
        assert sorted(numbers) == list(range(1, 17))


class TestLook:
    def test_a_recent_reading_is_believed(self, database: Database, watch: EpochWatch) -> None:
        """Within 750 ms nothing is asked of the database."""
        first = watch.look()
        change(database, "access")
        assert watch.look() is first

    def test_an_old_reading_is_not(self, database: Database, watch: EpochWatch, clock: JumpingClock) -> None:
        """After 750 ms the next look reads."""
        watch.look()
        change(database, "access")
        clock.ahead += 0.8
        assert watch.age > 0.75
        assert watch.look().access == 1
        assert watch.age < 0.75

    def test_the_thread_sees_a_change_of_another_process(
        self, database: Database, watch: EpochWatch, tmp_path: Path
    ) -> None:
        """Without anybody looking, `last` moves."""
        watch.start()
        url = database.url.render_as_string(hide_password=False)
        subprocess.run([sys.executable, "-c", _BUMP, url, tmp_path / "state"], check=True, cwd=ROOT)
        until(lambda: watch.last is not None and watch.last.connections == 1)

    def test_with_the_thread_an_old_reading_is_renewed_at_once(
        self, database: Database, watch: EpochWatch, clock: JumpingClock
    ) -> None:
        """A process that was suspended does not believe what it knew before."""
        watch.start()
        until(lambda: watch.last is not None)
        for expected in range(1, 6):
            change(database, "access")
            clock.ahead += 10
            assert watch.look().access == expected

    def test_stopping_ends_the_thread_and_looking_goes_on(
        self, database: Database, watch: EpochWatch, clock: JumpingClock
    ) -> None:
        """It can be started again, and stopping twice does no harm."""
        for _ in range(2):
            watch.start()
            watch.start()
            watch.stop()
            watch.stop()
        assert "epoch-watch" not in [thread.name for thread in threading.enumerate()]
        change(database, "access")
        clock.ahead += 1
        assert watch.look().access == 1

    def test_a_child_process_polls_for_itself(self, database: Database, tmp_path: Path) -> None:
        """The thread does not survive a fork, so the child starts its own."""
        url = database.url.render_as_string(hide_password=False)
        command = [sys.executable, "-c", _FORK, url, str(tmp_path / "state")]
        said = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert said.stdout.split() == ["child-saw-1"], said.stderr


_BEGIN = """
import os, sys, threading, time
from pathlib import Path
from app.clock import Clock
from app.db.engine import Database
from app.db.epoch import EpochWatch, bump
clock = Clock()
database = Database(sys.argv[1], clock=clock, state_dir=Path(sys.argv[2]))
"""

_BUMP = (
    _BEGIN
    + """
with database.write() as connection:
    bump(connection, "connections")
database.dispose()
"""
)

_FORK = (
    _BEGIN
    + """
watch = EpochWatch(database, clock)
watch.start()
while watch.last is None:
    time.sleep(0.01)
time.sleep(0.1)  # the thread rests between two polls
child = os.fork()
if child == 0:
    end = time.monotonic() + 30
    while watch.last.connections == 0 and time.monotonic() < end:
        time.sleep(0.01)
    print(f"child-saw-{watch.last.connections}", flush=True)
    os._exit(0)
with database.write() as connection:
    bump(connection, "connections")
os.waitpid(child, 0)
watch.stop()
database.dispose()
"""
)


class TestOutage:
    @pytest.mark.parametrize("polling", [True, False], ids=["with the thread", "without"])
    def test_the_last_reading_stays_and_looking_recovers(
        self, server: PostgresServer, clock: JumpingClock, tmp_path: Path, polling: bool
    ) -> None:
        """An outage is an error to whoever looks, never a wrong number, and it ends by itself."""
        database, _ = migrated(server.create_database(), clock, tmp_path)
        watch = EpochWatch(database, clock)
        change(database, "access")
        if polling:
            watch.start()
        known = watch.look()
        server.kill()
        clock.ahead += 1
        with pytest.raises(DatabaseUnavailable):
            watch.look()
        assert watch.last is not None
        assert watch.last.access == known.access == 1
        assert watch.age > 0.75
        server.start()
        change(database, "access")
        until(lambda: _access(watch) == 2)
        watch.stop()
        database.dispose()


def _access(watch: EpochWatch) -> int | None:
    try:
        return watch.look().access
    except DatabaseUnavailable:
        return None
