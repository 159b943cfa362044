"""Removing what nobody needs any more: old attempts, used links, ended sessions, delivered notices, the old trail.

Rows go in batches, so that no write transaction is long enough to be noticed by a hand-out.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

import sqlalchemy as sa

from app.bootstrap import Services
from app.broker.connection import Health, Rotation
from app.broker.installation import alive
from app.clock import Clock
from app.db.engine import Database
from app.db.schema import (
    admin_logins,
    admin_sessions,
    apps,
    attempts,
    connect_links,
    connections,
    findings,
    handshakes,
    notices,
)

__all__ = ["Tidying", "prune_trail"]

_BATCH: Final = 500
# Attempts are read for days at most: what went wrong last night, and over the weekend.
_KEEP_ATTEMPTS: Final = timedelta(days=3)
# A used or expired link can still explain itself for a day ("was used already"), then it is as unknown as any other.
_KEEP_SPENT: Final = timedelta(days=1)
_KEEP_CLOSED: Final = timedelta(days=90)
_KEEP_NOTICES: Final = timedelta(days=30)


# Few: only where refresh tokens rotate, until the connection has other tokens or is gone.
_MISSED: Final = (attempts.c.outcome == "unknown") & sa.exists().where(
    connections.c.id == attempts.c.connection_id,
    connections.c.generation == attempts.c.generation,
    connections.c.rotation != Rotation.NOT_SEEN.value,
    connections.c.health.in_((Health.NEEDS_RECONNECT.value, Health.UNCERTAIN.value)),
)


class Tidying:
    """Removes rows past their use; several workers may do it at once."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def run(self) -> int:
        """Remove everything that is past its use; how many rows went. Raises `DatabaseUnavailable`."""
        now = self._clock.now()
        spent, closed = now - _KEEP_SPENT, now - _KEEP_CLOSED
        removed = self._attempts(now - _KEEP_ATTEMPTS)
        removed += self._remove(handshakes.c.state_hash, handshakes.c.expires_at < spent)
        removed += self._remove(connect_links.c.token_hash, connect_links.c.expires_at < spent)
        removed += self._remove(admin_logins.c.token_hash, admin_logins.c.expires_at < spent)
        removed += self._remove(admin_sessions.c.id_hash, admin_sessions.c.expires_at < now)
        removed += self._remove(findings.c.id, findings.c.closed_at < closed)
        settled = notices.c.next_try_at.is_(None) & (notices.c.created_at < now - _KEEP_NOTICES)
        return removed + self._remove(notices.c.id, settled)

    def _attempts(self, before: datetime) -> int:
        """Old attempts, app by app, because that is how they are indexed; an attempt still open on a row stays.

        So does one whose answer was lost for good: it names the host whose journal may still hold the only good token.
        """
        with self._database.read() as transaction:
            known = list(transaction.scalars(sa.select(apps.c.id)))
        removed = sum(
            self._remove(
                attempts.c.id,
                (attempts.c.app_id == app_id) & (attempts.c.finished_at < before) & ~_MISSED,
            )
            for app_id in known
        )
        still_open = sa.select(connections.c.open_attempt).where(connections.c.open_attempt.is_not(None))
        forgotten = attempts.c.finished_at.is_(None) & attempts.c.id.not_in(still_open)
        without_app = attempts.c.app_id.not_in(sa.select(apps.c.id)) & attempts.c.id.not_in(still_open)
        return removed + self._remove(
            attempts.c.id, (attempts.c.started_at < before) & (forgotten | without_app)
        )

    def _remove(self, key: sa.ColumnElement[str], where: sa.ColumnElement[bool]) -> int:
        """Delete the rows of the key's table, a batch at a time; how many."""
        removed = 0
        table = key.table
        while True:
            with self._database.read() as transaction:
                keys = list(transaction.scalars(sa.select(key).where(where).limit(_BATCH)))
            if keys:
                with self._database.write() as transaction:
                    removed += transaction.execute(sa.delete(table).where(key.in_(keys), where)).rowcount
            if len(keys) < _BATCH:
                return removed


def prune_trail(services: Services) -> int:
    """Remove audit rows past their retention, if this is the worker to do it; how many rows went.

    The worker that has lived longest does it. Two may think so for a moment; pruning is fenced on the kept head, so that
    costs a second look and nothing else.
    """
    now = services.clock.now()
    workers = [process.id for process in alive(services.database, now=now) if process.kind == "worker"]
    if not workers or workers[0] != services.process.id:
        return 0
    return services.trail.prune(now - timedelta(days=services.settings.audit_retention_days))
