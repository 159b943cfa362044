"""What `engine` must know of SQLite: how to open the file, how writers queue, what its errors mean."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final, Literal, cast
from weakref import WeakSet

import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.pool import QueuePool

from app.clock import Clock
from app.errors import ConfigurationFault, DatabaseUnavailable

__all__ = ["Sqlite"]

WAIT: Final = 5.0  # seconds for a free connection or SQLite's own lock
_GATE_POLLS: Final = 5000  # of about 0.2 ms: a second, then SQLite's own waiting takes over
_GATE_PAUSE: Final = 0.0001
_MOUNTS: Final = Path("/proc/self/mountinfo")  # proc(5); absent on macOS
_NETWORK_FILESYSTEMS: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ncpfs", "fuse.sshfs"}
)


class _Raw(sqlite3.Connection):
    """A connection that can be counted without being kept open."""

    __slots__ = ("__weakref__",)


class Sqlite:
    """A local file in WAL mode, every commit on the disk before it returns (synchronous=FULL)."""

    name: Literal["sqlite", "postgresql"] = "sqlite"

    def __init__(self, url: URL, clock: Clock, *, state_dir: Path, threads: int) -> None:
        self._url = url
        self._path = Path(url.database or "")
        self._clock = clock
        self._threads = threads
        self._place_known_good = False
        mark = hashlib.sha256(os.fsencode(self._path)).hexdigest()[:8]
        self._gate_file = state_dir / f"{self._path.name}-{mark}.gate"
        self._gate = _Gate(self._gate_file)
        self._opening = threading.Lock()
        self._open: WeakSet[_Raw] = WeakSet()
        self._haunted = False

    def engine(self) -> Engine:
        engine = sa.create_engine(
            self._url,
            poolclass=QueuePool,
            pool_size=self._threads,  # an open file is cheap
            max_overflow=self._threads,
            pool_timeout=WAIT,
            hide_parameters=True,
        )
        event.listen(engine, "do_connect", lambda *_: self._connect())
        event.listen(engine, "close", lambda raw, _record: self._open.discard(raw))
        return engine

    def begin(self, connection: Connection, _patience: float) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    def gate(self, patience: float) -> AbstractContextManager[None]:
        return self._gate.held(patience)

    def take_turns(self, connection: Connection, name: str) -> None:
        """Nothing to wait for: who has begun to write is alone."""

    def insist_unbroken(self, connection: Connection) -> None:
        """Nothing to ask: SQLite undoes a failed statement alone and the transaction lives on."""

    def send(
        self,
        connection: Connection,
        _patience: float,
        statement: str,
        values: Sequence[str | int | bytes | None],
    ) -> int:
        """Run one statement outside any transaction and return how many rows it touched; raises SQLAlchemy's errors."""
        raw = cast(_Raw, connection.connection.dbapi_connection)
        try:
            return raw.execute(statement, values).rowcount
        except sqlite3.IntegrityError as error:
            raise exc.IntegrityError(None, None, error) from error
        except sqlite3.Error as error:
            raise exc.OperationalError(None, None, error) from error

    def explain(self, error: exc.DBAPIError) -> str | None:
        code = getattr(error.orig, "sqlite_errorcode", None)
        return (
            None if code is None else _SQLITE_SENTENCES.get(code & 0xFF)
        )  # the low byte is the primary code

    def before_fork(self, engine: Engine) -> None:
        """Close what is idle, for SQLite keeps its locks per process and a child would believe to hold them
        too.

        What another thread is using cannot be closed; then the child has no use of this database (sqlite.org/
        howtocorrupt.html §2.6). Nothing is opened until the fork is over.
        """
        self._opening.acquire()
        engine.dispose()

    def after_fork(self, *, child: bool) -> None:
        if not child:
            self._opening.release()
            return
        self._opening = threading.Lock()
        self._haunted = bool(self._open)
        # Its lock may be held by a thread that does not exist here, and an flock is shared with the parent.
        self._gate = _Gate(self._gate_file)

    def _connect(self) -> _Raw:
        with self._opening:
            if self._haunted:
                raise DatabaseUnavailable(
                    "This process was forked while a thread used the database; start it anew."
                )
            self._prepare_place()
            raw = sqlite3.connect(
                self._path, timeout=WAIT, isolation_level=None, check_same_thread=False, factory=_Raw
            )
            self._open.add(raw)
        try:
            _enter_wal(raw)
            for pragma in _PRAGMAS:
                raw.execute(f"PRAGMA {pragma}")
        except BaseException:
            self._close(raw)
            raise
        raw.create_function("drawbridge_now", 0, lambda: int(self._clock.local() * 1_000_000))
        return raw

    def _close(self, raw: _Raw) -> None:
        raw.close()
        self._open.discard(raw)

    def _prepare_place(self) -> None:
        """Make file and folders for this user alone; SQLite gives -wal and -shm the mode of the file."""
        if self._place_known_good:
            return
        try:
            _make_folder(self._path.parent)
            _refuse_network_filesystem(self._path)
            os.close(os.open(self._path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise DatabaseUnavailable(f"The database file cannot be opened: {error.strerror}.") from error
        self._place_known_good = True


_PRAGMAS: Final = (
    "synchronous=FULL",
    "foreign_keys=ON",
    "secure_delete=ON",  # a deleted sealed record is overwritten, not just unlinked
    "temp_store=MEMORY",
    "journal_size_limit=67108864",  # 64 MiB: what a burst made of the -wal file is given back
)

_SQLITE_SENTENCES: Final = {
    sqlite3.SQLITE_PERM: "The database file may not be used by this user.",
    sqlite3.SQLITE_BUSY: "The database stayed locked by another writer.",
    sqlite3.SQLITE_LOCKED: "The database stayed locked by another writer.",
    sqlite3.SQLITE_NOMEM: "There is no memory left for the database.",
    sqlite3.SQLITE_READONLY: "The database is read-only.",
    sqlite3.SQLITE_IOERR: "The disk fails under the database.",
    sqlite3.SQLITE_CORRUPT: "The database file is damaged.",
    sqlite3.SQLITE_FULL: "The disk is full.",
    sqlite3.SQLITE_CANTOPEN: "The database file cannot be opened.",
    sqlite3.SQLITE_PROTOCOL: "The database stayed locked by another writer.",
    sqlite3.SQLITE_NOTADB: "The database file is not an SQLite database.",
}


class _Gate:
    """The queue in front of SQLite's write lock.

    SQLite waits for its lock by sleeping and trying again: 16 writing threads got 3000 commits a second with
    a wait of up to 0.7 s and 5000 with 0.02 s when they queue here first. A thread lock alone let one of four
    processes make 12 commits while the others made 4000, hence the lock on a file. It is asked for by
    polling, because a blocking flock has no time limit and its holder may be frozen; after a second SQLite's
    own waiting takes over. The gate only makes things faster: where the file cannot be made, or processes
    have different state folders, SQLite's lock alone keeps writers apart.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._turn = threading.Lock()
        self._owner: int | None = None
        self._descriptor: int | None = None
        self._pause = threading.Lock()  # never released; waiting for it is the most exact short sleep
        self._pause.acquire()

    @contextmanager
    def held(self, patience: float) -> Iterator[None]:
        me = threading.get_ident()
        if self._owner == me:
            raise RuntimeError("write() inside write() on one database would wait for itself")
        if not self._turn.acquire(timeout=patience):
            raise DatabaseUnavailable("Too many writers wait for the database.")
        self._owner = me
        locked = self._lock_file()
        try:
            yield
        finally:
            if locked is not None:
                fcntl.flock(locked, fcntl.LOCK_UN)
            self._owner = None
            self._turn.release()

    def _lock_file(self) -> int | None:
        try:
            if self._descriptor is None:
                self._descriptor = self._open()
            for _ in range(_GATE_POLLS):
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return self._descriptor
                self._pause.acquire(timeout=_GATE_PAUSE)
        except OSError:
            return None  # a full or read-only disk: the write itself will say so, in its own words
        return None

    def _open(self) -> int:
        _make_folder(self._file.parent)
        return os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


def _enter_wal(raw: sqlite3.Connection) -> None:
    """Several processes starting at once may all try the switch, and SQLite does not wait there by itself."""
    pause, tries = threading.Event(), int(WAIT / 0.01)
    while True:
        try:
            raw.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            tries -= 1
            if not tries or error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            pause.wait(0.01)
        else:
            return


def _make_folder(folder: Path) -> None:
    """Like mkdir -p, but every folder it makes is for this user alone."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)


def _refuse_network_filesystem(file: Path) -> None:
    """WAL needs memory shared between all processes that use the file (sqlite.org/wal.html, "Overview")."""
    if not _MOUNTS.exists():
        return
    kinds = {
        fields[4]: fields[fields.index("-") + 1]
        for fields in (line.split() for line in _MOUNTS.read_text().splitlines())
    }
    home = file.resolve().parent
    kind = next((kinds[str(place)] for place in (home, *home.parents) if str(place) in kinds), None)
    if kind in _NETWORK_FILESYSTEMS:
        raise ConfigurationFault(
            [f"DATABASE_URL names a file on a network file system ({kind}); use a local disk or PostgreSQL."]
        )
