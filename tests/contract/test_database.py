"""What both databases promise the rest of the program; each test runs on SQLite and on PostgreSQL."""

import fcntl
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, OperationalError, StatementError

from app.clock import Clock
from app.db.engine import Database, open_databases
from app.db.types import Instant, Json, db_now
from app.errors import ConfigurationFault, DatabaseUnavailable
from tests.postgres import PostgresServer, temporary_server
from tests.waiting import until

Maker = Callable[..., Database]

METADATA = sa.MetaData()
TALLY = sa.Table(
    "tally",
    METADATA,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("value", sa.Integer, nullable=False),
)
SAMPLES = sa.Table(
    "samples",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at", Instant),
    sa.Column("body", Json),
    sa.Column("blob", sa.LargeBinary),
    sa.Column("tally", sa.ForeignKey(TALLY.c.name)),
)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Maker]:
    """Make databases that are closed at the end of the test."""
    made: list[Database] = []

    def make(url: str, **options: object) -> Database:
        settled = {"clock": Clock(), "state_dir": tmp_path / "state"} | options
        made.append(Database(url, **settled))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for database in made:
        database.dispose()


@pytest.fixture
def database(make: Maker, database_url: str) -> Database:
    """A database with a table to count in."""
    database = make(database_url)
    with database.write() as connection:
        METADATA.create_all(connection, tables=[TALLY])
        connection.execute(sa.insert(TALLY), [{"name": "one", "value": 0}])
    return database


@pytest.fixture
def file_database(make: Maker, tmp_path: Path) -> Database:
    """The same on SQLite alone, for what only a file can do."""
    database = make(f"sqlite:///{tmp_path}/only/this.db")
    with database.write() as connection:
        METADATA.create_all(connection, tables=[TALLY])
        connection.execute(sa.insert(TALLY), [{"name": "one", "value": 0}])
    return database


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    """A PostgreSQL server that a test may kill."""
    with temporary_server() as server:
        yield server


def value(database: Database, name: str = "one") -> int | None:
    """What the table says now."""
    with database.read() as connection:
        return connection.scalar(sa.select(TALLY.c.value).where(TALLY.c.name == name))


def add_one(database: Database) -> None:
    """Count, in a transaction of its own."""
    with database.write() as connection:
        connection.execute(sa.update(TALLY).values(value=TALLY.c.value + 1))


def in_processes(count: int, code: str, *arguments: object) -> list[str]:
    """Run the same program in several processes at once and return what each printed."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(count)
    ]
    ended = [(process.communicate(timeout=120), process.returncode) for process in started]
    assert [code for _, code in ended] == [0] * count, [err for (_, err), _ in ended]
    return [out for (out, _), _ in ended]


class TestTransactions:
    def test_a_block_that_ends_is_stored(self, database: Database) -> None:
        """What `write()` did is there for everybody once the block has ended."""
        add_one(database)
        assert value(database) == 1

    def test_a_block_that_raises_leaves_nothing(self, database: Database) -> None:
        """An exception undoes every statement of the block and goes on to the caller."""

        def change_and_raise() -> None:
            with database.write() as connection:
                connection.execute(sa.update(TALLY).values(value=7))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            change_and_raise()
        assert value(database) == 0

    def test_a_reader_does_not_see_an_open_transaction_and_is_not_held_up_by_it(
        self, database: Database
    ) -> None:
        """A reader sees what is committed when its statement starts, each statement anew."""
        with database.read() as reading:
            with database.write() as writing:
                writing.execute(sa.update(TALLY).values(value=7))
                assert reading.scalar(sa.select(TALLY.c.value)) == 0
            assert reading.scalar(sa.select(TALLY.c.value)) == 7

    def test_reading_refuses_to_write(self, database: Database) -> None:
        """A statement that would change something is stopped before it reaches the database."""
        with pytest.raises(RuntimeError, match="belongs into write"), database.read() as connection:
            connection.execute(sa.update(TALLY).values(value=7))
        assert value(database) == 0

    def test_a_broken_constraint_passes_as_itself_without_the_values(self, database: Database) -> None:
        """Callers make their own conflict out of an IntegrityError; it does not tell parameters."""
        row = {"name": "one", "value": 48151623}
        with pytest.raises(IntegrityError) as caught, database.write() as connection:
            connection.execute(sa.insert(TALLY), [row])
        assert "48151623" not in str(caught.value)

    def test_a_failure_in_a_savepoint_is_survived(self, database: Database) -> None:
        """`begin_nested()` undoes the failed part alone and the transaction is committed."""
        with database.write() as connection:
            connection.execute(sa.update(TALLY).values(value=7))
            with pytest.raises(IntegrityError), connection.begin_nested():
                connection.execute(sa.insert(TALLY), [{"name": "one", "value": 0}])
            connection.execute(sa.insert(TALLY), [{"name": "two", "value": 2}])
        assert (value(database), value(database, "two")) == (7, 2)

    def test_a_failure_outside_a_savepoint_cannot_be_committed_unnoticed(
        self, make: Maker, postgres_url: str
    ) -> None:
        """PostgreSQL would answer COMMIT with a quiet ROLLBACK; the block raises instead."""
        database = make(postgres_url)
        with database.write() as connection:
            METADATA.create_all(connection, tables=[TALLY])
            connection.execute(sa.insert(TALLY), [{"name": "one", "value": 0}])

        def fail_and_go_on() -> None:
            with database.write() as connection:
                connection.execute(sa.update(TALLY).values(value=7))
                with pytest.raises(IntegrityError):
                    connection.execute(sa.insert(TALLY), [{"name": "one", "value": 0}])

        with pytest.raises(RuntimeError, match="begin_nested"):
            fail_and_go_on()
        assert value(database) == 0

    def test_a_write_inside_a_write_is_refused_and_not_waited_for(self, file_database: Database) -> None:
        """On SQLite it could never get its turn."""
        with pytest.raises(RuntimeError, match="wait for itself"), file_database.write():
            add_one(file_database)
        add_one(file_database)
        assert value(file_database) == 1

    def test_a_mistake_in_our_sql_is_not_called_an_outage(self, database: Database) -> None:
        """A missing table must show as what it is."""
        with pytest.raises(sa.exc.DBAPIError), database.read() as connection:
            connection.execute(sa.text("SELECT * FROM nowhere"))

    def test_take_turns_lets_one_in_at_a_time(self, database: Database) -> None:
        """Who takes turns under a name reads what the one before has written."""

        def count_by_reading(_: int) -> None:
            with database.write() as connection:
                database.take_turns(connection, "counting")
                seen = connection.scalar(sa.select(TALLY.c.value))
                connection.execute(sa.update(TALLY).values(value=(seen or 0) + 1))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(count_by_reading, range(40)))
        assert value(database) == 40


class TestCompetition:
    def test_one_of_sixteen_threads_wins_a_conditional_update(self, database: Database) -> None:
        """The row count of an UPDATE with a condition is all a lease needs."""
        together = threading.Barrier(16)

        def try_to_win(me: int) -> int:
            together.wait()
            with database.write() as connection:
                statement = sa.update(TALLY).where(TALLY.c.value == 0).values(value=me)
                return connection.execute(statement).rowcount

        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(try_to_win, range(1, 17)))
        assert sorted(won) == [0] * 15 + [1]
        assert value(database) == won.index(1) + 1

    def test_one_of_sixteen_threads_in_four_processes_wins_each_round(
        self, database: Database, tmp_path: Path
    ) -> None:
        """Thirty rounds, each won once and by nobody else, however the processes interleave."""
        with database.write() as connection:
            connection.execute(
                sa.insert(TALLY), [{"name": f"round-{number}", "value": 0} for number in range(30)]
            )
        wins = in_processes(4, _PLAY, database.url.render_as_string(hide_password=False), tmp_path / "state")
        won = sorted(int(number) for line in wins for number in line.split())
        assert won == list(range(30))

    def test_no_count_of_four_processes_is_lost(self, database: Database, tmp_path: Path) -> None:
        """Four processes of four threads add 25 each to one row."""
        in_processes(4, _COUNT, database.url.render_as_string(hide_password=False), tmp_path / "state")
        assert value(database) == 4 * 4 * 25


_BEGIN = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import sqlalchemy as sa
from app.clock import Clock
from app.db.engine import Database
TALLY = sa.table("tally", sa.column("name"), sa.column("value"))
database = Database(sys.argv[1], clock=Clock(), state_dir=Path(sys.argv[2]))
"""

_PLAY = (
    _BEGIN
    + """
def play(number):
    with database.write() as connection:
        free = sa.update(TALLY).where(TALLY.c.name == f"round-{number}", TALLY.c.value == 0)
        return connection.execute(free.values(value=1)).rowcount
with ThreadPoolExecutor(4) as pool:
    rounds = [number for number in range(30) for _ in range(4)]
    print(*(number for number, won in zip(rounds, pool.map(play, rounds)) if won))
database.dispose()
"""
)

_COUNT = (
    _BEGIN
    + """
def count(_):
    for _ in range(25):
        with database.write() as connection:
            connection.execute(sa.update(TALLY).values(value=TALLY.c.value + 1))
with ThreadPoolExecutor(4) as pool:
    list(pool.map(count, range(4)))
database.dispose()
"""
)


class TestTypes:
    @pytest.fixture
    def connection(self, database: Database) -> Iterator[sa.Connection]:
        """A transaction in which a table with a column of each of our types exists."""
        with database.write() as connection:
            SAMPLES.create(connection)
            yield connection

    @pytest.mark.parametrize(
        "instant",
        [
            datetime(2026, 2, 28, 23, 59, 59, 999_999, timezone(timedelta(hours=5, minutes=45))),
            datetime(1969, 12, 31, 23, 59, 59, 1, UTC),
            datetime(9999, 12, 31, 23, 59, 59, 999_999, UTC),
        ],
    )
    def test_an_instant_comes_back_as_it_went_in(self, connection: sa.Connection, instant: datetime) -> None:
        """To the microsecond and in UTC, whatever zone it was given in."""
        connection.execute(sa.insert(SAMPLES), [{"at": instant}])
        seen = connection.scalar(sa.select(SAMPLES.c.at))
        assert seen == instant
        assert seen.tzinfo is UTC

    def test_a_naive_datetime_is_refused(self, connection: sa.Connection) -> None:
        """It says nothing about when."""
        naive = datetime(2026, 1, 1)  # noqa: DTZ001 - the point
        with pytest.raises(StatementError, match="naive"):
            connection.execute(sa.insert(SAMPLES), [{"at": naive}])

    def test_microseconds_are_added_and_compared_in_sql(self, connection: sa.Connection) -> None:
        """An integer beside an instant is microseconds on both databases."""
        start = datetime(2026, 1, 1, tzinfo=UTC)
        connection.execute(sa.insert(SAMPLES), [{"at": start}])
        connection.execute(sa.update(SAMPLES).values(at=SAMPLES.c.at + 1_500_000))
        late = sa.select(SAMPLES.c.at).where(SAMPLES.c.at > start + timedelta(seconds=1))
        assert connection.scalar(late) == start + timedelta(seconds=1.5)
        past = sa.select(SAMPLES.c.at).where(SAMPLES.c.at < db_now() - 3_600_000_000)
        assert connection.scalar(past.where(SAMPLES.c.at == datetime.max.replace(tzinfo=UTC))) is None

    @pytest.mark.parametrize(
        "content", [{"b": [1, 2.5, None, True], "a": {"ü": "雪"}, "n": 2**60}, [], "text", 0, False, None]
    )
    def test_json_comes_back_as_it_went_in(self, connection: sa.Connection, content: object) -> None:
        """Nesting, null inside, non-ASCII text and big integers alike; no value stays no value."""
        connection.execute(sa.insert(SAMPLES), [{"body": content}])
        assert connection.scalar(sa.select(SAMPLES.c.body)) == content

    def test_bytes_come_back_as_bytes(self, connection: sa.Connection) -> None:
        """Sealed records hold every byte value."""
        connection.execute(sa.insert(SAMPLES), [{"blob": bytes(range(256))}])
        assert connection.scalar(sa.select(SAMPLES.c.blob)) == bytes(range(256))

    def test_foreign_keys_are_enforced(self, connection: sa.Connection) -> None:
        """SQLite enforces them only where asked to."""
        with pytest.raises(IntegrityError), connection.begin_nested():
            connection.execute(sa.insert(SAMPLES), [{"tally": "nobody"}])


class FarAwayClock(Clock):
    """This machine's clock runs an hour behind."""

    def local(self) -> float:
        return super().local() - 3600


class TestTime:
    def test_the_database_tells_the_time_in_microseconds(self, database: Database) -> None:
        """`db_now()` is the present, on both databases."""
        before = Clock().local()
        with database.read() as connection:
            told = connection.scalar(sa.select(db_now()))
        assert told is not None
        assert before - 1 <= told / 1e6 <= Clock().local() + 1

    def test_time_goes_on_inside_a_transaction(self, database: Database) -> None:
        """A lease must be compared with now, not with when the transaction began."""
        with database.write() as connection:
            first = connection.scalar(sa.select(db_now()))
            threading.Event().wait(0.002)
            assert (connection.scalar(sa.select(db_now())) or 0) > (first or 0)

    def test_the_clock_learns_the_offset_to_the_database(self, make: Maker, postgres_url: str) -> None:
        """A machine whose clock is an hour behind the server's still agrees with it afterwards."""
        clock = FarAwayClock()
        make(postgres_url, clock=clock).sample_clock()
        assert clock.skew == pytest.approx(3600, abs=1)

    def test_sqlite_follows_our_clock(self, make: Maker, tmp_path: Path) -> None:
        """There the machine's clock is the database's, so there is nothing to be ahead of."""
        clock = FarAwayClock()
        database = make(f"sqlite:///{tmp_path}/clock.db", clock=clock)
        database.sample_clock()
        assert clock.skew == pytest.approx(0, abs=1)
        with database.read() as connection:
            assert (connection.scalar(sa.select(db_now())) or 0) / 1e6 == pytest.approx(clock.local(), abs=1)


class TestFork:
    def test_parent_and_child_both_go_on(self, database: Database, tmp_path: Path) -> None:
        """Both have used the database before and use it after, on connections of their own."""
        url = database.url.render_as_string(hide_password=False)
        (said,) = in_processes(1, _FORK, url, tmp_path / "state", "idle")
        assert said.split("\n")[:2] == ["child: done", "parent: 21"]

    def test_a_fork_while_another_thread_writes_spoils_nothing(
        self, database: Database, tmp_path: Path
    ) -> None:
        """The transaction is committed once; where the child cannot go on (SQLite) it says so."""
        url = database.url.render_as_string(hide_password=False)
        (said,) = in_processes(1, _FORK, url, tmp_path / "state", "writing")
        expected = {
            "postgresql": ["child: done", "parent: 22"],
            "sqlite": [
                "child: This process was forked while a thread used the database; start it anew.",
                "parent: 12",
            ],
        }
        assert said.split("\n")[:2] == expected[database.dialect]
        assert value(database) == int(expected[database.dialect][1].split()[1])


_FORK = (
    _BEGIN
    + """
import os, threading
def add_ten():
    for _ in range(10):
        with database.write() as connection:
            connection.execute(sa.update(TALLY).values(value=TALLY.c.value + 1))
inside, forked = threading.Event(), threading.Event()
def write_across_the_fork():
    with database.write() as connection:
        connection.execute(sa.update(TALLY).values(value=TALLY.c.value + 1))
        if sys.argv[3] == "writing":
            inside.set()
            forked.wait()
    inside.set()
writer = threading.Thread(target=write_across_the_fork)
writer.start()
inside.wait()
with database.read() as connection:
    connection.execute(sa.select(TALLY.c.value))
child = os.fork()
if child == 0:
    try:
        add_ten()
        print("child: done", flush=True)
        database.dispose()
    except BaseException as error:
        print("child:", error, flush=True)
    os._exit(0)
forked.set()
writer.join()
if sys.argv[3] == "idle":
    add_ten()
os.waitpid(child, 0)
if sys.argv[3] == "writing":
    add_ten()
    with database.write() as connection:
        connection.execute(sa.update(TALLY).values(value=TALLY.c.value + 1))
with database.read() as connection:
    print(f"parent: {connection.scalar(sa.select(TALLY.c.value))}")
database.dispose()
"""
)


class TestFailure:
    def test_a_full_disk_says_so_and_leaves_what_was(self, file_database: Database, tmp_path: Path) -> None:
        """The operating system refuses to let the file grow: a sentence, and the old data is there."""
        (said,) = in_processes(1, _FILL, f"sqlite:///{tmp_path}/only/this.db", tmp_path / "state")
        assert said.strip() in ("The disk is full.", "The disk fails under the database.")
        assert value(file_database) == 0

    def test_a_read_only_database_says_so(self, database: Database) -> None:
        """Looking still works."""
        switch = {"sqlite": "PRAGMA query_only=ON", "postgresql": "SET TRANSACTION READ ONLY"}

        def write_after_switching() -> None:
            with database.write() as connection:
                connection.exec_driver_sql(switch[database.dialect])
                connection.execute(sa.update(TALLY).values(value=7))

        with pytest.raises(DatabaseUnavailable, match="read-only"):
            write_after_switching()
        database.dispose()
        assert value(database) == 0

    def test_something_that_is_no_database_says_so(self, make: Maker, tmp_path: Path) -> None:
        """A file of another kind is left as it is."""
        file = tmp_path / "letter.db"
        file.write_text("Dear reader, " * 100)
        with pytest.raises(DatabaseUnavailable, match="not an SQLite database"):
            value(make(f"sqlite:///{file}"))
        assert file.read_text() == "Dear reader, " * 100

    def test_a_folder_that_cannot_be_made_says_so(self, make: Maker, tmp_path: Path) -> None:
        """A file stands where the folder should be."""
        (tmp_path / "file").touch()
        with pytest.raises(DatabaseUnavailable, match="cannot be opened"):
            value(make(f"sqlite:///{tmp_path}/file/this.db"))

    def test_a_foreign_writer_that_does_not_end_is_not_waited_for_for_ever(
        self, make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Somebody holds SQLite's own lock, past our queue."""
        monkeypatch.setattr("app.db.sqlite.WAIT", 0.1)
        database = make(f"sqlite:///{tmp_path}/this.db")
        with database.write() as connection:
            METADATA.create_all(connection, tables=[TALLY])
        foreign = sqlite3.connect(tmp_path / "this.db", isolation_level=None)
        foreign.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseUnavailable, match="locked by another writer"):
            add_one(database)
        foreign.close()
        add_one(database)

    def test_a_row_lock_that_does_not_end_is_not_waited_for_for_ever(
        self, make: Maker, postgres_url: str
    ) -> None:
        """The second writer of a row gives up after its patience and the first is not disturbed."""
        database = make(postgres_url)
        with database.write() as connection:
            METADATA.create_all(connection, tables=[TALLY])
            connection.execute(sa.insert(TALLY), [{"name": "one", "value": 0}])
        change = sa.update(TALLY).values(value=TALLY.c.value + 1)
        with database.write() as first:
            first.execute(change)
            with pytest.raises(DatabaseUnavailable, match="locked"), database.write(patience=0.1) as second:
                second.execute(change)
        assert value(database) == 1

    def test_a_statement_that_does_not_end_is_ended(self, make: Maker, postgres_url: str) -> None:
        """The server itself stops what takes longer than the writer's patience."""
        with (
            pytest.raises(DatabaseUnavailable, match="too long"),
            make(postgres_url).write(patience=0.1) as connection,
        ):
            connection.execute(sa.text("SELECT pg_sleep(60)"))

    def test_a_transaction_that_stands_still_is_ended(self, make: Maker, postgres_url: str) -> None:
        """A frozen process does not keep its row locks: the server ends it and the late commit fails."""
        database = make(postgres_url)

        def stand_still() -> None:
            with database.write(patience=0.1) as connection:
                threading.Event().wait(1)
                connection.execute(sa.text("SELECT 1"))

        with pytest.raises(DatabaseUnavailable):
            stand_still()

    def test_a_server_that_accepts_and_then_says_nothing_is_given_up(
        self, make: Maker, own_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The backend is stopped in its tracks; the reader gets an error, the next one an answer."""
        monkeypatch.setattr("app.db.postgresql._Impatient.answer_limit", 0.3)
        database = make(own_server.url())
        with database.read() as connection:
            backend = connection.scalar(sa.text("SELECT pg_backend_pid()"))
            assert backend is not None
            os.kill(backend, signal.SIGSTOP)
            try:
                with pytest.raises(OperationalError):
                    connection.execute(sa.text("SELECT 1"))
            finally:
                os.kill(backend, signal.SIGCONT)
        with database.read() as connection:
            assert connection.scalar(sa.text("SELECT 2")) == 2

    def test_a_single_statement_that_does_not_end_is_ended_on_the_server_as_well(
        self, make: Maker, postgres_url: str
    ) -> None:
        """Given up here, it does not go on waiting there with a connection of its own."""
        database, other = make(postgres_url), make(postgres_url)
        with database.write() as connection:
            METADATA.create_all(connection, tables=[TALLY])
        with other.write() as holder:
            holder.execute(sa.text("LOCK TABLE tally IN ACCESS EXCLUSIVE MODE"))
            with pytest.raises(DatabaseUnavailable), database.single(patience=0.2) as run:
                run("INSERT INTO tally (name, value) VALUES ($1, 1)", ("two",))
            waiting = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
            until(lambda: holder.scalar(waiting) == 0)
        with database.single() as run:
            assert run("INSERT INTO tally (name, value) VALUES ($1, $2::bigint)", ("three", 3)) == 1
        assert (value(database, "two"), value(database, "three")) == (None, 3)

    def test_a_single_statement_of_any_size_arrives(self, make: Maker, postgres_url: str) -> None:
        """Larger than what the socket takes at once: the rest follows when the server has read."""
        database = make(postgres_url)
        with database.write() as connection:
            METADATA.create_all(connection, tables=[TALLY])
        numbers = "{" + ",".join(str(10**15 + number) for number in range(400_000)) + "}"
        statement = "INSERT INTO tally SELECT n, 1 FROM unnest($1::bigint[]) AS n WHERE n % 100 = 0"
        with database.single() as run:
            assert run(statement, (numbers,)) == 4_000

    def test_a_single_statement_after_a_long_rest_uses_a_new_connection(
        self, make: Maker, postgres_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What stood idle may have been dropped by a firewall unnoticed, and would be waited for in vain."""
        database = make(postgres_url)
        with database.write() as connection:
            METADATA.create_all(connection, tables=[TALLY])
        backend = "INSERT INTO tally (name, value) SELECT $1, pg_backend_pid()"
        for name in ("one", "same"):
            with database.single() as run:
                run(backend, (name,))
        monkeypatch.setattr("app.db.engine._IDLE", -1.0)
        with database.single() as run:
            run(backend, ("other",))
        assert value(database, "one") == value(database, "same") != value(database, "other")

    def test_connections_that_died_while_idle_are_replaced_unnoticed(
        self, make: Maker, postgres_url: str
    ) -> None:
        """The server was restarted or a proxy hung up: nobody sees an error."""
        database, other = make(postgres_url), make(postgres_url)
        with database.read() as first, database.read() as second:
            pids = [connection.scalar(sa.text("SELECT pg_backend_pid()")) for connection in (first, second)]
        with other.read() as connection:
            for pid in pids:
                connection.execute(sa.text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
        with database.read() as connection:
            assert connection.scalar(sa.text("SELECT pg_backend_pid()")) not in pids
        with database.write() as connection:
            assert connection.scalar(sa.text("SELECT pg_backend_pid()")) not in pids

    def test_a_server_that_is_gone_says_so_and_is_welcome_back(
        self, make: Maker, own_server: PostgresServer
    ) -> None:
        """Killed in the middle of a transaction, absent, back: nothing half-done, no restart of ours."""
        database = make(own_server.create_database())
        with database.write() as connection:
            METADATA.create_all(connection, tables=[TALLY])
            connection.execute(sa.insert(TALLY), [{"name": "one", "value": 0}])

        def lose_the_server() -> None:
            with database.write() as connection:
                connection.execute(sa.update(TALLY).values(value=7))
                own_server.kill()

        with pytest.raises(DatabaseUnavailable, match="cannot be reached"):
            lose_the_server()
        with pytest.raises(DatabaseUnavailable, match="cannot be reached"):
            value(database)
        own_server.start()
        assert value(database) == 0

    def test_no_sentence_holds_the_password(self, make: Maker, own_server: PostgresServer) -> None:
        """Neither the sentence nor what it was made from, nor the way the object prints."""
        url = own_server.url("nowhere").replace("@", ":hunter2@")
        database = make(url)
        with pytest.raises(DatabaseUnavailable, match="refuses us") as caught:
            value(database)
        told = f"{caught.value} {caught.value.__cause__} {database!r}"
        assert "hunter2" not in told
        assert "nowhere" not in str(caught.value)

    def test_a_pool_without_a_free_connection_says_so(
        self, make: Maker, database_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Instead of waiting until somebody gives one back."""
        for kind in ("sqlite", "postgresql"):
            monkeypatch.setattr(f"app.db.{kind}.WAIT", 0.1)
        database = make(database_url, threads=1)

        def take_all() -> None:
            with ExitStack() as held:
                for _ in range(20):
                    held.enter_context(database.read()).execute(sa.text("SELECT 1"))

        with pytest.raises(DatabaseUnavailable, match="busy"):
            take_all()


_FILL = (
    _BEGIN
    + """
import resource
from app.errors import DatabaseUnavailable
with database.read() as connection:
    connection.execute(sa.select(TALLY.c.value))
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    with database.write() as connection:
        connection.execute(sa.update(TALLY).values(value=7))
        connection.execute(sa.insert(TALLY), [{"name": "x" * 900 + str(n), "value": n} for n in range(2000)])
except DatabaseUnavailable as error:
    print(error.detail)
"""
)


class TestFile:
    def test_file_and_folders_are_for_the_owner_alone(self, file_database: Database, tmp_path: Path) -> None:
        """Whatever the umask: 0700 for folders made, 0600 for database, log and shared memory."""
        add_one(file_database)
        folder = tmp_path / "only"
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
        assert modes == {"this.db": 0o600, "this.db-wal": 0o600, "this.db-shm": 0o600}
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700

    def test_every_commit_is_on_the_disk(self, file_database: Database) -> None:
        """Write-ahead log, flushed at each commit; a deleted record is overwritten."""
        with file_database.read() as connection:
            set_to = {
                name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                for name in ("journal_mode", "synchronous", "secure_delete")
            }
        assert set_to == {"journal_mode": "wal", "synchronous": 2, "secure_delete": 1}

    def test_nothing_is_touched_before_the_first_use(self, make: Maker, tmp_path: Path) -> None:
        """Making a `Database` creates no file."""
        make(f"sqlite:///{tmp_path}/later/this.db")
        assert list(tmp_path.iterdir()) == []

    def test_a_frozen_process_in_the_queue_only_slows_down(
        self, file_database: Database, tmp_path: Path
    ) -> None:
        """Somebody took the gate's lock and went to sleep: SQLite's own lock decides then."""
        (gate,) = (tmp_path / "state").glob("*.gate")
        with gate.open("rb") as frozen:
            fcntl.flock(frozen, fcntl.LOCK_EX)
            add_one(file_database)
        assert value(file_database) == 1

    def test_writers_that_do_not_share_a_gate_are_kept_apart_too(self, make: Maker, tmp_path: Path) -> None:
        """Containers with state folders of their own: nobody changes what a writer has read."""
        url = f"sqlite:///{tmp_path}/this.db"
        both = [make(url, state_dir=tmp_path / name) for name in ("here", "there")]
        with both[0].write() as connection:
            METADATA.create_all(connection, tables=[TALLY])
            connection.execute(sa.insert(TALLY), [{"name": "one", "value": 0}])

        def count_by_reading(number: int) -> None:
            with both[number % 2].write() as connection:
                seen = connection.scalar(sa.select(TALLY.c.value))
                connection.execute(sa.update(TALLY).values(value=(seen or 0) + 1))

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(count_by_reading, range(60)))
        assert value(both[0]) == 60

    def test_writing_works_without_a_gate(self, make: Maker, tmp_path: Path) -> None:
        """The gate's file cannot be made; it is only there to make things faster."""
        (tmp_path / "file").touch()
        database = make(f"sqlite:///{tmp_path}/this.db", state_dir=tmp_path / "file" / "state")
        with database.write() as connection:
            METADATA.create_all(connection, tables=[TALLY])
            connection.execute(sa.insert(TALLY), [{"name": "one", "value": 3}])
        assert value(database) == 3

    def test_a_network_file_system_is_refused(
        self, make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two hosts on one file would destroy it."""
        mounts = tmp_path / "mountinfo"
        mounts.write_text(
            "1 0 0:1 / / rw - ext4 /dev/vda rw\n"
            f"2 1 0:2 / {tmp_path} rw,relatime shared:1 - nfs4 server:/export rw\n"
        )
        monkeypatch.setattr("app.db.sqlite._MOUNTS", mounts)
        with pytest.raises(ConfigurationFault, match="network file system \\(nfs4\\)"):
            value(make(f"sqlite:///{tmp_path}/folder/this.db"))


class TestUrls:
    @pytest.mark.parametrize(
        "url",
        [
            "mysql://root:hunter2@db/x",
            "postgresql+asyncpg://root:hunter2@db/x",
            "sqlite://",
            "sqlite:///:memory:",
            "sqlite:///file:x?mode=memory&uri=true",
            "sqlite://server/share/x.db",
            "hunter2",
            "",
            "postgresql://root:hunter2@db:port/x",
        ],
    )
    def test_what_is_neither_a_local_file_nor_postgresql_is_refused(self, make: Maker, url: str) -> None:
        """With a sentence that names the setting and repeats nothing of a password."""
        with pytest.raises(ConfigurationFault, match="DATABASE_URL") as caught:
            make(url)
        assert "hunter2" not in str(caught.value)

    @pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
    def test_postgresql_goes_by_three_names(self, make: Maker, scheme: str) -> None:
        """Hosters write `postgres://`."""
        assert make(f"{scheme}://somebody@127.0.0.1/x").dialect == "postgresql"


@dataclass(frozen=True)
class Chosen:
    """As much of the settings as opening databases needs."""

    database_url: str
    state_dir: Path
    web_threads: int = 4


class TestTwoDatabases:
    def test_the_trail_has_a_file_of_its_own_beside_the_main_one(self, tmp_path: Path) -> None:
        """Its commits must not wait for the main file's writers."""
        settings = Chosen(f"sqlite:///{tmp_path}/drawbridge.db", tmp_path)
        main, trail = open_databases(settings, Clock())  # type: ignore[arg-type]
        assert trail.url.database == f"{tmp_path}/drawbridge-audit.db"
        with main.write(), trail.write() as connection:
            METADATA.create_all(connection, tables=[TALLY])
        main.dispose()
        trail.dispose()
        assert (tmp_path / "drawbridge-audit.db").exists()

    def test_on_postgresql_the_trail_is_in_the_main_database(self, tmp_path: Path) -> None:
        """One server, one pool."""
        main, trail = open_databases(Chosen("postgresql://x@127.0.0.1/x", tmp_path), Clock())  # type: ignore[arg-type]
        assert trail is main
