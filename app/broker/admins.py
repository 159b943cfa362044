"""How an admin signs in: a one-time link made on the server's own command line, and the session it opens."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

import sqlalchemy as sa

from app.clock import Clock
from app.db.engine import Database
from app.db.schema import admin_logins, admin_sessions
from app.db.types import db_now
from app.errors import Unauthenticated
from app.secret import Secret

__all__ = ["AdminSession", "Admins"]

_LINK: Final = timedelta(minutes=10)
_SESSION: Final = timedelta(hours=12)
_IDLE: Final = timedelta(hours=1)
_SEEN_EVERY: Final = timedelta(minutes=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminSession:
    """A signed-in browser; `id_hash` names the session without being its key."""

    id_hash: str
    created_at: datetime
    expires_at: datetime
    key: Secret

    @property
    def csrf(self) -> Secret:
        """The token every form of this session carries; made of the session's key, so nothing needs storing."""
        return Secret(hmac.new(self.key.reveal().encode(), b"csrf", hashlib.sha256).hexdigest())


class Admins:
    """One-time logins and sessions; only digests are stored."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def make_login(self) -> tuple[Secret, datetime]:
        """A token that signs one browser in, once, within ten minutes; and when it expires."""
        token = Secret(secrets.token_urlsafe(32))
        now = self._clock.now()
        with self._database.write() as transaction:
            transaction.execute(
                sa.delete(admin_logins).where(admin_logins.c.expires_at < now - timedelta(days=1))
            )
            transaction.execute(
                sa.insert(admin_logins).values(
                    token_hash=token.sha256(), created_at=now, expires_at=now + _LINK
                )
            )
        return token, now + _LINK

    def may_sign_in(self, token: Secret) -> bool:
        """Whether the token would still sign somebody in; does not use it up (mail scanners open links, too)."""
        query = sa.select(admin_logins.c.token_hash).where(
            admin_logins.c.token_hash == token.sha256(),
            admin_logins.c.used_at.is_(None),
            admin_logins.c.expires_at > db_now(),
        )
        with self._database.read() as transaction:
            return transaction.execute(query).one_or_none() is not None

    def sign_in(self, token: Secret) -> Secret:
        """Use the login up and open a session; its key for the cookie. Raises `Unauthenticated`."""
        key = Secret(secrets.token_urlsafe(32))
        now = self._clock.now()
        with self._database.write() as transaction:
            used = transaction.execute(
                sa.update(admin_logins)
                .where(
                    admin_logins.c.token_hash == token.sha256(),
                    admin_logins.c.used_at.is_(None),
                    admin_logins.c.expires_at > db_now(),
                )
                .values(used_at=now)
            )
            if used.rowcount != 1:
                raise Unauthenticated("This login link is unknown, was used already, or has expired.")
            transaction.execute(sa.delete(admin_sessions).where(admin_sessions.c.expires_at < now))
            transaction.execute(
                sa.insert(admin_sessions).values(
                    id_hash=key.sha256(),
                    csrf_hash=self._session(key, now, now + _SESSION).csrf.sha256(),
                    created_at=now,
                    seen_at=now,
                    expires_at=now + _SESSION,
                )
            )
        return key

    def session(self, key: Secret) -> AdminSession | None:
        """The session with this key, None when it is unknown, over, or was idle for an hour."""
        with self._database.read() as transaction:
            row = transaction.execute(
                sa.select(admin_sessions).where(admin_sessions.c.id_hash == key.sha256())
            ).one_or_none()
        now = self._clock.now()
        if row is None or row.expires_at <= now or row.seen_at < now - _IDLE:
            return None
        if row.seen_at < now - _SEEN_EVERY:
            with self._database.write() as transaction:
                transaction.execute(
                    sa.update(admin_sessions)
                    .where(admin_sessions.c.id_hash == row.id_hash)
                    .values(seen_at=now)
                )
        return self._session(key, row.created_at, row.expires_at)

    def sign_out(self, key: Secret) -> None:
        """End the session."""
        with self._database.write() as transaction:
            transaction.execute(sa.delete(admin_sessions).where(admin_sessions.c.id_hash == key.sha256()))

    def _session(self, key: Secret, created_at: datetime, expires_at: datetime) -> AdminSession:
        return AdminSession(id_hash=key.sha256(), created_at=created_at, expires_at=expires_at, key=key)
