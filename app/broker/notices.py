"""News for the operator's own systems: written with the change it tells of, delivered by the worker, signed.

A notice is a row in the transaction that made it true, so it is neither lost nor sent for something that was rolled back. It
names the connection by its name in this installation and holds no personal data. Delivery is at least once; `id` lets the
receiver drop repeats.

Body: JSON with `id`, `event`, `at` and `connection` (null for what concerns a whole app), then `provider`, `code` and the
doctor's `fault`, `cause`, `sentence`, `who` and `how`; news of a finding have `finding`, `finding_id`, `app`, `opened_at`.

Signature, over the exact body: `Drawbridge-Signature: t=<unix seconds>,v1=<hex HMAC-SHA256 of "t.body">`, keyed with
NOTICE_SECRET. A receiver computes it anew over the bytes it read, compares in constant time, and refuses a `t` far from its
own clock, so that an old notice cannot be played again.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection as Transaction

from app.broker.store import new_id
from app.clock import Clock
from app.db.engine import Database
from app.db.schema import notices
from app.db.types import db_now
from app.http_client import Deadlines, HttpClient, NotSent, Purpose, Unfinished
from app.secret import Secret
from app.telemetry import Event, log, metrics

__all__ = ["Courier", "NoticeEvent", "announce", "signature"]

_GIVE_UP: Final = timedelta(hours=72)
_HOLD: Final = 60_000_000  # microseconds a claimed notice is left to its courier
_DEADLINES: Final = Deadlines(connect=5.0, read=10.0, total=15.0)


class NoticeEvent(StrEnum):
    """What is told."""

    NEEDS_RECONNECT = "connection.needs_reconnect"
    RECOVERED = "connection.recovered"
    FINDING_OPENED = "finding.opened"
    FINDING_CLOSED = "finding.closed"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Due:
    id: str
    event: str
    body: dict[str, Any]
    created_at: datetime
    tries: int


def announce(transaction: Transaction, event: NoticeEvent, *, now: datetime, **facts: Any) -> None:
    """Note the news in the transaction that makes it true; `facts` must be JSON without personal data."""
    identifier = new_id()
    body = {"id": identifier, "event": event.value, "at": now.isoformat(timespec="seconds"), **facts}
    transaction.execute(
        sa.insert(notices).values(
            id=identifier, event=event.value, body=body, created_at=now, next_try_at=now, tries=0
        )
    )


def signature(secret: Secret, body: bytes, *, timestamp: int) -> str:
    """The value of the `Drawbridge-Signature` header."""
    signed = b"%d." % timestamp + body
    return f"t={timestamp},v1={hmac.new(secret.reveal().encode(), signed, hashlib.sha256).hexdigest()}"


class Courier:
    """Takes due notices to NOTICE_URL; without one they count as delivered to the log alone."""

    def __init__(
        self, database: Database, http: HttpClient, clock: Clock, *, url: str | None, secret: Secret | None
    ) -> None:
        self._database = database
        self._http = http
        self._clock = clock
        self._url = url
        self._secret = secret

    def deliver_due(self, *, limit: int = 20) -> int:
        """Deliver what is due; how many arrived. A failure is retried with back-off for three days."""
        return sum(self._deliver(notice) for notice in self._claim(limit))

    def _claim(self, limit: int) -> list[_Due]:
        due = (
            sa.select(notices.c.id, notices.c.event, notices.c.body, notices.c.created_at, notices.c.tries)
            .where(notices.c.next_try_at <= db_now())
            .order_by(notices.c.next_try_at)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        with self._database.write() as transaction:
            claimed = [_Due(**row._mapping) for row in transaction.execute(due)]
            if claimed:
                transaction.execute(
                    sa.update(notices)
                    .where(notices.c.id.in_([notice.id for notice in claimed]))
                    .values(next_try_at=db_now() + _HOLD, tries=notices.c.tries + 1)
                )
        return claimed

    def _deliver(self, notice: _Due) -> bool:
        arrived = self._url is None or self._post(notice)
        now = self._clock.now()
        if arrived:
            self._note(notice, delivered_at=now, next_try_at=None)
            if self._url is not None:
                log(Event.NOTICE_DELIVERED, notice=notice.id)
                metrics.notices.labels("delivered").inc()
            return True
        given_up = now - notice.created_at > _GIVE_UP
        metrics.notices.labels("given_up" if given_up else "failed").inc()
        if given_up:
            log(Event.NOTICE_GIVEN_UP, notice=notice.id, code=notice.event)
        wait = timedelta(seconds=min(2.0 ** min(notice.tries, 12), 3600.0))
        self._note(notice, next_try_at=None if given_up else now + wait)
        return False

    def _post(self, notice: _Due) -> bool:
        assert self._url is not None
        body = json.dumps(notice.body, separators=(",", ":"), sort_keys=True).encode()
        headers = {"Content-Type": "application/json"}
        if self._secret is not None:
            stamp = int(self._clock.timestamp())
            headers["Drawbridge-Signature"] = signature(self._secret, body, timestamp=stamp)
        try:
            answer = self._http.send(
                "POST", self._url, purpose=Purpose.OPERATOR, deadlines=_DEADLINES, body=body, headers=headers
            )
        except (NotSent, Unfinished) as fault:
            log(Event.NOTICE_FAILED, notice=notice.id, code=fault.code)
            return False
        if not 200 <= answer.status < 300:
            log(Event.NOTICE_FAILED, notice=notice.id, code=f"http_{answer.status}")
            return False
        return True

    def _note(self, notice: _Due, **values: Any) -> None:
        with self._database.write() as transaction:
            transaction.execute(sa.update(notices).where(notices.c.id == notice.id).values(**values))
