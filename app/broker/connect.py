"""Connecting an account: from the admin's click, through the provider's consent page, to a stored grant.

A trip through the consent page is a `handshakes` row, found by the digest of its `state`, bound to one browser and one
provider, used once, gone after ten minutes. What comes back is exchanged, identified and then either stored as a new
connection, or as the next generation of the one that stands for the same account, or refused: a reconnect that returns
another account stores nothing and gives the grant back unless it is one that is already stored.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from app.access.audit import Entry, Trail
from app.broker.apps import AppRow, Apps
from app.broker.connection import AdminState, Connection, ConnectionId, Health, Rotation, Tokens, next_look
from app.broker.doctor import approvals_of
from app.broker.journal import INSTALL
from app.broker.refresh import Refresher, tell_recovered
from app.broker.store import Store, check_name, new_id
from app.clock import Clock
from app.crypto.envelope import Place, Sealed, Sealer
from app.db.engine import Database
from app.db.schema import connect_links, handshakes
from app.db.types import db_now
from app.errors import (
    AccountMismatch,
    Conflict,
    DrawbridgeError,
    InvalidRequest,
    NotFound,
    ProviderMisconfigured,
    ProviderUnavailable,
)
from app.oauth2 import handshake
from app.oauth2.outcomes import Granted, Misconfigured, Outcome, Refused
from app.oauth2.provider import Account, App, Grant, GrantType, Provider
from app.secret import Secret
from app.telemetry import Event, log

__all__ = ["CallbackRefused", "Connect", "Connected", "Link", "Start"]

_TRIP: Final = timedelta(minutes=10)
_LINK: Final = timedelta(hours=24)
_UNDO: Final = timedelta(minutes=15)
_DENIALS: Final = frozenset({"access_denied", "access-denied"})


class CallbackRefused(InvalidRequest):
    """The way back from the provider does not fit a trip that began here, or the provider reports an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where to send the browser, and the cookie value that binds the trip to it."""

    url: str
    browser: Secret


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What a connect link stands for; `connection` is set where it is for connecting one again."""

    app: AppRow
    name: str | None
    connection: Connection | None
    expires_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """What a trip came to; `missing` are wanted scopes that were not granted."""

    connection: Connection
    app: AppRow
    again: bool
    missing: tuple[str, ...]
    started_by: str


class Connect:
    """Begins trips, finishes them, and makes connections that need no browser."""

    def __init__(
        self,
        database: Database,
        store: Store,
        *,
        apps: Apps,
        refresher: Refresher,
        sealer: Sealer,
        trail: Trail,
        clock: Clock,
    ) -> None:
        self._database = database
        self._store = store
        self._apps = apps
        self._refresher = refresher
        self._sealer = sealer
        self._trail = trail
        self._clock = clock

    # Links

    def make_link(
        self, app: AppRow, *, name: str | None, actor: str = "admin:cli"
    ) -> tuple[Secret, datetime]:
        """A one-time token, good for 24 hours, with which somebody else may connect this app; and when it expires.

        With the name of an existing connection the link is for connecting that one again.
        """
        existing = None
        if name is not None:
            existing = self._store.by_name(check_name(name))
            if existing is not None and existing.app_id != app.id:
                raise Conflict(f"{name!r} is a connection through another app.")
        token = Secret(secrets.token_urlsafe(32))
        now = self._clock.now()
        with self._database.write() as transaction:
            transaction.execute(
                sa.insert(connect_links).values(
                    token_hash=token.sha256(),
                    app_id=app.id,
                    connection_id=existing.id if existing else None,
                    name=name,
                    created_at=now,
                    expires_at=now + _LINK,
                )
            )
            self._trail.record(
                Entry(actor, Event.CONNECT_LINK_MADE, name or "", detail={"app": app.reference})
            )
        return token, now + _LINK

    def look_at_link(self, token: Secret) -> Link:
        """What the link is for, without using it up; raises `NotFound` when it is unknown, used or expired."""
        query = sa.select(connect_links).where(
            connect_links.c.token_hash == token.sha256(),
            connect_links.c.used_at.is_(None),
            connect_links.c.expires_at > db_now(),
        )
        with self._database.read() as transaction:
            row = transaction.execute(query).one_or_none()
        if row is None:
            raise NotFound("This link is unknown, was used already, or has expired. Ask for a new one.")
        connection = self._store.get(row.connection_id) if row.connection_id else None
        return Link(
            app=self._apps.row(row.app_id), name=row.name, connection=connection, expires_at=row.expires_at
        )

    def use_link(self, token: Secret) -> Link:
        """The same, and nobody can use it again."""
        link = self.look_at_link(token)
        with self._database.write() as transaction:
            used = transaction.execute(
                sa.update(connect_links)
                .where(connect_links.c.token_hash == token.sha256(), connect_links.c.used_at.is_(None))
                .values(used_at=self._clock.now())
            )
        if used.rowcount != 1:
            raise NotFound("This link was used a moment ago. Ask for a new one.")
        return link

    # The trip

    def start(
        self,
        app: AppRow,
        *,
        name: str | None = None,
        connection: Connection | None = None,
        started_by: str,
        browser: Secret | None = None,
    ) -> Start:
        """Begin a trip: `connection` to connect that one again, else `name` for a new one (default: made of the account).

        `browser` is the cookie the browser already has, if any, so that two trips in two tabs both find their way back.
        Raises `Conflict` when the name is taken, `ProviderMisconfigured` when the app lacks what the trip needs.
        """
        if connection is None and name is not None and self._store.by_name(check_name(name)) is not None:
            raise Conflict(f"There is already a connection named {name!r}.")
        opened = self._apps.open(app.id)
        provider = self._apps.provider(app.provider)
        if "authorization_code" not in provider.grant_types:
            raise InvalidRequest(f"{provider.title} has no consent page.")
        state, verifier = handshake.new_state(), handshake.new_verifier()
        browser = browser or handshake.new_browser_token()
        key = handshake.state_hash(state)
        sealed = self._sealer.seal(verifier.reveal().encode(), _verifier_place(key))
        now = self._clock.now()
        with self._database.write() as transaction:
            transaction.execute(sa.delete(handshakes).where(handshakes.c.expires_at < now - _TRIP))
            transaction.execute(
                sa.insert(handshakes).values(
                    state_hash=key,
                    browser_hash=handshake.browser_hash(browser, app.provider),
                    provider=app.provider,
                    app_id=app.id,
                    connection_id=connection.id if connection else None,
                    name=name,
                    sealed_verifier=sealed.blob,
                    kek_id=sealed.kek_id,
                    redirect_uri=opened.redirect_uri,
                    started_by=started_by,
                    created_at=now,
                    expires_at=now + _TRIP,
                )
            )
        url = provider.authorize_url(opened, state=state, challenge=handshake.challenge(verifier))
        return Start(url=url, browser=browser)

    def finish(
        self,
        provider: str,
        *,
        state: str | None,
        code: Secret | None,
        error: str | None,
        browser: Secret | None,
    ) -> Connected:
        """End a trip with what the provider sent to the callback.

        Raises `CallbackRefused` when the state is unknown, used, expired, another browser's or another provider's, or the
        provider reports an error; `AccountMismatch` when another account came back; `ProviderUnavailable` or
        `ProviderMisconfigured` when the code could not be exchanged. Nothing is stored in any of these cases.
        """
        trip = self._consume(provider, state, browser)
        if error is not None:
            raise CallbackRefused(_declined(error))
        if code is None:
            raise CallbackRefused("The provider sent neither a code nor an error.")
        app = self._apps.open(trip.app_id)
        vendor = self._apps.provider(provider)
        verifier = Secret(self._sealer.open(trip.sealed_verifier, _verifier_place(trip.state_hash)).decode())
        granted = _exchanged(
            vendor, vendor.exchange(app, code=code, verifier=verifier, wire=self._refresher.wire())
        )
        account = self._identified(vendor, app, granted)
        wanted = self._store.get(trip.connection_id) if trip.connection_id else None
        if trip.connection_id and (wanted is None or wanted.identity != account.identity):
            self._give_back(vendor, app, account, granted)
            raise AccountMismatch()
        # A connection that is removed while its account is connected again comes back under its own name.
        name = wanted.name if wanted is not None else trip.name
        connection, again = self.install(
            app,
            account,
            granted,
            name=name,
            grant_type="authorization_code",
            tokens=Tokens(),
            actor=trip.started_by,
        )
        return Connected(
            connection=connection,
            app=self._apps.row(app.id),
            again=again,
            missing=tuple(scope for scope in app.scopes if scope not in connection.scopes_granted),
            started_by=trip.started_by,
        )

    def _consume(
        self, provider: str, state: str | None, browser: Secret | None
    ) -> sa.Row[tuple[object, ...]]:
        """The trip this callback belongs to; it cannot be used again whatever happens next."""
        if not state:
            raise CallbackRefused("The callback carries no state.")
        key = handshake.state_hash(state)
        with self._database.read() as transaction:
            trip = transaction.execute(
                sa.select(handshakes).where(handshakes.c.state_hash == key)
            ).one_or_none()
        if trip is None or trip.provider != provider:
            raise CallbackRefused("This callback belongs to no connect that began here. Begin again.")
        if browser is None or not handshake.matches(
            trip.browser_hash, handshake.browser_hash(browser, provider)
        ):
            raise CallbackRefused("This connect began in another browser. Begin again in this one.")
        with self._database.write() as transaction:
            used = transaction.execute(
                sa.update(handshakes)
                .where(
                    handshakes.c.state_hash == key,
                    handshakes.c.used_at.is_(None),
                    handshakes.c.expires_at > db_now(),
                )
                .values(used_at=self._clock.now())
            )
        if used.rowcount != 1:
            raise CallbackRefused(
                "This connect was finished already or took longer than ten minutes. Begin again."
            )
        return trip

    def _identified(self, provider: Provider, app: App, granted: Granted) -> Account:
        try:
            return provider.identify(app, granted, wire=self._refresher.wire())
        except DrawbridgeError:
            # Without knowing whose it is it cannot be stored; a grant that nobody keeps should not stay open either.
            provider.revoke(app, _grant_of(granted), wire=self._refresher.wire())
            raise

    def _give_back(self, provider: Provider, app: App, account: Account, granted: Granted) -> None:
        if self._store.by_identity(app.id, account.identity) is not None:
            return  # it may be the very grant that is stored for that account
        result = provider.revoke(app, _grant_of(granted), wire=self._refresher.wire())
        log(Event.CONNECTION_MISMATCHED, provider=provider.name, outcome=result)

    # Storing what came back

    def install(
        self,
        app: App,
        account: Account,
        granted: Granted,
        *,
        name: str | None,
        grant_type: GrantType,
        tokens: Tokens,
        actor: str,
    ) -> tuple[Connection, bool]:
        """Store a fresh grant and put on record who brought it; the connection and whether it existed before.

        No lease is needed: the new generation makes every refresh that is under way come too late.
        """
        provider = self._apps.provider(app.provider)
        kept = replace(tokens, access_token=granted.access_token, refresh_token=granted.refresh_token)
        for _ in range(5):
            existing = self._store.by_identity(app.id, account.identity)
            after = self._fresh(
                provider, app, account, granted, existing=existing, name=name, grant_type=grant_type
            )
            if self._stored(after, existing, kept, actor=actor):
                again = existing is not None
                log(Event.CONNECTION_CONNECTED, connection=after.name, provider=after.provider, again=again)
                self._learn_life(provider, app, after, granted)
                return self._store.get(after.id) or after, again
        raise Conflict("The connection is being changed by somebody else; try again.")

    def _fresh(
        self,
        provider: Provider,
        app: App,
        account: Account,
        granted: Granted,
        *,
        existing: Connection | None,
        name: str | None,
        grant_type: GrantType,
    ) -> Connection:
        now = self._clock.now()
        rhythm = self._refresher.rhythm(provider)
        life = granted.expires_in or (existing.life_seconds if existing else None) or rhythm.assumed_life
        base = existing or Connection(
            id=ConnectionId(new_id()),
            name=self._free_name(provider, account, name),
            provider=app.provider,
            app_id=app.id,
            grant_type=grant_type,
            account_id=account.account_id,
            user_id=account.user_id,
            identity=account.identity,
            rotation=Rotation(provider.rotation_at_start),
            created_at=now,
        )
        state = AdminState.ENABLED if base.admin_state is AdminState.DISCONNECTING else base.admin_state
        after = replace(
            base,
            grant_type=grant_type,
            account_id=account.account_id,
            user_id=account.user_id,
            admin_state=state,
            health=Health.HEALTHY,
            generation=base.generation + 1,
            obtained_at=granted.sent_at,
            expires_at=granted.sent_at + timedelta(seconds=life),
            life_seconds=life,
            life_known=granted.expires_in is not None,
            scopes_wanted=tuple(dict.fromkeys((*app.scopes, *app.optional_scopes))),
            scopes_granted=account.scopes,
            instance_url=account.instance_url,
            details=dict(account.details) | _approvals(existing, grant_type),
            lease_until=None,
            open_attempt=None,
            last_try=False,
            refused_generation=None,
            refused_at=None,
            refused_code=None,
            failures=0,
            retry_at=None,
            last_refresh_at=now,
            last_error=None,
            last_error_at=None,
            revoke_since=None,
            exported_at=None,
            connected_at=now,
        )
        return replace(after, refresh_at=next_look(after, now=now, rhythm=rhythm))

    def _stored(self, after: Connection, existing: Connection | None, tokens: Tokens, *, actor: str) -> bool:
        sealed = self._store.seal(tokens, after.id, generation=after.generation)
        journaled = self._refresher.journal_answer(f"{INSTALL}{new_id()}", after, sealed)
        try:
            stored = self._commit(after, existing, sealed, actor=actor)
        except IntegrityError:
            stored = False  # name or identity was taken a moment ago; the next round sees by whom
        except DrawbridgeError:
            if journaled is not None:
                self._refresher.journal_left(journaled)
            raise
        if journaled is not None:
            self._refresher.journal_done(journaled)
        return stored

    def _commit(self, after: Connection, existing: Connection | None, sealed: Sealed, *, actor: str) -> bool:
        with self._database.write() as transaction:
            if existing is None:
                self._store.insert(transaction, after, sealed)
            elif self._store.reinstall(transaction, after, sealed):
                tell_recovered(transaction, existing, now=self._clock.now())
            else:
                return False
            # Before the commit: nothing is handed out of which it is not on record who connected it.
            detail: dict[str, str | bool] = {"provider": after.provider, "account": after.account_id}
            detail["again"] = existing is not None
            self._trail.record(Entry(actor, Event.CONNECTION_CONNECTED, after.name, detail=detail))
            return True

    def _learn_life(self, provider: Provider, app: App, after: Connection, granted: Granted) -> None:
        if granted.expires_in is None:
            self._refresher.learn_life(after, app, provider, granted)

    def _free_name(self, provider: Provider, account: Account, name: str | None) -> str:
        """The wanted name, or one made of the account; a taken one gets a number rather than costing the grant."""
        parts = (provider.name, account.account_id, account.user_id)
        made = re.sub(r"[^a-z0-9._-]+", "-", "-".join(filter(None, parts)).lower())[:58]
        base = name or made
        for number in range(1, 1000):
            candidate = base if number == 1 else f"{base[:58]}-{number}"
            if self._store.by_name(candidate) is None:
                return candidate
        raise Conflict(f"No free name like {base!r} is left.")

    # Without a browser

    def add_minted(
        self,
        app: AppRow,
        *,
        name: str,
        grant_type: GrantType,
        subject: str | None,
        private_key: Secret | None,
        actor: str = "admin:cli",
    ) -> Connection:
        """A connection whose tokens are minted anew each time (JWT bearer, client credentials); mints the first at once.

        Raises `Conflict` when the name is taken and `InvalidRequest`, `ProviderMisconfigured` or `ProviderUnavailable` with
        the reason when no token comes.
        """
        if self._store.by_name(check_name(name)) is not None:
            raise Conflict(f"There is already a connection named {name!r}.")
        opened = self._apps.open(app.id)
        provider = self._apps.provider(app.provider)
        grant = Grant(grant_type, subject=subject, private_key=private_key)
        provider.check_grant(opened, grant)
        granted = _exchanged(provider, provider.refresh(opened, grant, wire=self._refresher.wire()))
        account = provider.identify(opened, granted, wire=self._refresher.wire())
        taken = self._store.by_identity(app.id, account.identity)
        if taken is not None:
            raise Conflict(f"This account is already connected as {taken.name!r}.")
        tokens = Tokens(subject=subject, private_key=private_key)
        connection, _ = self.install(
            opened, account, granted, name=name, grant_type=grant_type, tokens=tokens, actor=actor
        )
        return connection

    # Undo

    def undo_token(self, connection: Connection, *, key: Secret) -> str:
        """A token with which the browser that just connected may take it back within 15 minutes."""
        until = int((self._clock.now() + _UNDO).timestamp())
        return f"{until}.{_undo_mac(connection, until, key)}"

    def check_undo(self, connection: Connection, token: str, *, key: Secret) -> None:
        """Pass when the token is this connection's and generation's; raises `CallbackRefused`."""
        until, _, mac = token.partition(".")
        fresh = until.isascii() and until.isdigit() and int(until) > self._clock.timestamp()
        if not fresh or not handshake.matches(_undo_mac(connection, int(until), key), mac):
            raise CallbackRefused("It is too late to take this back here; an admin can disconnect it.")


def _approvals(existing: Connection | None, grant_type: GrantType) -> dict[str, int]:
    """Each trip through the consent page leaves one more approval at the provider; the row counts those it has seen."""
    if grant_type != "authorization_code":
        return {}
    before = 0 if existing is None else approvals_of(existing.grant_type, existing.details)
    return {"approvals": before + 1}


def _undo_mac(connection: Connection, until: int, key: Secret) -> str:
    text = json.dumps(["undo", connection.id, connection.generation, until])
    return hmac.new(key.reveal().encode(), text.encode(), hashlib.sha256).hexdigest()


def _verifier_place(state_hash: str) -> Place:
    return Place(table="handshakes", column="sealed_verifier", row_id=state_hash, generation=0)


def _grant_of(granted: Granted) -> Grant:
    return Grant("authorization_code", refresh_token=granted.refresh_token, access_token=granted.access_token)


def _declined(error: str) -> str:
    if error in _DENIALS:
        return "The account's owner declined. Nothing was connected."
    shown = error if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", error) else "an unreadable error"
    return f"The provider reports: {shown}. Nothing was connected."


def _exchanged(provider: Provider, outcome: Outcome) -> Granted:
    match outcome:
        case Granted():
            return outcome
        case Refused(code=code):
            raise CallbackRefused(f"{provider.title} refused: {provider.explain(code) or code}")
        case Misconfigured(code=code):
            raise ProviderMisconfigured(
                f"{provider.title} refused our client: {provider.explain(code) or code}"
            )
        case _:
            raise ProviderUnavailable(
                f"{provider.title} did not answer usefully ({outcome.code}). Nothing was stored; try again in a moment."
            )
