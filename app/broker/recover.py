"""Bringing in answers that a dead process left in its journal on this host."""

from __future__ import annotations

import sqlalchemy as sa

from app.broker.apps import Apps
from app.broker.journal import Entry, Journal
from app.broker.refresh import Refresher, tell_recovered
from app.broker.store import Store
from app.clock import Clock
from app.db.engine import Database
from app.db.schema import attempts
from app.errors import DrawbridgeError, RefreshHeld
from app.oauth2.provider import Grant
from app.telemetry import Event, log, metrics

__all__ = ["Recovery"]


class Recovery:
    """Replays orphaned journals; every entry is fenced on the generation before it, so replaying twice does nothing."""

    def __init__(
        self,
        database: Database,
        store: Store,
        *,
        journal: Journal,
        apps: Apps,
        refresher: Refresher,
        clock: Clock,
    ) -> None:
        self._database = database
        self._store = store
        self._journal = journal
        self._apps = apps
        self._refresher = refresher
        self._clock = clock

    def run(self) -> int:
        """Adopt every journal of this host whose process is gone; how many answers lay in them.

        Raises `DatabaseUnavailable` and leaves what it could not bring in where it is. Nothing is brought in while the
        database may be a copy: an answer that fits no row here may be another installation's only good token.
        """
        try:
            self._refresher.require_adopted()
        except RefreshHeld as held:
            log(Event.REFRESH_HELD, code=held.code)
            return 0
        return self._journal.adopt_orphans(self._bring_in)

    def _bring_in(self, entry: Entry) -> None:
        with self._database.write() as transaction:
            # A connect that was not stored is not completed behind the back of whoever was told that it failed.
            saved = not entry.installs and self._store.replay(transaction, entry)
            now = self._clock.now()
            standing = self._store.get_within(transaction, entry.connection)
            if saved and standing is not None:
                tell_recovered(transaction, standing, now=now)
            transaction.execute(
                sa.update(attempts)
                .where(attempts.c.id == entry.attempt, attempts.c.finished_at.is_(None))
                .values(
                    outcome="granted" if saved else "superseded",
                    code="replayed",
                    finished_at=now,
                )
            )
            # It may be the very grant that stands for this account: then nobody may revoke it.
            kept = self._store.stands(transaction, entry.facts["app_id"], entry.facts["identity"])
        metrics.journal_entries.labels("replayed" if saved else "superseded").inc()
        log(Event.JOURNAL_REPLAYED, attempt=entry.attempt, saved=saved, gone=standing is None)
        if not saved and not kept:
            self._give_back(entry)

    def _give_back(self, entry: Entry) -> None:
        """Nobody keeps this grant: the connection was removed, or never came to be."""
        try:
            tokens = self._store.open(entry.sealed.blob, entry.connection, generation=entry.generation)
            app = self._apps.open(entry.facts["app_id"])
            grant = Grant(
                "authorization_code", refresh_token=tokens.refresh_token, access_token=tokens.access_token
            )
            result = self._apps.provider(app.provider).revoke(app, grant, wire=self._refresher.wire())
        except DrawbridgeError as error:
            log(Event.REVOKE_FAILED, connection_id=entry.connection, code=error.code)
            return
        log(Event.REVOKE_DONE, connection_id=entry.connection, outcome=result)
