"""What concerns a whole app: one finding while it lasts, one notice when it begins and one when it ends.

Finding and notice are written in the transaction that makes them true, so a rollback takes both along and nobody is told
twice: only who opens or closes the row tells of it.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection as Transaction

from app.broker import findings, notices
from app.broker.doctor import diagnose_finding
from app.broker.findings import Finding, FindingKind
from app.broker.notices import NoticeEvent
from app.db.schema import apps
from app.oauth2.provider import Provider

__all__ = ["APP_WIDE", "end", "lapse", "sound"]

# How long nothing may confirm a finding until it is over by itself. What is refused or fails is tried again every minute,
# and verdicts of a crowd are held for an hour; so after these there is no connection left that could confirm it. A
# client that was refused is believed for a day, because nothing but a grant shows that it is good again.
_PATIENCE: Final = {
    FindingKind.APP_MISCONFIGURED: timedelta(days=1),
    FindingKind.PROVIDER_DOWN: timedelta(hours=1),
    FindingKind.MASS_FAILURE: timedelta(hours=1),
    FindingKind.MASS_REFUSAL: timedelta(hours=1),
}
APP_WIDE: Final = tuple(_PATIENCE)
# How long a finding must not have been confirmed before a grant may end it. While a client secret is being rotated, a
# provider's servers and our processes know the old one or the new one as it comes, for minutes: grants and refusals
# take turns, and each turn would be two notices. A refused client pauses the app for a minute, so that within two it was
# surely asked again.
_QUIET: Final = {FindingKind.APP_MISCONFIGURED: timedelta(minutes=2)}


def sound(
    transaction: Transaction,
    kind: FindingKind,
    *,
    app_id: str,
    vendor: Provider,
    code: str | None,
    now: datetime,
) -> None:
    """Open the app's finding, or count it; whoever opens it announces it."""
    new = findings.report(transaction, kind, now=now, app_id=app_id, code=code)
    if new is not None:
        _announce(transaction, NoticeEvent.FINDING_OPENED, new, vendor=vendor, now=now)


def end(transaction: Transaction, kind: FindingKind, *, app_id: str, vendor: Provider, now: datetime) -> None:
    """Close the app's finding if it is open, and announce that.

    One that was confirmed only just now stays open; `lapse` ends it when it has been quiet for long enough.
    """
    unseen_since = now - _QUIET[kind] if kind in _QUIET else None
    was = findings.close(transaction, kind, now=now, app_id=app_id, unseen_since=unseen_since)
    if was is not None:
        _announce(transaction, NoticeEvent.FINDING_CLOSED, was, vendor=vendor, now=now)


def lapse(
    transaction: Transaction, kind: FindingKind, *, app_id: str, vendor: Provider, now: datetime
) -> bool:
    """Close the app's finding if nothing has confirmed it for long, and announce that; whether it was so.

    Not so long is enough where a grant has come since.
    """
    was = None
    if kind in _QUIET:
        quiet = now - _QUIET[kind]
        was = findings.end_if_granted(transaction, kind, app_id=app_id, unseen_since=quiet, now=now)
    if was is None:
        was = findings.lapse(transaction, kind, app_id=app_id, unseen_since=now - _PATIENCE[kind])
    if was is not None:
        _announce(transaction, NoticeEvent.FINDING_CLOSED, was, vendor=vendor, now=now)
    return was is not None


def _announce(
    transaction: Transaction, event: NoticeEvent, finding: Finding, *, vendor: Provider, now: datetime
) -> None:
    found = diagnose_finding(vendor, FindingKind(finding.kind), finding.code or "", now=now)
    name = transaction.execute(sa.select(apps.c.name).where(apps.c.id == finding.app_id)).scalar()
    notices.announce(
        transaction,
        event,
        now=now,
        connection=None,
        finding=finding.kind,
        finding_id=finding.id,
        app=None if name is None else f"{vendor.name}/{name}",
        provider=vendor.name,
        code=finding.code,
        opened_at=finding.opened_at.isoformat(timespec="seconds"),
        fault=found.fault.value,
        cause=found.cause,
        sentence=found.sentence,
        who=found.who,
        how=found.how,
    )
