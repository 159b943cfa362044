"""The real `Database` over a real SQLite file in WAL mode, stopping at each statement.

The file stands for the server that many hosts share: its clock is its own, a writer that is parked inside a transaction
keeps the lock, and the others wait in virtual time until their patience is over.
"""

from __future__ import annotations

import sqlite3
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import URL, Engine
from sqlalchemy.pool import QueuePool

from app.clock import Clock
from app.db.sqlite import WAIT, Sqlite
from tests.simulation.schedule import Died

if TYPE_CHECKING:
    from tests.simulation.host import Process

__all__ = ["Raw", "SimulatedSqlite", "database_fault"]

_COMPILED: Final = 2000

_Cursor = sqlite3.Cursor


class SimulatedSqlite(Sqlite):
    """What `Database` takes for SQLite: its words and errors are the product's, its waiting is the scheduler's."""

    _dialects: dict[str, Any] = {}  # noqa: RUF012 - one for the whole process: compiling statements is what costs

    def __init__(self, url: URL, clock: Clock, *, process: Process) -> None:
        self._url = url
        self._clock = clock
        self._process = process

    def engine(self) -> Engine:
        """An engine of its own pool; dialect and compiled statements are shared by all hosts and schedules."""
        if not self._dialects:
            first = sa.create_engine("sqlite://")
            first.connect().close()
            self._dialects |= {"dialect": first.dialect, "compiled": first._compiled_cache}
        dialect = self._dialects["dialect"]
        creator: Any = self._connect_raw
        pool = QueuePool(creator, pool_size=60, max_overflow=60, timeout=0, dialect=dialect)
        engine = Engine(pool, dialect, self._url, hide_parameters=True, query_cache_size=_COMPILED)
        engine._compiled_cache = self._dialects["compiled"]
        return engine

    def gate(self, _patience: float) -> AbstractContextManager[None]:
        """The queue in front of the lock only makes things faster; here everybody meets at SQLite's own lock."""
        return nullcontext()

    def before_fork(self, engine: Engine) -> None:
        """Nobody forks here."""

    def after_fork(self, *, child: bool) -> None:
        """Nobody forks here."""

    def _connect_raw(self) -> Raw:
        return open_raw(Path(self._url.database or ""), self._process)


def open_raw(path: Path, process: Process) -> Raw:
    """A connection of a process to the file."""
    if process.dead:
        raise Died
    process.world.database_weather(process, "db.connect")
    raw: Raw = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False, factory=Raw)
    raw.process = process
    raw.writing = False
    process.raws.append(raw)
    for pragma in ("synchronous=OFF", "foreign_keys=ON"):
        sqlite3.Connection.execute(raw, f"PRAGMA {pragma}")
    world = process.world
    raw.create_function("drawbridge_now", 0, lambda: int(world.database_time() * 1_000_000))
    return raw


class Raw(sqlite3.Connection):
    """A driver connection whose every call is a point of the schedule."""

    process: Process
    writing: bool

    def cursor(self, *_: Any) -> Any:
        """A cursor that stops before each statement."""
        if self.process.dead:
            raise Died
        return super().cursor(_Stopping)

    def begin(self, cursor: _Stopping) -> None:
        """Take the write lock, waiting for it as long as the product would."""
        world = self.process.world
        task = world.scheduler.current
        assert task is not None
        if task.facts.get("writes"):
            world.checks.violated("P1", "write() inside write() of the same thread")
        until = world.scheduler.now + WAIT
        while True:
            try:
                _Cursor.execute(cursor, "BEGIN IMMEDIATE")
                break
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or world.scheduler.now >= until:
                    raise
            world.scheduler.note("db.busy")
            world.scheduler.wait(world.written, until - world.scheduler.now)
        self.writing = True
        task.facts["writes"] = self

    def commit(self) -> None:
        """Commit, or be told that it failed, or commit and be told that it failed."""
        process = self.process
        if process.dead:
            raise Died
        if not self.writing:
            return
        world = process.world
        world.scheduler.point("db.commit")
        refused = world.database_weather(process, "db.commit")
        super().commit()
        self._over()
        world.checks.committed(process)
        if refused:
            world.scheduler.note("db.commit unknown")
            raise database_fault()
        world.scheduler.point("db.committed")

    def rollback(self) -> None:
        """Undo; nothing is left to undo for a dead process."""
        if self.process.dead:
            return
        super().rollback()
        self._over()

    def close(self) -> None:
        """Close; the connections of a dead process are closed already."""
        if self.process.dead:
            return
        super().close()
        if self in self.process.raws:
            self.process.raws.remove(self)

    def abandon(self) -> None:
        """What the server does when the process at the other end is gone."""
        sqlite3.Connection.rollback(self)
        sqlite3.Connection.close(self)

    def _over(self) -> None:
        if not self.writing:
            return
        self.writing = False
        world = self.process.world
        for task in world.scheduler.tasks_of(self.process):
            if task.facts.get("writes") is self:
                del task.facts["writes"]
        world.written.fire()


class _Stopping(sqlite3.Cursor):
    """A cursor that stops before each statement."""

    def execute(self, sql: str, parameters: Any = ()) -> Any:
        """Run one statement of this process, unless the database is out of its reach."""
        raw = self.connection
        assert isinstance(raw, Raw)
        world = raw.process.world
        begins = sql == "BEGIN IMMEDIATE"
        kind = "db.begin" if begins else "db.statement"
        world.scheduler.point(kind, sql[:24])
        world.database_weather(raw.process, kind)
        if begins:
            raw.begin(self)
            return self
        return super().execute(sql, parameters)

    def executemany(self, sql: str, parameters: Any) -> Any:
        """The same for many rows."""
        raw = self.connection
        assert isinstance(raw, Raw)
        raw.process.world.scheduler.point("db.statement", sql[:24])
        raw.process.world.database_weather(raw.process, "db.statement")
        return super().executemany(sql, parameters)


def database_fault() -> sqlite3.OperationalError:
    """What the driver raises when the database fails."""
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR
    error.sqlite_errorname = "SQLITE_IOERR"
    return error
