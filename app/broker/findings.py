"""What a person must look at: one open finding per kind and subject, counted instead of repeated, closed by itself."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection as Transaction
from sqlalchemy.exc import IntegrityError

from app.broker.store import new_id
from app.db.engine import Database
from app.db.schema import attempts, findings
from app.telemetry import Event, log

__all__ = [
    "Finding",
    "FindingKind",
    "close",
    "end_if_granted",
    "hold_of",
    "lapse",
    "of_app",
    "open_findings",
    "report",
]


class FindingKind(StrEnum):
    """The kinds there are, and who fixes them."""

    APP_MISCONFIGURED = "app_misconfigured"  # the operator: client id, secret or grant type of the app
    PROVIDER_DOWN = "provider_down"  # nobody here: the provider
    MASS_REFUSAL = "mass_refusal"  # look at the provider's status page before reconnecting anything
    MASS_FAILURE = (
        "mass_failure"  # many accounts' settings refuse us in the same way: hardly the fault of each
    )
    NEEDS_RECONNECT = "needs_reconnect"  # an admin: connect the account again
    REVOKE_GAVE_UP = "revoke_gave_up"  # an admin: remove the grant at the provider by hand


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One finding; `count` says how often it was seen while open."""

    id: str
    kind: str
    app_id: str | None
    connection_id: str | None
    code: str | None
    opened_at: datetime
    seen_at: datetime
    count: int


_COLUMNS: Final = tuple(Finding.__dataclass_fields__)
# Attempts the provider answered with a token, whether or not there was still a row to store it in.
_GRANTED: Final = ("granted", "superseded")


def report(
    transaction: Transaction,
    kind: FindingKind,
    *,
    now: datetime,
    app_id: str | None = None,
    connection_id: str | None = None,
    code: str | None = None,
) -> Finding | None:
    """Open the finding, or count it when it is open already; the finding when it is new."""
    key = _key(kind, app_id, connection_id)
    counted = transaction.execute(
        sa.update(findings)
        .where(findings.c.open_key == key)
        .values(seen_at=now, count=findings.c.count + 1, code=code)
    )
    if counted.rowcount:
        return None
    new = Finding(
        id=new_id(),
        kind=kind.value,
        app_id=app_id,
        connection_id=connection_id,
        code=code,
        opened_at=now,
        seen_at=now,
        count=1,
    )
    try:
        with transaction.begin_nested():
            values = {name: getattr(new, name) for name in _COLUMNS}
            transaction.execute(sa.insert(findings).values(**values, open_key=key))
    except IntegrityError:
        return None  # another process opened it between our two statements
    log(Event.FINDING_OPENED, finding=new.id, kind=new.kind, subject=connection_id or app_id)
    return new


def close(
    transaction: Transaction,
    kind: FindingKind,
    *,
    now: datetime,
    app_id: str | None = None,
    connection_id: str | None = None,
    unseen_since: datetime | None = None,
) -> Finding | None:
    """Close the finding if it is open, and where `unseen_since` is given was not seen after it; the finding when it was."""
    which = findings.c.open_key == _key(kind, app_id, connection_id)
    if unseen_since is not None:
        which &= findings.c.seen_at <= unseen_since
    return _closed(transaction, which, closed_at=now, seen_at=now)


def end_if_granted(
    transaction: Transaction, kind: FindingKind, *, app_id: str, unseen_since: datetime, now: datetime
) -> Finding | None:
    """Close an app's finding that was not seen after `unseen_since`, if the app was granted a token since it was seen."""
    granted = sa.exists().where(
        attempts.c.app_id == app_id,
        attempts.c.finished_at > findings.c.seen_at,
        attempts.c.outcome.in_(_GRANTED),
    )
    quiet = (findings.c.open_key == _key(kind, app_id, None)) & (findings.c.seen_at <= unseen_since)
    return _closed(transaction, quiet & granted, closed_at=now, seen_at=now)


def lapse(
    transaction: Transaction, kind: FindingKind, *, app_id: str, unseen_since: datetime
) -> Finding | None:
    """Close an app's finding that was not seen since then, as of when it last was: what comes now is another one."""
    stale = (findings.c.open_key == _key(kind, app_id, None)) & (findings.c.seen_at < unseen_since)
    return _closed(transaction, stale, closed_at=findings.c.seen_at)


def _closed(transaction: Transaction, which: sa.ColumnElement[bool], **values: Any) -> Finding | None:
    returned = (findings.c[name] for name in _COLUMNS)
    row = transaction.execute(
        sa.update(findings).where(which).values(open_key=None, **values).returning(*returned)
    ).one_or_none()
    if row is None:
        return None
    was = Finding(**row._mapping)
    log(Event.FINDING_CLOSED, finding=was.id, kind=was.kind, subject=was.connection_id or was.app_id)
    return was


def hold_of(transaction: Transaction, app_id: str, *, since: datetime) -> tuple[datetime | None, bool]:
    """Since when a mass refusal of this app is open and was seen after `since`, and whether one was closed after it."""
    mass = (findings.c.kind == FindingKind.MASS_REFUSAL.value) & (findings.c.app_id == app_id)
    opened = transaction.execute(
        sa.select(findings.c.opened_at).where(
            mass, findings.c.closed_at.is_(None), findings.c.seen_at >= since
        )
    ).scalar()
    closed = transaction.execute(
        sa.select(sa.func.count()).select_from(findings).where(mass, findings.c.closed_at >= since)
    ).scalar_one()
    return opened, closed > 0


def open_findings(database: Database) -> list[Finding]:
    """All open findings, the oldest first."""
    query = (
        sa.select(*(findings.c[name] for name in _COLUMNS))
        .where(findings.c.closed_at.is_(None))
        .order_by(findings.c.opened_at)
    )
    with database.read() as transaction:
        return [Finding(**row._mapping) for row in transaction.execute(query)]


def of_app(transaction: Transaction, app_id: str) -> list[Finding]:
    """The open findings on the app as a whole."""
    query = sa.select(*(findings.c[name] for name in _COLUMNS)).where(
        findings.c.app_id == app_id, findings.c.connection_id.is_(None), findings.c.closed_at.is_(None)
    )
    return [Finding(**row._mapping) for row in transaction.execute(query)]


def _key(kind: FindingKind, app_id: str | None, connection_id: str | None) -> str:
    return f"{kind.value}:{app_id or ''}:{connection_id or ''}"
