"""Changing the key encryption keys while everything runs.

The database says which KEK is active. `rotate` makes another one active and re-wraps every record's data key under it, row
by row, each write fenced on generation and old KEK, so a refresh that comes in between simply wins. It can be stopped and
begun again: what is left is what still names another KEK. `retire` gives a KEK up, and refuses while anything names it.

A record that does not open cannot be re-wrapped. It holds up none of the others: it is named at the end and goes on naming
its KEK, which therefore stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa

from app.access.audit import Entry, Trail
from app.broker.installation import ProcessRow, add_kek, alive, audit_key_place
from app.broker.journal import Journal
from app.broker.store import place_of
from app.clock import Clock
from app.crypto.envelope import Place, rewrap
from app.crypto.keyring import Keyring
from app.db.engine import Database
from app.db.epoch import bump
from app.db.schema import apps, connections, handshakes, installation, keks, signing_keys
from app.errors import Conflict, InvalidRequest, KeyringFault, Unopenable
from app.telemetry import Event, log

__all__ = ["KekRow", "Keys", "Progress"]

_BATCH: Final = 200
# Every process notices the new active KEK within a second; until then one may still seal under the old.
_NOTICE: Final = 1.0
# Processes read a changed keyring file at each heartbeat, every ten seconds.
_PATIENCE: Final = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KekRow:
    """A KEK the database knows; `records` are sealed under it."""

    id: str
    active: bool
    held: bool
    records: int
    created_at: datetime
    retired_at: datetime | None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a rotation is; `unopenable` names the records that stay under the key they are under ("connection acme").

    They are told with the last step only.
    """

    done: int
    total: int
    unopenable: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Holder:
    """A table with a sealed column: how its rows are found, placed and fenced."""

    table: sa.Table
    column: str
    key: str
    fence: str | None  # the column that moves whenever the record is sealed anew
    place: Callable[[Any], Place]
    title: sa.ColumnElement[str]  # what people call a record


@dataclass(frozen=True, slots=True)
class _Batch:
    """Some rows in the order of their keys: how many there were, how many were re-wrapped, and which do not open."""

    rows: int
    moved: int
    unopenable: tuple[str, ...]


_HOLDERS: Final = (
    _Holder(
        connections,
        "sealed",
        "id",
        "generation",
        lambda row: place_of(row.key, row.fence),
        sa.literal("connection ") + connections.c.name,
    ),
    _Holder(
        apps,
        "secrets",
        "id",
        "version",
        lambda row: Place("apps", "secrets", row.key, row.fence),
        sa.literal("app ") + apps.c.provider + "/" + apps.c.name,
    ),
    _Holder(
        signing_keys,
        "sealed",
        "kid",
        None,
        lambda row: Place("signing_keys", "sealed", row.key, 0),
        sa.literal("signing key ") + signing_keys.c.kid,
    ),
    _Holder(
        handshakes,
        "sealed_verifier",
        "state_hash",
        None,
        lambda row: Place("handshakes", "sealed_verifier", row.key, 0),
        sa.literal("a connecting under way at ") + handshakes.c.provider,
    ),
    _Holder(installation, "audit_key", "one", None, lambda _: audit_key_place(), sa.literal("the audit key")),
)


class Keys:
    """The KEKs of this installation."""

    def __init__(
        self, database: Database, keyring: Keyring, *, journal: Journal, trail: Trail, clock: Clock
    ) -> None:
        self._database = database
        self._keyring = keyring
        self._journal = journal
        self._trail = trail
        self._clock = clock

    def list(self) -> list[KekRow]:
        """Every KEK the database knows and every further one the keyring holds, the active one first."""
        with self._database.read() as transaction:
            active = transaction.execute(sa.select(installation.c.active_kek)).scalar_one()
            rows = transaction.execute(sa.select(keks.c.id, keks.c.created_at, keks.c.retired_at)).all()
        known = [
            KekRow(
                id=row.id,
                active=row.id == active,
                held=row.id in self._keyring.ids,
                records=self._named_by(row.id),
                created_at=row.created_at,
                retired_at=row.retired_at,
            )
            for row in rows
        ]
        return sorted(known, key=lambda row: (not row.active, row.id))

    def unregistered(self) -> tuple[str, ...]:
        """KEKs the keyring holds and the database does not know yet."""
        with self._database.read() as transaction:
            known = set(transaction.scalars(sa.select(keks.c.id)))
        return tuple(sorted(set(self._keyring.ids) - known))

    def add(self, *, actor: str = "admin:cli") -> str:
        """Make one more KEK known: one the keyring already holds, else a fresh one written to the keyring's file.

        Raises `KeyringFault` when the keyring comes from the environment and holds nothing new.
        """
        waiting = self.unregistered()
        kek_id = waiting[0] if waiting else self._keyring.add_generated(taken=[row.id for row in self.list()])
        with self._database.write() as transaction:
            bump(transaction, "access")
            add_kek(transaction, self._keyring, kek_id, now=self._clock.now())
            self._trail.record(Entry(actor, Event.KEY_ADDED, kek_id))
        log(Event.KEY_ADDED, kek=kek_id)
        return kek_id

    def rotate(self, to: str | None = None, *, actor: str = "admin:cli") -> Iterator[Progress]:
        """Make `to` (default: the newest that is not active) the active KEK and re-wrap everything under it.

        Yields progress, at last with the records that do not open: they stay as they are. Raises `InvalidRequest` when
        there is no such KEK and `Conflict` when a living process lacks it.
        """
        target = self._target(to)
        self._refuse_unless_held_by_all(target)
        with self._database.write() as transaction:
            bump(transaction, "access")
            changed = transaction.execute(
                sa.update(installation).where(installation.c.active_kek != target).values(active_kek=target)
            )
            self._trail.record(Entry(actor, Event.KEY_ACTIVATED, target))
        if changed.rowcount:
            log(Event.KEY_ACTIVATED, kek=target)
            self._clock.sleep(_NOTICE)
        yield from self._rewrap_all(target)

    def retire(self, kek_id: str, *, actor: str = "admin:cli") -> None:
        """Give a KEK up, after which it may leave the keyring. Raises `Conflict` while anything names it."""
        rows = {row.id: row for row in self.list()}
        if kek_id not in rows:
            raise InvalidRequest(f"There is no key {kek_id!r}; see: drawbridge keys list.")
        if rows[kek_id].active:
            raise Conflict(f"{kek_id!r} is the active key; rotate to another one first.")
        if rows[kek_id].records:
            raise Conflict(
                f"{rows[kek_id].records} record(s) are sealed under {kek_id!r}; run: drawbridge keys rotate, "
                "which names those that do not open."
            )
        if kek_id in self._journal.pending_keks():
            raise Conflict(
                f"A journal on this host names {kek_id!r}; start a web or worker process to bring it in."
            )
        if self._attempt_open():
            raise Conflict("Refreshes are under way that may still use it; try again in a minute.")
        with self._database.write() as transaction:
            bump(transaction, "access")
            transaction.execute(
                sa.update(keks).where(keks.c.id == kek_id).values(retired_at=self._clock.now())
            )
            self._trail.record(Entry(actor, Event.KEY_RETIRED, kek_id))
        log(Event.KEY_RETIRED, kek=kek_id)

    def _target(self, to: str | None) -> str:
        usable = [row for row in self.list() if row.retired_at is None]
        active = next(row for row in usable if row.active)
        newer = sorted(
            (row for row in usable if row.created_at > active.created_at), key=lambda row: row.created_at
        )
        if to is None and not newer and not any(row.records for row in usable if not row.active):
            raise InvalidRequest(
                "Everything is sealed under the newest key; for another one run: drawbridge keys add."
            )
        # Without a newer key it is a rotation that was stopped half-way: the active key is where it was going.
        wanted = to or (newer[-1].id if newer else active.id)
        if wanted not in {row.id for row in usable}:
            raise InvalidRequest(f"There is no key {wanted!r} in use; see: drawbridge keys list.")
        if wanted not in self._keyring.ids:
            raise KeyringFault(f"The keyring of this process lacks {wanted!r}.")
        return wanted

    def _refuse_unless_held_by_all(self, target: str) -> None:
        give_up = self._clock.elapsed() + _PATIENCE
        while lacking := self._lacking(target):
            if self._clock.elapsed() < give_up:
                self._clock.sleep(0.5)
                continue
            where = ", ".join(f"{row.kind} {row.pid} on {row.host}" for row in lacking)
            raise Conflict(f"{where} does not hold {target!r}; give it the new keyring and restart it first.")

    def _lacking(self, target: str) -> tuple[ProcessRow, ...]:
        living = alive(self._database, now=self._clock.now())
        return tuple(row for row in living if target not in row.kek_ids)

    def _rewrap_all(self, target: str) -> Iterator[Progress]:
        total = sum(self._left(holder, target) for holder in _HOLDERS)
        done, unopenable = 0, tuple[str, ...]()
        yield Progress(0, total)
        for holder in _HOLDERS:
            rows, stuck = 1, tuple[str, ...]()
            while rows > len(stuck):  # until a pass finds none but those that do not open
                rows, stuck = 0, ()
                for batch in self._pass(holder, target):
                    rows, stuck = rows + batch.rows, stuck + batch.unopenable
                    done += batch.moved
                    yield Progress(min(done, total), total)
            unopenable += stuck
        log(Event.RESEALED, kek=target, rows=done, left=len(unopenable))
        if unopenable:
            yield Progress(min(done, total), total, unopenable)

    def _pass(self, holder: _Holder, target: str) -> Iterator[_Batch]:
        """Re-wrap what is not under the target yet, a batch at a time in the order of the keys.

        A row whose fence moved meanwhile, or that was sealed under an old key behind us, is for the next pass.
        """
        key = holder.table.c[holder.key]
        query = self._waiting(holder, target).order_by(key).limit(_BATCH)
        with self._database.read() as transaction:
            rows = transaction.execute(query).all()
        while rows:
            yield self._rewrap(holder, target, rows)
            with self._database.read() as transaction:
                rows = transaction.execute(query.where(key > rows[-1].key)).all()

    def _waiting(self, holder: _Holder, target: str) -> sa.Select[Any]:
        table, sealed = holder.table, holder.table.c[holder.column]
        fence = table.c[holder.fence] if holder.fence else sa.literal(0)
        return sa.select(
            table.c[holder.key].label("key"),
            fence.label("fence"),
            sealed.label("sealed"),
            table.c.kek_id,
            holder.title.label("title"),
        ).where(sealed.is_not(None), table.c.kek_id != target)

    def _rewrap(self, holder: _Holder, target: str, rows: Sequence[Any]) -> _Batch:
        table, to = holder.table, self._keyring.get(target)
        fresh: list[tuple[Any, bytes]] = []
        unopenable: list[str] = []
        for row in rows:
            try:
                fresh.append((row, rewrap(row.sealed, holder.place(row), self._keyring, to=to)))
            except Unopenable:
                unopenable.append(row.title)
        moved = 0
        with self._database.write() as transaction:
            for row, blob in fresh:
                same = (table.c[holder.key] == row.key) & (table.c.kek_id == row.kek_id)
                if holder.fence:
                    same &= table.c[holder.fence] == row.fence
                moved += transaction.execute(
                    sa.update(table).where(same).values({holder.column: blob, "kek_id": target})
                ).rowcount
        return _Batch(len(rows), moved, tuple(unopenable))

    def _left(self, holder: _Holder, target: str) -> int:
        query = (
            sa.select(sa.func.count())
            .select_from(holder.table)
            .where(holder.table.c[holder.column].is_not(None), holder.table.c.kek_id != target)
        )
        with self._database.read() as transaction:
            return int(transaction.execute(query).scalar_one())

    def _named_by(self, kek_id: str) -> int:
        total = 0
        with self._database.read() as transaction:
            for holder in _HOLDERS:
                query = (
                    sa.select(sa.func.count())
                    .select_from(holder.table)
                    .where(holder.table.c[holder.column].is_not(None), holder.table.c.kek_id == kek_id)
                )
                total += int(transaction.execute(query).scalar_one())
        return total

    def _attempt_open(self) -> bool:
        """Whether a refresh is under way: one that began before the rotation may still seal under the old key."""
        query = (
            sa.select(sa.func.count()).select_from(connections).where(connections.c.open_attempt.is_not(None))
        )
        with self._database.read() as transaction:
            return int(transaction.execute(query).scalar_one()) > 0
