"""The epochs: counters by which a process notices within a second that another one changed something.

Whoever changes callers, permissions or keys bumps "access", whoever changes a connection row bumps
"connections", in the transaction of the change and as its first statement, so that writers of one kind take
turns and a counter read as n means that every change up to n is visible. Caches are believed while their
counter stands still. Whoever removes a connection row bumps "removed" as well: of that one no row can tell.

The watch reads them every 250 ms in a thread of its own, so that a request pays nothing; a request that finds
the last look older than 750 ms reads for itself. 750 ms and a slow read stay inside the second that taking
something away may need.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Final, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from app.clock import Clock
from app.db.engine import Database
from app.db.schema import epochs
from app.errors import DatabaseUnavailable
from app.telemetry import Event, log, metrics

__all__ = ["OLDEST", "POLL", "EpochName", "EpochWatch", "Epochs", "bump", "read_counter"]

POLL: Final = 0.25  # seconds
OLDEST: Final = 0.75  # seconds
_LONGEST_LOOK: Final = 2.0  # seconds a request waits for the thread to read

EpochName = Literal["access", "connections", "removed"]

_ALL: Final = sa.select(epochs)
_COUNT: Final = sa.select(epochs.c.value).where(epochs.c.name == sa.bindparam("which"))
_BUMP: Final = (
    sa.update(epochs)
    .where(epochs.c.name == sa.bindparam("which"))
    .values(value=epochs.c.value + 1)
    .returning(epochs.c.value)
)


def bump(connection: Connection, name: EpochName) -> int:
    """Add one to a counter and return it; the first statement of the transaction that changes something.

    Until that transaction ends, other transactions that bump the same counter wait. For "connections" write
    the returned number into `connections.epoch` of each row changed.
    """
    return int(connection.execute(_BUMP, {"which": name}).scalar_one())


def read_counter(connection: Connection, name: EpochName) -> int:
    """Where a counter stands in the caller's transaction, its own bump included."""
    return int(connection.execute(_COUNT, {"which": name}).scalar_one())


@dataclass(frozen=True, slots=True)
class Epochs:
    """The counters as they were at `read_at`, in seconds of `Clock.elapsed()` before the reading began."""

    access: int
    connections: int
    removed: int
    read_at: float


class EpochWatch:
    """The counters, at most 750 ms old; safe for threads, and in a child process after a fork.

    `last` is the newest reading whatever its age, None before the first; it stays when the database goes
    away, so that whoever may go on without it for a while can.
    """

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self.last: Epochs | None = None
        self._wanted = False
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._news = threading.Condition()
        self._outage: str | None = None
        self._lost_at = 0.0  # when the outage began
        self._followers: list[Callable[[Epochs], None]] = []
        _call_after_fork(self)

    def follow(self, follower: Callable[[Epochs], None]) -> None:
        """Have `follower` called with each reading that differs from the last, before anybody else sees it.

        It finds out what has changed. When it raises `DatabaseUnavailable` the reading does not count: a process that
        knew that something has changed, but not what, could believe nothing any more until the database is back.
        """
        self._followers.append(follower)

    def start(self) -> None:
        """Begin to poll in a background thread; starting twice does nothing."""
        self._wanted = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._poll, name="epoch-watch", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it; afterwards `look()` reads for itself."""
        self._wanted = False
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        self._renew()

    @property
    def age(self) -> float:
        """Seconds since the last successful reading began; infinite before the first."""
        last = self.last
        return inf if last is None else self._clock.elapsed() - last.read_at

    def look(self) -> Epochs:
        """The counters, read now if the last reading is older than 750 ms.

        Raises `DatabaseUnavailable`: within 2 s when the thread runs, at once while it knows of the outage.
        """
        fresh = self.glance()
        if fresh is not None:
            return fresh
        if self._thread is not None and self._thread.is_alive():
            return self._ask_thread()
        return self._read()

    def glance(self) -> Epochs | None:
        """The counters if the last reading is fresh enough, without waiting for anything."""
        return self.last if self.age <= OLDEST else None

    def _ask_thread(self) -> Epochs:
        """One reading for all who wait, and none of them hangs on a server that accepts and then says
        nothing."""
        if self._outage is None:  # else it tries again by itself soon enough
            self._wake.set()
        with self._news:
            self._news.wait_for(lambda: self.glance() or self._outage, _LONGEST_LOOK)
        fresh = self.glance()
        if fresh is None:
            raise DatabaseUnavailable(self._outage or "The database does not answer.")
        return fresh

    def _poll(self) -> None:
        while self._wanted:
            last = self.last
            try:
                self._read()
                self._tell_back()
                self._outage = None
            except DatabaseUnavailable as error:
                self._tell_lost(error)
                self._outage = error.detail
            if last is not None:
                metrics.epoch_age_seconds.set(self._clock.elapsed() - last.read_at)
            with self._news:
                self._news.notify_all()
            self._clock.wait(self._wake, POLL)
            self._wake.clear()

    def _tell_lost(self, error: DatabaseUnavailable) -> None:
        """Say once for each outage that there is one; what a request would be told is reason enough."""
        if self._outage is None:
            self._lost_at = self._clock.elapsed()
            log(Event.DATABASE_LOST, database=self._database.dialect, reason=error.detail)

    def _tell_back(self) -> None:
        if self._outage is not None:
            seconds = round(self._clock.elapsed() - self._lost_at, 3)
            log(Event.DATABASE_BACK, database=self._database.dialect, seconds=seconds)

    def _read(self) -> Epochs:
        asked = self._clock.elapsed()
        with self._database.read() as connection:
            values = {row.name: row.value for row in connection.execute(_ALL)}
        found = Epochs(values["access"], values["connections"], values["removed"], asked)
        if self.last is None or (found.access, found.connections) != (
            self.last.access,
            self.last.connections,
        ):
            for follower in self._followers:
                follower(found)
        if self.last is None or self.last.read_at <= asked:  # a slow read must not undo a newer one
            self.last = found
        return found

    def _renew(self) -> None:
        self._thread = None
        self._wake = threading.Event()
        self._news = threading.Condition()
        self._outage = None

    def after_fork(self) -> None:
        """Start the thread again, which a child process does not inherit; called in the child by itself."""
        self._renew()
        if self._wanted:
            self.start()


def _call_after_fork(watch: EpochWatch) -> None:
    reference = weakref.ref(watch)

    def in_child() -> None:
        survivor = reference()
        if survivor is not None:
            survivor.after_fork()

    os.register_at_fork(after_in_child=in_child)
