"""The installation itself: its id, its active KEK, the key of its audit chain, and which processes are alive.

Made once, in the database that `migrate` brought up; every start checks by the canaries that the keyring opens the data.
"""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection as Transaction
from sqlalchemy.exc import IntegrityError

from app.access.belief import EpochSource
from app.broker.store import new_id
from app.clock import Clock
from app.crypto.envelope import Place, check_canary, make_canary, open_, seal
from app.crypto.keyring import Keyring
from app.db.engine import Database
from app.db.schema import installation, keks, processes
from app.errors import DatabaseMismatch, DatabaseUnavailable
from app.telemetry import Event, log

__all__ = [
    "ActiveKek",
    "Presence",
    "ProcessRow",
    "add_kek",
    "alive",
    "audit_key_place",
    "found_installation",
    "unlock",
]

# A process that has not been seen for so long counts as gone; it says it lives every ten seconds.
ALIVE: Final = timedelta(seconds=30)


def audit_key_place() -> Place:
    """Where the key of the audit chain is sealed to."""
    return Place(table="installation", column="audit_key", row_id="1", generation=0)


def found_installation(database: Database, keyring: Keyring, clock: Clock, *, public_url: str) -> None:
    """Make the installation's row and first KEK if they are not there; safe when several processes try."""
    with database.read() as transaction:
        if transaction.execute(sa.select(installation.c.id)).one_or_none() is not None:
            return
    kek = keyring.get(keyring.active_hint)
    now = clock.now()
    audit_key = seal(secrets.token_bytes(32), audit_key_place(), kek=kek)
    row = {"one": 1, "id": new_id(), "public_url": public_url, "active_kek": kek.id, "created_at": now}
    try:
        with database.write() as transaction:
            transaction.execute(sa.insert(installation).values(**row, audit_key=audit_key, kek_id=kek.id))
            add_kek(transaction, keyring, kek.id, now=now)
    except IntegrityError:
        return  # another process founded it at the same moment


def add_kek(transaction: Transaction, keyring: Keyring, kek_id: str, *, now: datetime) -> None:
    """Make a KEK of the keyring known to the database, with its canary."""
    transaction.execute(
        sa.insert(keks).values(id=kek_id, canary=make_canary(keyring.get(kek_id)), created_at=now)
    )


def unlock(database: Database, keyring: Keyring) -> bytes:
    """Prove that the keyring opens this database's data and return the key of the audit chain.

    Raises `KeyringFault` naming the KEK that is missing or different, `DatabaseMismatch` when there is no installation.
    """
    with database.read() as transaction:
        row = transaction.execute(
            sa.select(installation.c.active_kek, installation.c.audit_key)
        ).one_or_none()
        known = transaction.execute(
            sa.select(keks.c.id, keks.c.canary).where(keks.c.retired_at.is_(None))
        ).all()
    if row is None:
        raise DatabaseMismatch("The database holds no installation; run: drawbridge migrate.")
    for kek in known:
        check_canary(kek.canary, keyring)
    return open_(row.audit_key, audit_key_place(), keyring)


class ActiveKek:
    """The KEK new records are sealed under, as the database says; believed while the `access` epoch stands or the
    database is away."""

    def __init__(self, database: Database, epochs: EpochSource) -> None:
        self._database = database
        self._epochs = epochs
        self._known: tuple[int, str] | None = None

    def __call__(self) -> str:
        try:
            epoch = self._epochs.look().access
            if self._known is not None and self._known[0] == epoch:
                return self._known[1]
            with self._database.read() as transaction:
                active = str(transaction.execute(sa.select(installation.c.active_kek)).scalar_one())
        except DatabaseUnavailable:
            # A token just received must be sealed for the journal now or is lost. A KEK is not retired while a refresh
            # is under way, so the one known last still opens what it seals.
            if self._known is None:
                raise
            return self._known[1]
        self._known = (epoch, active)
        return active


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRow:
    """A living process of this installation."""

    id: str
    host: str
    kind: str
    pid: int
    version: str
    kek_ids: list[str]
    skew_seconds: float
    started_at: datetime
    seen_at: datetime


class Presence:
    """This process's line in the list of living processes."""

    def __init__(
        self, database: Database, keyring: Keyring, clock: Clock, *, kind: str, version: str, process_id: str
    ) -> None:
        self._database = database
        self._keyring = keyring
        self._clock = clock
        self._kind = kind
        self._version = version
        self._id = process_id

    def enter(self) -> None:
        """Put the process on the list, and take those off that died without a word."""
        now = self._clock.now()
        with self._database.write() as transaction:
            transaction.execute(sa.delete(processes).where(processes.c.seen_at < now - timedelta(days=1)))
            transaction.execute(
                sa.insert(processes).values(
                    id=self._id,
                    host=socket.gethostname(),
                    kind=self._kind,
                    pid=os.getpid(),
                    version=self._version,
                    kek_ids=sorted(self._keyring.ids),
                    skew_seconds=self._clock.skew,
                    started_at=now,
                    seen_at=now,
                )
            )
        log(Event.STARTED, kind=self._kind, version=self._version)

    def beat(self) -> None:
        """Say that it lives and which KEKs it holds; enters again if it was taken for dead."""
        self._keyring.reload()
        with self._database.write() as transaction:
            seen = transaction.execute(
                sa.update(processes)
                .where(processes.c.id == self._id)
                .values(
                    seen_at=self._clock.now(),
                    skew_seconds=self._clock.skew,
                    kek_ids=sorted(self._keyring.ids),
                )
            )
        if seen.rowcount == 0:
            self.enter()

    def leave(self) -> None:
        """Take the process off the list."""
        with self._database.write() as transaction:
            transaction.execute(sa.delete(processes).where(processes.c.id == self._id))


def alive(database: Database, *, now: datetime) -> list[ProcessRow]:
    """The processes seen within the last 30 seconds."""
    query = sa.select(processes).where(processes.c.seen_at >= now - ALIVE).order_by(processes.c.started_at)
    with database.read() as transaction:
        return [ProcessRow(**row._mapping) for row in transaction.execute(query)]
