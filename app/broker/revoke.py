"""Taking a connection away: no hand-outs at once, the grant given back at the provider, then the keys destroyed.

`disconnect` only marks the row; every process stops handing out within a second. The worker then revokes upstream, retried
for 24 hours, and deletes the row with its wrapped data key. A refresh that is under way meanwhile may still store a newer
token in the marked row, so revoking waits until no lease is held and no attempt is open; and a connection that was installed
anew meanwhile is left alone, because its generation moved.

A row never goes silently while its grant may live on: unless the provider took the grant back, a finding says so.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Final

from sqlalchemy.exc import IntegrityError

from app.access.audit import Entry, Trail
from app.broker import findings
from app.broker.apps import Apps
from app.broker.connection import AdminState, Connection, ConnectionId, Tokens
from app.broker.findings import FindingKind
from app.broker.refresh import Refresher
from app.broker.store import Store, check_name
from app.clock import Clock
from app.db.engine import Database
from app.errors import Conflict, ConnectionDisabled, DrawbridgeError, InvalidRequest, Unopenable
from app.oauth2.provider import Grant, RevokeResult
from app.telemetry import Event, log

__all__ = ["Revoker"]

_GIVE_UP: Final = timedelta(hours=24)
_LONGEST_PAUSE: Final = 900.0
_UNINSTALL: Final = "uninstall"


class Revoker:
    """Marks connections for removal and carries the removal out."""

    def __init__(
        self,
        database: Database,
        store: Store,
        *,
        apps: Apps,
        refresher: Refresher,
        trail: Trail,
        clock: Clock,
    ) -> None:
        self._database = database
        self._store = store
        self._apps = apps
        self._refresher = refresher
        self._trail = trail
        self._clock = clock

    def disconnect(self, name: str, *, uninstall: bool = False, actor: str = "admin:cli") -> Connection:
        """Mark the connection: from now on nothing is handed out. Idempotent.

        `uninstall` also removes the app from the whole account, for all its users; only where the provider offers it.
        Raises `NotFound` and `InvalidRequest`.
        """
        connection = self._store.named(name)
        if uninstall and not self._apps.provider(connection.provider).can_uninstall:
            raise InvalidRequest(
                f"{connection.provider} offers no uninstall through its API; disconnect without it."
            )
        if connection.admin_state is AdminState.DISCONNECTING:
            return connection
        details = dict(connection.details) | ({_UNINSTALL: True} if uninstall else {})
        with self._database.write() as transaction:
            self._store.change(
                transaction,
                connection.id,
                admin_state=AdminState.DISCONNECTING.value,
                revoke_since=self._clock.now(),
                retry_at=None,
                failures=0,
                refresh_at=None,
                details=details,
            )
            self._trail.record(
                Entry(actor, Event.CONNECTION_DISCONNECTING, name, detail={"uninstall": uninstall})
            )
        log(Event.CONNECTION_DISCONNECTING, connection=name, provider=connection.provider)
        return self._store.named(name)

    def carry_out(self, connection_id: ConnectionId) -> bool:
        """Revoke and shred one marked connection if it may be done now; true when the row is gone."""
        found = self._read(connection_id)
        if found is None:
            return True
        connection, tokens = found
        if connection.admin_state is not AdminState.DISCONNECTING:
            return False
        now = self._clock.now()
        if connection.lease_until is not None and connection.lease_until > now:
            return self._later(connection, code="refresh_under_way", pause=1.0)
        result = self._give_back(connection, tokens)
        since = connection.revoke_since or now
        if result == "retry" and now - since < _GIVE_UP:
            return self._later(
                connection, code="revoke_failed", pause=min(2.0**connection.failures, _LONGEST_PAUSE)
            )
        return self._shred(connection, result, left=result != "done" and _may_live(connection, tokens))

    def _read(self, connection_id: ConnectionId) -> tuple[Connection, Tokens | None] | None:
        """The row with its tokens, None in place of tokens that do not open."""
        try:
            return self._store.tokens_of(connection_id)
        except Unopenable:
            connection = self._store.get(connection_id)
            return None if connection is None else (connection, None)

    def _give_back(self, connection: Connection, tokens: Tokens | None) -> RevokeResult:
        if connection.grant_type != "authorization_code":
            return "impossible"  # nothing was granted that could be given back: the key or the client secret is it
        if connection.exported_at is not None:
            return "impossible"  # the grant is in use elsewhere; giving it back would take it from there
        if tokens is None:
            # A worker whose keyring is whole may open it yet; once the day is over it is the record that is broken.
            log(Event.REVOKE_FAILED, connection=connection.name, code="unopenable")
            return "retry"
        try:
            return self._upstream(connection, tokens)
        except DrawbridgeError as error:
            log(Event.REVOKE_FAILED, connection=connection.name, code=error.code)
            return "retry"

    def _upstream(self, connection: Connection, tokens: Tokens) -> RevokeResult:
        app = self._apps.open(connection.app_id)
        provider = self._apps.provider(connection.provider)
        wire = self._refresher.wire()
        grant = Grant(
            "authorization_code", refresh_token=tokens.refresh_token, access_token=tokens.access_token
        )
        if connection.details.get(_UNINSTALL) and tokens.access_token is not None:
            removed = provider.uninstall(app, tokens.access_token, wire=wire)
            if removed == "done":
                return removed
            log(Event.REVOKE_FAILED, connection=connection.name, code=f"uninstall_{removed}")
            if removed == "retry":
                return removed  # giving the grant back first would leave nothing to uninstall with
        return provider.revoke(app, grant, wire=wire)

    def _later(self, connection: Connection, *, code: str, pause: float) -> bool:
        with self._database.write() as transaction:
            now = self._clock.now()
            until = now + timedelta(seconds=pause)
            self._store.postpone_removal(transaction, connection, until=until, code=code, now=now)
        return False

    def _shred(self, connection: Connection, result: RevokeResult, *, left: bool) -> bool:
        """Destroy the row; `left` says that its grant may live on at the provider, which somebody must then see to."""
        now = self._clock.now()
        with self._database.write() as transaction:
            gone = self._store.remove(transaction, connection.id, generation=connection.generation)
            if gone:
                findings.close(
                    transaction,
                    FindingKind.NEEDS_RECONNECT,
                    now=now,
                    app_id=connection.app_id,
                    connection_id=connection.id,
                )
            if gone and left:
                findings.report(
                    transaction,
                    FindingKind.REVOKE_GAVE_UP,
                    now=now,
                    app_id=connection.app_id,
                    code=connection.name,
                )
        if gone and left:
            log(
                Event.REVOKE_FAILED,
                connection=connection.name,
                provider=connection.provider,
                code="gave_up",
                again=False,
            )
        if gone:
            self._trail.record(Entry("worker", Event.CONNECTION_SHREDDED, connection.name, outcome=result))
            log(
                Event.CONNECTION_SHREDDED,
                connection=connection.name,
                provider=connection.provider,
                outcome=result,
            )
        return gone

    # The admin's other switch

    def disable(self, name: str, *, actor: str = "admin:cli") -> Connection:
        """Hand out nothing and refresh nothing until it is enabled again; the grant is kept.

        Raises `ConnectionDisabled` while it is being disconnected, and `Conflict` when that began just now.
        """
        return self._switch(name, AdminState.DISABLED, actor)

    def enable(self, name: str, *, actor: str = "admin:cli") -> Connection:
        """Undo `disable`; the worker looks at it at once. Raises as `disable` does."""
        return self._switch(name, AdminState.ENABLED, actor)

    def _switch(self, name: str, to: AdminState, actor: str) -> Connection:
        connection = self._store.named(name)
        if connection.admin_state is AdminState.DISCONNECTING:
            raise ConnectionDisabled(f"{name!r} is being disconnected; connect the account again instead.")
        if connection.admin_state is to:
            return connection
        enabled = to is AdminState.ENABLED
        event = Event.CONNECTION_ENABLED if enabled else Event.CONNECTION_DISABLED
        values = {"admin_state": to.value} | ({"refresh_at": self._clock.now()} if enabled else {})
        with self._database.write() as transaction:
            # Somebody who disconnected it since we looked must not find it handed out again.
            if not self._store.change(transaction, connection.id, was=connection.admin_state, **values):
                raise Conflict(f"{name!r} was changed by somebody else just now; look at it again.")
            self._trail.record(Entry(actor, event, name))
        log(event, connection=name, provider=connection.provider)
        return replace(connection, admin_state=to)

    def rename(self, name: str, new: str, *, actor: str = "admin:cli") -> Connection:
        """Give the connection another name; permissions whose pattern fits the new name apply from then on.

        Raises `Conflict` when the name is taken.
        """
        connection = self._store.named(name)
        check_name(new)
        try:
            with self._database.write() as transaction:
                self._store.change(transaction, connection.id, name=new)
                self._trail.record(Entry(actor, Event.CONNECTION_RENAMED, new, detail={"before": name}))
        except IntegrityError:
            raise Conflict(f"There is already a connection named {new!r}.") from None
        log(Event.CONNECTION_RENAMED, connection=new)
        return self._store.named(new)


def _may_live(connection: Connection, tokens: Tokens | None) -> bool:
    """Whether a grant of this row may live on although it was not given back; one that was moved is meant to."""
    if connection.grant_type != "authorization_code" or connection.exported_at is not None:
        return False
    return tokens is None or tokens.refresh_token is not None
