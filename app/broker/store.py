"""Connections as rows: reading them, and the few fenced writes that change them.

Each write is one conditional UPDATE whose row count says whether it happened; READ COMMITTED is all it needs, and the same
SQL runs on both databases. Every write that other processes must learn of bumps the `connections` epoch in its own
transaction and leaves that number on the row, so that a cache elsewhere drops just this one.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection as Transaction

from app.broker.connection import (
    AdminState,
    Connection,
    ConnectionId,
    Health,
    Rotation,
    Tokens,
)
from app.broker.journal import FACT_NAMES, FACT_STAMPS, Entry
from app.crypto.envelope import Place, Sealed, Sealer
from app.db.engine import Database
from app.db.epoch import bump
from app.db.schema import connections
from app.db.types import db_now
from app.errors import InvalidRequest, NotFound, Unopenable
from app.secret import Secret

__all__ = ["Lease", "Store", "check_name", "new_id", "place_of"]

_TUPLES: Final = ("scopes_wanted", "scopes_granted")
_FIELDS: Final = tuple(field.name for field in fields(Connection))
# What a refresh may write besides the tokens; admin columns and the name have other writers and are left alone.
_HEALTH_FIELDS: Final = (
    "health",
    "obtained_at",
    "expires_at",
    "life_seconds",
    "life_known",
    "rotation",
    "scopes_granted",
    "instance_url",
    "lease_until",
    "open_attempt",
    "last_try",
    "refused_generation",
    "refused_at",
    "refused_code",
    "failures",
    "retry_at",
    "refresh_at",
    "last_refresh_at",
    "last_error",
    "last_error_at",
)
# What every grant makes of the rest of the row.
_AFTER_GRANT: Final = {
    "health": Health.HEALTHY.value,
    "lease_until": None,
    "open_attempt": None,
    "last_try": False,
    "refused_generation": None,
    "refused_at": None,
    "refused_code": None,
    "failures": 0,
    "retry_at": None,
    "last_error": None,
    "last_error_at": None,
}
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_MICROSECONDS: Final = 1_000_000
_AT_ONCE: Final = 1000  # parameters in one IN list
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def new_id() -> str:
    """A fresh random row id: 128 bits as 32 hex characters."""
    return secrets.token_hex(16)


def check_name(name: str) -> str:
    """The name if it may be one; raises `InvalidRequest` saying what names look like."""
    if _NAME.fullmatch(name) is None:
        raise InvalidRequest(
            "A name begins with a lower-case letter or digit and goes on with those, '.', '_' or '-'; at most 63 characters."
        )
    return name


def place_of(connection_id: str, generation: int) -> Place:
    """Where a connection's tokens of one generation are sealed to."""
    return Place(table="connections", column="sealed", row_id=connection_id, generation=generation)


def from_microseconds(value: int) -> datetime:
    """The instant a journal's integer stands for."""
    return _EPOCH + timedelta(microseconds=value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to refresh `connection` (read under the lease) with `tokens` until `ends` on the elapsed clock."""

    connection: Connection
    tokens: Tokens
    attempt: str
    ends: float


class Store:
    """The connections table, and the sealed tokens in it."""

    def __init__(self, database: Database, sealer: Sealer) -> None:
        self._database = database
        self._sealer = sealer

    # Reading

    def get(self, connection_id: str) -> Connection | None:
        """The connection with this id, or None."""
        return self._one(_BY_ID, connection_id)

    def by_name(self, name: str) -> Connection | None:
        """The connection with this name, or None."""
        return self._one(_BY_NAME, name)

    def named(self, name: str) -> Connection:
        """The connection with this name; raises `NotFound`."""
        found = self.by_name(name)
        if found is None:
            raise NotFound(f"There is no connection named {name!r}.")
        return found

    def by_identity(self, app_id: str, identity: str) -> Connection | None:
        """The connection of this account (and user, where that counts) through this app, or None."""
        return self._one(_BY_IDENTITY, identity, app_id=app_id)

    def page(
        self, *, after: str = "", limit: int = 100, app_id: str | None = None, state: str | None = None
    ) -> list[Connection]:
        """Connections ordered by name, those after the given name."""
        query = _SELECT.where(connections.c.name > after).order_by(connections.c.name).limit(limit)
        if app_id is not None:
            query = query.where(connections.c.app_id == app_id)
        if state is not None:
            query = query.where(_in_state(state))
        with self._database.read() as transaction:
            return [_connection(row._mapping) for row in transaction.execute(query)]

    def read_with_tokens(self, name: str) -> tuple[Connection, Tokens] | None:
        """The connection of this name with its tokens opened, read in one statement; None when there is none."""
        return self._with_tokens(_SEALED_BY_NAME, name)

    def tokens_of(self, connection_id: str) -> tuple[Connection, Tokens] | None:
        """The same by id."""
        return self._with_tokens(_SEALED_BY_ID, connection_id)

    def changes_since(self, epoch: int) -> list[str]:
        """The ids of all rows changed after the counter stood there; a removed row is not among them."""
        with self._database.read() as transaction:
            return list(transaction.scalars(_CHANGES, {"wanted": epoch}))

    def these(self, ids: Iterable[str]) -> dict[str, Connection]:
        """Those of these connections that still exist, by id."""
        wanted, found = sorted(set(ids)), {}
        with self._database.read() as transaction:
            for start in range(0, len(wanted), _AT_ONCE):
                for row in transaction.execute(_THOSE, {"ids": wanted[start : start + _AT_ONCE]}):
                    found[row.id] = _connection(row._mapping)
        return found

    def surviving(self, ids: Sequence[str]) -> set[str]:
        """Those of the ids that still have a row."""
        found: set[str] = set()
        with self._database.read() as transaction:
            for start in range(0, len(ids), _AT_ONCE):
                some = connections.c.id.in_(ids[start : start + _AT_ONCE])
                found.update(transaction.scalars(sa.select(connections.c.id).where(some)))
        return found

    def get_within(self, transaction: Transaction, connection_id: str) -> Connection | None:
        """The connection as it stands inside the caller's transaction, or None."""
        row = transaction.execute(_BY_ID, {"wanted": connection_id}).one_or_none()
        return None if row is None else _connection(row._mapping)

    def stands(self, transaction: Transaction, app_id: str, identity: str) -> bool:
        """Whether there is a connection of this account through this app."""
        wanted = {"wanted": identity, "app_id": app_id}
        return transaction.execute(_BY_IDENTITY, wanted).one_or_none() is not None

    def _one(self, query: sa.Select[Any], wanted: str, **more: str) -> Connection | None:
        with self._database.read() as transaction:
            row = transaction.execute(query, {"wanted": wanted, **more}).one_or_none()
        return None if row is None else _connection(row._mapping)

    def _with_tokens(self, query: sa.Select[Any], wanted: str) -> tuple[Connection, Tokens] | None:
        with self._database.read() as transaction:
            row = transaction.execute(query, {"wanted": wanted}).one_or_none()
        if row is None:
            return None
        found = _connection(row._mapping)
        return found, self.open(row.sealed, found.id, generation=found.generation)

    # Sealing

    def seal(self, tokens: Tokens, connection_id: str, *, generation: int) -> Sealed:
        """The tokens as one sealed record, bound to this row and generation."""
        clear = {
            name: secret.reveal() if isinstance(secret, Secret) else secret
            for name in ("access_token", "refresh_token", "subject", "private_key")
            if (secret := getattr(tokens, name)) is not None
        }
        return self._sealer.seal(json.dumps(clear).encode(), place_of(connection_id, generation))

    def check_sealing(self) -> None:
        """Pass when something could be sealed right now; raises `Unopenable` or `DatabaseUnavailable`."""
        self._sealer.seal(b"", place_of("", 0))

    def open(self, sealed: bytes | None, connection_id: str, *, generation: int) -> Tokens:
        """The reverse of `seal`; a shredded row opens to no tokens. Raises `Unopenable`."""
        if sealed is None:
            return Tokens()
        clear = json.loads(self._sealer.open(sealed, place_of(connection_id, generation)))
        if not isinstance(clear, dict):
            raise Unopenable
        hidden = {name: Secret(text) for name, text in clear.items() if name != "subject"}
        return Tokens(subject=clear.get("subject"), **hidden)

    # The lease (one conditional UPDATE, in the caller's transaction)

    def take_lease(
        self, transaction: Transaction, seen: Connection, *, attempt: str, seconds: float, last_try: bool
    ) -> bool:
        """Take the lease if nothing moved since `seen` was read: generation, open attempt, admin state, lease past."""
        taken = transaction.execute(
            _taking_the_lease(),
            {
                "seen_id": seen.id,
                "seen_generation": seen.generation,
                "seen_admin_state": seen.admin_state.value,
                "seen_health": seen.health.value,
                "seen_attempt": seen.open_attempt,
                "lease": int(seconds * _MICROSECONDS),
                "attempt": attempt,
                "is_last_try": last_try,
            },
        )
        return taken.rowcount == 1

    def give_lease_back(self, transaction: Transaction, seen: Connection, *, attempt: str) -> None:
        """Undo `take_lease` where it was carried out and nothing came of it.

        Waits for a commit that is still under way: what it stored would not be seen yet.
        """
        transaction.execute(_LOCK, {"at_id": seen.id})
        transaction.execute(
            _OF_ATTEMPT,
            {
                "at_id": seen.id,
                "at_generation": seen.generation,
                "at_attempt": attempt,
                "lease_until": None,
                "open_attempt": seen.open_attempt,
                "last_try": seen.last_try,
            },
        )

    def read_leased(self, transaction: Transaction, connection_id: str) -> tuple[Connection, Tokens]:
        """Connection and tokens as they stand inside the transaction that took the lease."""
        row = transaction.execute(_SEALED_BY_ID, {"wanted": connection_id}).one()
        found = _connection(row._mapping)
        return found, self.open(row.sealed, found.id, generation=found.generation)

    # Fenced writes of a refresh's outcome

    def save_tokens(self, transaction: Transaction, after: Connection, sealed: Sealed) -> int:
        """Store a new generation; only if the row still has the one before it, whoever holds the lease by now.

        The epoch it is stored under, 0 when it was not.
        """
        return self._update_under(
            transaction,
            _OF_GENERATION,
            {"at_id": after.id, "at_generation": after.generation - 1},
            **_values(after, _HEALTH_FIELDS),
            generation=after.generation,
            sealed=sealed.blob,
            kek_id=sealed.kek_id,
        )

    def save_health(self, transaction: Transaction, after: Connection, *, attempt: str) -> bool:
        """Store what an outcome without tokens says; only if the generation stands and the lease is still ours."""
        fence = {"at_id": after.id, "at_generation": after.generation, "at_attempt": attempt}
        saved = transaction.execute(_OF_ATTEMPT, fence | _values(after, _HEALTH_FIELDS))
        # No epoch: what is handed out does not depend on health, only on tokens and admin state.
        return saved.rowcount == 1

    def save_life(self, transaction: Transaction, after: Connection) -> bool:
        """Store what was learned of the life of this generation's access token."""
        names = ("life_seconds", "life_known", "expires_at", "refresh_at")
        fence = {"at_id": after.id, "at_generation": after.generation}
        return self._update(transaction, _OF_GENERATION, fence, **_values(after, names))

    def replay(self, transaction: Transaction, entry: Entry) -> bool:
        """Store a journaled answer; only over the generation before it."""
        facts = dict(entry.facts)
        for name in FACT_STAMPS:
            facts[name] = None if facts[name] is None else from_microseconds(facts[name])
        return self._update(
            transaction,
            _OF_GENERATION,
            {"at_id": entry.connection, "at_generation": entry.generation - 1},
            **{name: facts[name] for name in (*FACT_STAMPS, *FACT_NAMES)},
            **_AFTER_GRANT,
            generation=entry.generation,
            sealed=entry.sealed.blob,
            kek_id=entry.sealed.kek_id,
        )

    def _update(
        self, transaction: Transaction, fenced: sa.Update, fence: Mapping[str, Any], **values: Any
    ) -> bool:
        """One fenced UPDATE that other processes must learn of; false when the fence held it off."""
        return self._update_under(transaction, fenced, fence, **values) != 0

    def _update_under(
        self, transaction: Transaction, fenced: sa.Update, fence: Mapping[str, Any], **values: Any
    ) -> int:
        """The same; the epoch it is stored under, 0 when it is not.

        The epoch is bumped first: all writers that need it take it in the same order, so they queue and never deadlock.
        """
        epoch = bump(transaction, "connections")
        updated = transaction.execute(fenced, {**fence, **values, "epoch": epoch})
        return epoch if updated.rowcount == 1 else 0

    # Installing

    def insert(self, transaction: Transaction, new: Connection, sealed: Sealed) -> None:
        """A new row; raises IntegrityError when the name or the identity is taken."""
        epoch = bump(transaction, "connections")
        values = _values(new, _FIELDS)
        transaction.execute(
            sa.insert(connections).values(**values, sealed=sealed.blob, kek_id=sealed.kek_id, epoch=epoch)
        )

    def reinstall(
        self, transaction: Transaction, after: Connection, sealed: Sealed, *, at_rest: bool = False
    ) -> bool:
        """Replace the tokens of an existing row, no lease needed; only over the generation before.

        With `at_rest` only if no refresh is under way or may have been carried out unheard.
        """
        columns: tuple[str, ...] = (
            *_HEALTH_FIELDS,
            "account_id",
            "user_id",
            "admin_state",
            "scopes_wanted",
            "details",
        )
        columns += ("connected_at", "revoke_since", "grant_type", "exported_at")
        return self._update(
            transaction,
            _AT_REST if at_rest else _OF_GENERATION,
            {"at_id": after.id, "at_generation": after.generation - 1},
            **_values(after, columns),
            generation=after.generation,
            sealed=sealed.blob,
            kek_id=sealed.kek_id,
        )

    # Admin's columns

    def change(
        self, transaction: Transaction, connection_id: str, *, was: AdminState | None = None, **values: Any
    ) -> bool:
        """Set columns that only admins write; false when the row is gone, or no longer in the admin state it `was` in."""
        if was is None:
            return self._update(transaction, _OF_ID, {"at_id": connection_id}, **values)
        fence = {"at_id": connection_id, "at_admin_state": was.value}
        return self._update(transaction, _OF_ADMIN_STATE, fence, **values)

    def mark_exported(self, transaction: Transaction, seen: Connection, *, now: datetime) -> bool:
        """Never refresh it here again; only if nothing was refreshed since `seen`, nothing is being refreshed and it was not
        exported before.
        """
        fence = {"at_id": seen.id, "at_generation": seen.generation}
        return self._update(transaction, _AT_REST, fence, exported_at=now, refresh_at=None)

    def postpone_removal(
        self, transaction: Transaction, seen: Connection, *, until: datetime, code: str, now: datetime
    ) -> None:
        """Note that a disconnecting row could not be revoked yet, unless it was installed anew meanwhile."""
        transaction.execute(
            sa.update(connections)
            .where(
                connections.c.id == seen.id,
                connections.c.generation == seen.generation,
                connections.c.admin_state == AdminState.DISCONNECTING.value,
            )
            .values(
                retry_at=until,
                failures=connections.c.failures + 1,
                last_error=code,
                last_error_at=now,
            )
        )

    def remove(self, transaction: Transaction, connection_id: str, *, generation: int) -> bool:
        """Delete a disconnecting row with its wrapped key, unless it was installed anew meanwhile."""
        bump(transaction, "connections")
        gone = transaction.execute(
            sa.delete(connections).where(
                connections.c.id == connection_id,
                connections.c.generation == generation,
                connections.c.admin_state == AdminState.DISCONNECTING.value,
            )
        )
        if gone.rowcount == 1:
            bump(transaction, "removed")
        return gone.rowcount == 1

    # The worker's share

    def claim_due(self, *, limit: int, hold: float) -> list[Connection]:
        """Claim connections whose `refresh_at` has come, and put it `hold` seconds off so that no other worker does."""
        return self._claim(_DUE, _PUT_OFF_REFRESH, limit=limit, hold=hold)

    def claim_disconnecting(self, *, limit: int, hold: float) -> list[Connection]:
        """The same for connections that still wait to be revoked upstream."""
        return self._claim(_DISCONNECTING, _PUT_OFF_RETRY, limit=limit, hold=hold)

    def _claim(
        self, due: sa.Select[tuple[str]], put_off: sa.Update, *, limit: int, hold: float
    ) -> list[Connection]:
        """Put off what is due, so that nobody else takes it meanwhile, and return it."""
        with self._database.write() as transaction:
            ids = [row.id for row in transaction.execute(due, {"at_most": limit})]
            if not ids:
                return []
            transaction.execute(put_off, {"ids": ids, "hold": int(hold * _MICROSECONDS)})
            rows = transaction.execute(_THOSE, {"ids": ids})
            return [_connection(row._mapping) for row in rows]

    def mark_used(self, ids: Iterable[str], *, now: datetime) -> None:
        """Note that these were asked for; those only kept alive are looked at again at once."""
        wanted = sorted(ids)
        if not wanted:
            return
        with self._database.write() as transaction:
            free = [row.id for row in transaction.execute(_FREE, {"ids": wanted})]
            transaction.execute(_LOOK_AGAIN, {"ids": free, "moment": now})
            transaction.execute(_USED, {"ids": free, "moment": now})

    def claim_forced(self, connection_id: str, *, every: float) -> bool:
        """Whether a forced refresh may be made now: at most one per connection in so many seconds."""
        with self._database.write() as transaction:
            claimed = transaction.execute(
                sa.update(connections)
                .where(
                    connections.c.id == connection_id,
                    sa.or_(
                        connections.c.forced_at.is_(None),
                        connections.c.forced_at + int(every * _MICROSECONDS) <= db_now(),
                    ),
                )
                .values(forced_at=db_now())
            )
        return claimed.rowcount == 1

    def counts(self) -> dict[tuple[str, str], int]:
        """How many connections there are of each (provider, state)."""
        query = sa.select(
            connections.c.provider, connections.c.admin_state, connections.c.health, sa.func.count()
        ).group_by(connections.c.provider, connections.c.admin_state, connections.c.health)
        totals: dict[tuple[str, str], int] = {}
        with self._database.read() as transaction:
            for provider, admin_state, health, count in transaction.execute(query):
                state = health if admin_state == AdminState.ENABLED.value else admin_state
                totals[provider, state] = totals.get((provider, state), 0) + count
        return totals


# Statements are put together once: doing it at each use would cost more than running them.
_SELECT: Final = sa.select(*(connections.c[name] for name in _FIELDS))
_BY_ID: Final = _SELECT.where(connections.c.id == sa.bindparam("wanted"))
_BY_NAME: Final = _SELECT.where(connections.c.name == sa.bindparam("wanted"))
_BY_IDENTITY: Final = _SELECT.where(
    connections.c.app_id == sa.bindparam("app_id"), connections.c.identity == sa.bindparam("wanted")
)
_SEALED_BY_ID: Final = _BY_ID.add_columns(connections.c.sealed)
_SEALED_BY_NAME: Final = _BY_NAME.add_columns(connections.c.sealed)
_CHANGES: Final = sa.select(connections.c.id).where(connections.c.epoch > sa.bindparam("wanted"))

_OF_ID: Final = sa.update(connections).where(connections.c.id == sa.bindparam("at_id"))
_OF_GENERATION: Final = _OF_ID.where(connections.c.generation == sa.bindparam("at_generation"))
_OF_ATTEMPT: Final = _OF_GENERATION.where(connections.c.open_attempt == sa.bindparam("at_attempt"))
_OF_ADMIN_STATE: Final = _OF_ID.where(connections.c.admin_state == sa.bindparam("at_admin_state"))
_AT_REST: Final = _OF_GENERATION.where(
    connections.c.open_attempt.is_(None),
    connections.c.exported_at.is_(None),
    connections.c.last_try.is_(False),
    connections.c.health != Health.UNCERTAIN.value,
)

_LOCK: Final = sa.select(connections.c.id).where(connections.c.id == sa.bindparam("at_id")).with_for_update()
_AMONG: Final = connections.c.id.in_(sa.bindparam("ids", expanding=True))
_THOSE: Final = _SELECT.where(_AMONG)
_FREE: Final = (
    sa.select(connections.c.id).where(_AMONG).order_by(connections.c.id).with_for_update(skip_locked=True)
)
_LOOK_AGAIN: Final = (
    sa.update(connections)
    .where(
        _AMONG,
        connections.c.health == Health.HEALTHY.value,
        sa.or_(connections.c.refresh_at.is_(None), connections.c.refresh_at > connections.c.expires_at),
    )
    .values(refresh_at=sa.bindparam("moment"))
)
_USED: Final = sa.update(connections).where(_AMONG).values(last_used_at=sa.bindparam("moment"))
_LATER: Final = db_now() + sa.bindparam("hold", type_=sa.BigInteger())
_PUT_OFF_REFRESH: Final = sa.update(connections).where(_AMONG).values(refresh_at=_LATER)
_PUT_OFF_RETRY: Final = sa.update(connections).where(_AMONG).values(retry_at=_LATER)

_DUE: Final = (
    sa.select(connections.c.id)
    .where(
        connections.c.refresh_at <= db_now(),
        connections.c.admin_state == AdminState.ENABLED.value,
        # Enabling one of these, or asking for its token, does not make it ours to refresh.
        connections.c.health != Health.NEEDS_RECONNECT.value,
        connections.c.exported_at.is_(None),
    )
    .order_by(connections.c.refresh_at)
    .limit(sa.bindparam("at_most", type_=sa.Integer()))
    .with_for_update(skip_locked=True)
)
_DISCONNECTING: Final = (
    sa.select(connections.c.id)
    .where(
        connections.c.admin_state == AdminState.DISCONNECTING.value,
        sa.or_(connections.c.retry_at.is_(None), connections.c.retry_at <= db_now()),
    )
    .limit(sa.bindparam("at_most", type_=sa.Integer()))
    .with_for_update(skip_locked=True)
)


@cache
def _taking_the_lease() -> sa.Update:
    seen, columns = sa.bindparam, connections.c
    return (
        sa.update(connections)
        .where(
            columns.id == seen("seen_id"),
            columns.generation == seen("seen_generation"),
            columns.admin_state == seen("seen_admin_state"),
            columns.health == seen("seen_health"),
            columns.exported_at.is_(None),
            columns.open_attempt.is_not_distinct_from(seen("seen_attempt", type_=sa.String())),
            sa.or_(columns.lease_until.is_(None), columns.lease_until < db_now()),
        )
        .values(
            lease_until=db_now() + sa.bindparam("lease", type_=sa.BigInteger()),
            open_attempt=sa.bindparam("attempt"),
            last_try=sa.or_(columns.last_try, sa.bindparam("is_last_try", type_=sa.Boolean())),
        )
    )


def _in_state(state: str) -> sa.ColumnElement[bool]:
    if state in (AdminState.DISABLED.value, AdminState.DISCONNECTING.value):
        return connections.c.admin_state == state
    return (connections.c.admin_state == AdminState.ENABLED.value) & (connections.c.health == state)


def _connection(row: Mapping[Any, Any]) -> Connection:
    values = {name: row[name] for name in _FIELDS}
    for name in _TUPLES:
        values[name] = tuple(values[name] or ())
    values["id"] = ConnectionId(values["id"])
    values["admin_state"] = AdminState(values["admin_state"])
    values["health"] = Health(values["health"])
    values["rotation"] = Rotation(values["rotation"])
    return Connection(**values)


def _values(connection: Connection, names: Iterable[str]) -> dict[str, Any]:
    values = {name: getattr(connection, name) for name in names}
    for name in _TUPLES:
        if name in values:
            values[name] = list(values[name])
    for name in ("admin_state", "health", "rotation"):
        if name in values:
            values[name] = values[name].value
    return values
