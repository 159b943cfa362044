"""One `Database` over SQLite and PostgreSQL; only its neighbours `sqlite` and `postgresql` know one from the
other.

Both drivers run in autocommit and every transaction is begun in words: `write()` sends BEGIN (IMMEDIATE on
SQLite, so that two writers queue instead of failing half-way), `read()` sends none, so each statement sees
what is committed when it starts. That is READ COMMITTED on both, without the two extra round trips a driver
would spend on a transaction around each SELECT.

Nothing waits for ever: SQLite's lock 5 s, PostgreSQL's connect 5 s, its locks 4 s, its statements 5 s, its
answer 15 s. What goes wrong below becomes one `DatabaseUnavailable` here; only `IntegrityError` and mistakes
in our SQL pass through.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, Protocol

import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.engine import URL, Connection, Engine

from app.clock import Clock
from app.db.types import db_now
from app.errors import ConfigurationFault, DatabaseUnavailable
from app.telemetry import Event, log, metrics

if TYPE_CHECKING:
    from app.settings import Settings

__all__ = ["PATIENCE", "Database", "open_databases"]

_IDLE: Final = 10.0  # seconds after which a kept connection may have been dropped unnoticed
_SLOW: Final = 1.0  # seconds; a write that took longer, its wait for other writers included, is told
_LARGEST_SKEW: Final = 5.0  # seconds; far below any token's life, far above any clock that is kept
PATIENCE: Final = 5.0  # seconds a write waits for its turn; a web request must be answered, if only with 503

_NOW: Final = sa.select(db_now())

_POSTGRESQL_SCHEMES: Final = frozenset({"postgres", "postgresql", "postgresql+psycopg"})
_SQLITE_SCHEMES: Final = frozenset({"sqlite", "sqlite+pysqlite"})

Dialect = Literal["sqlite", "postgresql"]
Value = str | int | bytes | None
Run = Callable[[str, Sequence[Value]], int]


def open_databases(settings: Settings, clock: Clock) -> tuple[Database, Database]:
    """The main database and the audit trail's: the same object on PostgreSQL, a file beside it on SQLite."""
    main = Database(
        settings.database_url, clock=clock, state_dir=settings.state_dir, threads=settings.web_threads
    )
    if main.dialect == "postgresql":
        return main, main
    file = Path(main.url.database or "")
    url = main.url.set(database=str(file.with_name(f"{file.stem}-audit.db")))
    return main, Database(url, clock=clock, state_dir=settings.state_dir, threads=settings.web_threads)


class Database:
    """A pool of connections to one database; safe for threads, and in a child process after a fork.

    Making one touches neither disk nor network: the first use connects, and creates an SQLite file that does
    not exist. `threads` is how many threads of this process will want a connection at the same time. Raises
    `ConfigurationFault` for a URL that is not a local SQLite file or a PostgreSQL server.
    """

    def __init__(self, url: str | URL, *, clock: Clock, state_dir: Path, threads: int = 32) -> None:
        self.url = _understood(url)
        self._clock = clock
        self._kind = _kind_for(self.url, clock, state_dir, threads)
        self.dialect: Dialect = self._kind.name
        self._engine = self._kind.engine()
        self._reader = self._engine.execution_options()
        event.listen(self._reader, "before_execute", _refuse_writing)
        self._kept: deque[tuple[Connection, float]] = deque()
        self._inherited: list[object] = []
        self._skewed = False  # the log knows that the clocks disagree
        _follow_forks(self)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection for looking: no transaction, each statement sees what is committed when it starts.

        Raises `DatabaseUnavailable`. A statement that changes something is a mistake of ours and refused.
        """
        try:
            with self._reader.connect() as connection:
                yield connection
        except (exc.DBAPIError, exc.TimeoutError) as error:
            self._raise_in_our_words(error)

    @contextmanager
    def write(self, *, patience: float = PATIENCE) -> Iterator[Connection]:
        """One transaction: committed when the block ends, rolled back when it raises.

        Keep it short, and never inside another one of the same thread. `patience` is the seconds to wait for
        locks, and on PostgreSQL the longest a statement may take. A statement that may fail on a constraint
        and be survived belongs into `connection.begin_nested()`. Raises `DatabaseUnavailable`; when that
        comes out of the commit, whether it was stored is unknown. Lets `sqlalchemy.exc.IntegrityError`
        through.
        """
        began = self._clock.elapsed()
        try:
            with self._kind.gate(patience), self._engine.connect() as connection, connection.begin():
                self._kind.begin(connection, patience)
                yield connection
                self._kind.insist_unbroken(connection)
        except (exc.DBAPIError, exc.TimeoutError) as error:
            self._raise_in_our_words(error)
        self._count_write(self._clock.elapsed() - began)

    @contextmanager
    def single(self, *, patience: float = PATIENCE) -> Iterator[Run]:
        """Gives a function that runs exactly one statement, which is a transaction of its own, and counts its rows.

        One round trip instead of four, past SQLAlchemy, with the placeholders of the database itself (`?`, or `$1` and
        following), on a connection that is kept open for the next such statement outside the pool.

        Raises `DatabaseUnavailable`; whether the statement was stored is then unknown. Lets
        `sqlalchemy.exc.IntegrityError` through. `patience` is the seconds to wait for one's turn, and on PostgreSQL the
        longest the statement may take.
        """
        connection = None
        try:
            with self._kind.gate(patience):
                connection = self._take_kept() or self._engine.connect()
                yield partial(self._kind.send, connection, patience)
        except (exc.DBAPIError, exc.TimeoutError) as error:
            if connection is not None:
                connection.close()
            self._raise_in_our_words(error)
        except BaseException:
            if connection is not None:
                connection.close()
            raise
        else:
            # Kept for the next one: taking a connection out of the pool costs more than such a statement.
            self._kept.append((connection, self._clock.elapsed()))

    def _take_kept(self) -> Connection | None:
        """The kept connection; one that stood idle is given up."""
        try:
            connection, used_at = self._kept.pop()
        except IndexError:
            return None
        if self._clock.elapsed() - used_at < _IDLE:
            return connection
        connection.invalidate()  # a firewall may have dropped it unnoticed
        connection.close()
        return None

    def take_turns(self, connection: Connection, name: str) -> None:
        """Inside `write()`: wait until no other transaction that takes turns under this name is running.

        On PostgreSQL a lock that ends with the transaction, so it works through a transaction pooler; on
        SQLite there is never a second writer.
        """
        self._kind.take_turns(connection, name)

    def sample_clock(self) -> None:
        """Measure the database's clock against this machine's and tell our `Clock`."""
        with self.read() as connection:
            connection.scalar(_NOW)  # connecting must not count as round trip
            asked = self._clock.local()
            microseconds = connection.scalar(_NOW)
            answered = self._clock.local()
        self._clock.agree(database=int(microseconds or 0) / 1e6, asked=asked, answered=answered)
        self._tell_skew(self._clock.skew)

    def dispose(self) -> None:
        """Close the idle connections; the next use opens new ones."""
        self._close_kept()
        self._engine.dispose()

    def before_fork(self) -> None:
        """Leave nothing open that a child could spoil; called by itself."""
        if self.dialect == "sqlite":
            self._close_kept()
        self._kind.before_fork(self._engine)

    def after_fork(self, *, child: bool) -> None:
        """Go on in the parent, and in the child with connections of its own; called by itself."""
        if child:
            # Freeing the parent's connections would speak on its sockets, so they are kept instead.
            self._inherited += [self._engine.pool, self._kept]
            self._kept = deque()
            self._engine.dispose(close=False)
        self._kind.after_fork(child=child)

    def _close_kept(self) -> None:
        with suppress(IndexError):
            while True:
                self._kept.pop()[0].close()

    def _count_write(self, seconds: float) -> None:
        metrics.transaction_seconds.labels(self.dialect).observe(seconds)
        if seconds > _SLOW:
            log(Event.DATABASE_SLOW, database=self.dialect, seconds=round(seconds, 3))

    def _tell_skew(self, seconds: float) -> None:
        """The level each time, and a line when the clocks begin to disagree."""
        metrics.clock_skew_seconds.set(abs(seconds))
        skewed = abs(seconds) > _LARGEST_SKEW
        if skewed and not self._skewed:
            log(Event.CLOCK_SKEWED, seconds=round(seconds, 3))
        self._skewed = skewed

    def _raise_in_our_words(self, error: exc.SQLAlchemyError) -> NoReturn:
        sentence: str | None = "All connections to the database are busy."
        if isinstance(error, exc.DBAPIError):
            sentence = self._kind.explain(error)
        if sentence is None:
            raise error
        metrics.database_faults.labels(self.dialect).inc()
        raise DatabaseUnavailable(sentence) from error

    def __repr__(self) -> str:
        return f"Database({self.url.render_as_string(hide_password=True)!r})"


class _Kind(Protocol):
    """What differs between the two databases."""

    name: Dialect

    def engine(self) -> Engine: ...

    def begin(self, connection: Connection, patience: float) -> None: ...

    def gate(self, patience: float) -> AbstractContextManager[None]: ...

    def take_turns(self, connection: Connection, name: str) -> None: ...

    def insist_unbroken(self, connection: Connection) -> None: ...

    def send(
        self, connection: Connection, patience: float, statement: str, values: Sequence[Value]
    ) -> int: ...

    def explain(self, error: exc.DBAPIError) -> str | None: ...

    def before_fork(self, engine: Engine) -> None: ...

    def after_fork(self, *, child: bool) -> None: ...


def _kind_for(url: URL, clock: Clock, state_dir: Path, threads: int) -> _Kind:
    """Imported here, so that nobody pays the memory of the driver not in use."""
    if url.get_backend_name() == "sqlite":
        from app.db.sqlite import Sqlite

        return Sqlite(url, clock, state_dir=state_dir, threads=threads)
    from app.db.postgresql import Postgresql

    return Postgresql(url, clock, threads=threads)


def _understood(url: str | URL) -> URL:
    """Parse the URL; its text is never repeated in a fault, for it may hold a password."""
    try:
        parsed = sa.make_url(url)
    except (exc.ArgumentError, ValueError):
        raise ConfigurationFault(
            ["DATABASE_URL is not a URL like sqlite:///var/drawbridge.db or postgresql://…."]
        ) from None
    if parsed.drivername in _POSTGRESQL_SCHEMES:
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in _SQLITE_SCHEMES:
        raise ConfigurationFault(["DATABASE_URL must begin with sqlite:/// or postgresql://."])
    if parsed.host or parsed.query or not parsed.database or parsed.database.startswith((":", "file:")):
        raise ConfigurationFault(
            ["DATABASE_URL must name a local file for SQLite, like sqlite:///var/drawbridge.db."]
        )
    return parsed.set(drivername="sqlite+pysqlite", database=str(Path(parsed.database).absolute()))


def _refuse_writing(_connection: Connection, element: Any, *_: Any) -> None:
    if getattr(element, "is_dml", False) or getattr(element, "is_ddl", False):
        raise RuntimeError("a statement that changes the database belongs into write()")


def _follow_forks(database: Database) -> None:
    reference = weakref.ref(database)

    def tell(what: Callable[[Database], None]) -> None:
        survivor = reference()
        if survivor is not None:
            what(survivor)

    os.register_at_fork(
        before=lambda: tell(Database.before_fork),
        after_in_parent=lambda: tell(lambda survivor: survivor.after_fork(child=False)),
        after_in_child=lambda: tell(lambda survivor: survivor.after_fork(child=True)),
    )
