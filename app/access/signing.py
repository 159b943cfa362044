"""Our own signing keys and the tokens made with them: JWTs after RFC 9068, ES256 and nothing else.

A key signs for 30 days and verifies for as long as a token of its last minute may live. Private halves are
sealed like any other secret. A token names the version of its caller, so a new secret or a disabled caller
kills it within a second, without a list; single tokens are revoked by spending their `jti`, in the table
that already keeps spent ones.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from joserfc import jws, jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey
from sqlalchemy import delete, insert, select
from sqlalchemy.exc import IntegrityError

from app.access.belief import EpochSource
from app.access.callers import Caller
from app.access.permissions import Action
from app.clock import Clock
from app.crypto.envelope import Place, Sealer
from app.db.engine import Database
from app.db.epoch import bump
from app.db.schema import assertions_seen, signing_keys
from app.errors import Unauthenticated
from app.secret import Secret
from app.telemetry import Event, log

__all__ = ["TOKEN_LIFE", "AccessTokens", "Minted", "SigningKeys", "SpentIds", "Verified"]

TOKEN_LIFE: Final = 900  # seconds
_SIGNS: Final = timedelta(days=30)
_VERIFIES: Final = _SIGNS + timedelta(seconds=TOKEN_LIFE + 60)
_ALGORITHM: Final = ("ES256",)
_TYPES: Final = ("at+jwt", "application/at+jwt")  # RFC 9068 §4
_LONGEST_TOKEN: Final = 4096


@dataclass(frozen=True, slots=True)
class Minted:
    """A new token; `expires_at` in seconds since 1970."""

    token: Secret
    jti: str
    expires_at: int


@dataclass(frozen=True, slots=True)
class Verified:
    """What a token of ours says, after everything about it was checked but whether its caller still is the
    same.
    """

    client_id: str
    caller_version: int
    scopes: frozenset[Action]
    jti: str
    issued_at: int
    expires_at: int


class SpentIds:
    """Ids that may be used once, or never again: `jti` of assertions and of revoked tokens."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def spend(self, issuer: str, jti: str, *, until: datetime) -> bool:
        """Mark an id as used; false when it already was. The primary key decides between processes (RFC
        7523 §3).
        """
        try:
            with self._database.write() as connection:
                connection.execute(
                    insert(assertions_seen).values(key=_spent_key(issuer, jti), expires_at=until)
                )
        except IntegrityError:
            return False
        return True

    def revoke(self, issuer: str, jti: str, *, until: datetime) -> bool:
        """The same for a token of ours that processes may believe already: the epoch tells them to look
        again.
        """
        try:
            with self._database.write() as connection:
                bump(connection, "access")
                connection.execute(
                    insert(assertions_seen).values(key=_spent_key(issuer, jti), expires_at=until)
                )
        except IntegrityError:
            return False
        return True

    def is_spent(self, issuer: str, jti: str) -> bool:
        """Whether the id was used or revoked."""
        question = select(assertions_seen.c.key).where(assertions_seen.c.key == _spent_key(issuer, jti))
        with self._database.read() as connection:
            return connection.execute(question).first() is not None

    def sweep(self) -> int:
        """Forget ids whose tokens have expired anyway; the count of them."""
        with self._database.write() as connection:
            gone = delete(assertions_seen).where(assertions_seen.c.expires_at < self._clock.now())
            return connection.execute(gone).rowcount


class SigningKeys:
    """The keys of this installation, made when needed; safe for threads and for several processes."""

    def __init__(self, database: Database, sealer: Sealer, clock: Clock, epochs: EpochSource) -> None:
        self._database = database
        self._sealer = sealer
        self._clock = clock
        self._epochs = epochs
        self._signer: tuple[int, datetime, ECKey] | None = None
        self._verifiers: tuple[int, dict[str, tuple[datetime, ECKey]]] = (-1, {})

    def signer(self) -> ECKey:
        """The key to sign with now; it carries its kid."""
        epoch, now = self._epochs.look().access, self._clock.now()
        if self._signer is not None and self._signer[0] == epoch and now < self._signer[1]:
            return self._signer[2]
        if (found := self._newest(now)) is None:
            self._make(now)
            found = self._newest(now)
            assert found is not None
        signs_until, key = found
        self._signer = (epoch, signs_until, key)
        return key

    def verifier(self, kid: str) -> ECKey | None:
        """The public key of this name if tokens may still be verified with it."""
        epoch = self._epochs.look().access
        if self._verifiers[0] != epoch:
            self._verifiers = (epoch, {})
        known = self._verifiers[1]
        if kid not in known:
            if (found := self._public(kid)) is None:
                return None
            known[kid] = found
        verifies_until, key = known[kid]
        return key if self._clock.now() < verifies_until else None

    def public_jwks(self) -> dict[str, Any]:
        """The set to publish (RFC 7517 §5): every key a living token may have been signed with."""
        question = (
            select(signing_keys.c.public_jwk)
            .where(signing_keys.c.verifies_until > self._clock.now())
            .order_by(signing_keys.c.created_at.desc(), signing_keys.c.kid)
        )
        with self._database.read() as connection:
            return {"keys": list(connection.scalars(question))}

    def rotate(self) -> str:
        """Sign with a new key from now on, and return its kid; tokens signed with the old ones live on."""
        return self._make(self._clock.now())

    def sweep(self) -> int:
        """Remove keys that nothing can be verified with any more; the count of them."""
        with self._database.write() as connection:
            gone = delete(signing_keys).where(signing_keys.c.verifies_until < self._clock.now())
            return connection.execute(gone).rowcount

    def _newest(self, now: datetime) -> tuple[datetime, ECKey] | None:
        columns = signing_keys.c
        question = (
            select(columns.kid, columns.sealed, columns.signs_until)
            .where(columns.signs_until > now)
            .order_by(columns.created_at.desc(), columns.kid)
            .limit(1)
        )
        with self._database.read() as connection:
            row = connection.execute(question).one_or_none()
        if row is None:
            return None
        return row.signs_until, ECKey.import_key(json.loads(self._sealer.open(row.sealed, _place(row.kid))))

    def _make(self, now: datetime) -> str:
        kid = secrets.token_urlsafe(16)
        marks = {"kid": kid, "use": "sig", "alg": "ES256"}
        key = ECKey.generate_key("P-256", private=True)
        private: dict[str, Any] = {**key.as_dict(private=True), **marks}
        sealed = self._sealer.seal(json.dumps(private).encode(), _place(kid))
        with self._database.write() as connection:
            bump(connection, "access")
            connection.execute(
                insert(signing_keys).values(
                    kid=kid,
                    public_jwk={**key.as_dict(private=False), **marks},
                    sealed=sealed.blob,
                    kek_id=sealed.kek_id,
                    created_at=now,
                    signs_until=now + _SIGNS,
                    verifies_until=now + _VERIFIES,
                )
            )
        log(Event.SIGNING_KEY_ROTATED, kid=kid)
        return kid

    def _public(self, kid: str) -> tuple[datetime, ECKey] | None:
        question = select(signing_keys.c.public_jwk, signing_keys.c.verifies_until).where(
            signing_keys.c.kid == kid
        )
        with self._database.read() as connection:
            row = connection.execute(question).one_or_none()
        return None if row is None else (row.verifies_until, ECKey.import_key(row.public_jwk))


class AccessTokens:
    """Makes and checks tokens for callers; `issuer` is PUBLIC_URL, and the audience too, for nobody else
    takes them.
    """

    def __init__(self, issuer: str, keys: SigningKeys, spent: SpentIds, clock: Clock) -> None:
        self.issuer = issuer
        self._keys = keys
        self._spent = spent
        self._clock = clock

    def mint(self, caller: Caller, scopes: frozenset[Action]) -> Minted:
        """Make a token that lets the caller do what it may within these scopes, for fifteen minutes."""
        key, now = self._keys.signer(), int(self._clock.timestamp())
        jti = secrets.token_urlsafe(16)
        claims = {
            "iss": self.issuer,
            "aud": self.issuer,
            "sub": caller.client_id,
            "client_id": caller.client_id,
            "caller_version": caller.version,
            "scope": " ".join(sorted(scopes)),
            "jti": jti,
            "iat": now,
            "exp": now + TOKEN_LIFE,
        }
        header = {"alg": "ES256", "typ": "at+jwt", "kid": key.kid}
        return Minted(Secret(jwt.encode(header, claims, key, algorithms=_ALGORITHM)), jti, now + TOKEN_LIFE)

    def verify(self, token: Secret) -> Verified:
        """Check signature, type, issuer, audience, expiry and revocation (RFC 9068 §4); every fault is
        `Unauthenticated`.
        """
        verified = self._verify(token.reveal())
        if verified is None or self._spent.is_spent(self.issuer, verified.jti):
            raise Unauthenticated
        return verified

    def revoke(self, verified: Verified) -> bool:
        """Make one token worthless on every process within a second; false when it already was."""
        until = self._clock.now() + timedelta(seconds=TOKEN_LIFE + 60)
        return self._spent.revoke(self.issuer, verified.jti, until=until)

    def _verify(self, text: str) -> Verified | None:
        if len(text) > _LONGEST_TOKEN:
            return None
        try:
            header = jws.extract_compact(text.encode("ascii")).headers()
            kid = header.get("kid")
            if header.get("alg") != "ES256" or header.get("typ") not in _TYPES or not isinstance(kid, str):
                return None
            key = self._keys.verifier(kid)
            if key is None:
                return None
            claims = jwt.decode(text, key, algorithms=_ALGORITHM).claims
        except (JoseError, ValueError, TypeError):  # the library lets some malformed input through as these
            return None
        return self._read(claims)

    def _read(self, claims: dict[str, Any]) -> Verified | None:
        client_id, version, jti = claims.get("client_id"), claims.get("caller_version"), claims.get("jti")
        scope, issued, expires = claims.get("scope"), claims.get("iat"), claims.get("exp")
        if (
            claims.get("iss") != self.issuer
            or claims.get("aud") != self.issuer
            or claims.get("sub") != client_id
        ):
            return None
        if not (isinstance(client_id, str) and isinstance(jti, str) and isinstance(scope, str)):
            return None
        if not (isinstance(version, int) and isinstance(issued, int) and isinstance(expires, int)):
            return None
        if expires <= self._clock.timestamp():
            return None
        scopes = frozenset(Action(word) for word in scope.split() if word in set(Action))
        return Verified(client_id, version, scopes, jti, issued, expires)


def _place(kid: str) -> Place:
    return Place("signing_keys", "sealed", kid, 0)


def _spent_key(issuer: str, jti: str) -> str:
    """Length in front, so that no other pair of issuer and id gives the same key."""
    return hashlib.sha256(f"{len(issuer)}:{issuer}:{jti}".encode("utf-8", "surrogatepass")).hexdigest()
