"""Callers that sign: private_key_jwt client authentication (RFC 7523 §3, OpenID Connect Core §9).

The register says which keys a caller has and each key with which algorithms; the assertion only points at
one of them. An assertion lives five minutes at most, is meant for us alone, and works once in the whole
installation.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, Final

from joserfc import jws, jwt
from joserfc.errors import JoseError

from app.access.callers import Caller, Callers, Registration
from app.access.keysets import ALGORITHMS, KeySets, PublicKey, Signatures, read_public_keys
from app.access.signing import SpentIds
from app.clock import Clock
from app.errors import Unauthenticated

__all__ = ["ASSERTION_TYPE", "Assertions"]

ASSERTION_TYPE: Final = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
_LONGEST: Final = 8192
_LONGEST_LIFE: Final = 300  # seconds
_LEEWAY: Final = 30  # seconds a caller's clock may be wrong
_LONGEST_JTI: Final = 256


class Assertions:
    """Verifies assertions; `audiences` are what `aud` may say: our issuer or our token endpoint."""

    def __init__(
        self, callers: Callers, keysets: KeySets, spent: SpentIds, clock: Clock, *, audiences: frozenset[str]
    ) -> None:
        self._callers = callers
        self._keysets = keysets
        self._spent = spent
        self._clock = clock
        self._audiences = audiences

    def verify(self, assertion: str, *, client_id: str | None = None) -> Caller:
        """The caller that made this assertion, which is spent by it; every fault is the same
        `Unauthenticated`.

        `client_id` is the form's, which must agree if it is there (RFC 7521 §4.2). Raises `Overloaded`
        while the keys of the caller cannot be fetched.
        """
        header, claimed = _unverified(assertion)
        issuer = claimed.get("iss")
        if not isinstance(issuer, str) or (client_id is not None and client_id != issuer):
            raise Unauthenticated
        registration = self._callers.by_client_id(issuer)
        if registration is None or not registration.caller.enabled or registration.way == "secret":
            raise Unauthenticated
        claims = self._signed_by(registration, assertion, header)
        expires, jti = self._check(claims, issuer)
        until = datetime.fromtimestamp(expires + _LEEWAY, UTC)
        if not self._spent.spend(issuer, jti, until=until):
            raise Unauthenticated
        return registration.caller

    def _signed_by(
        self, registration: Registration, assertion: str, header: dict[str, Any]
    ) -> dict[str, Any]:
        kid, algorithm = header.get("kid"), header.get("alg")
        if algorithm not in ALGORITHMS or not (kid is None or isinstance(kid, str)):
            raise Unauthenticated
        key = _choose(self._keys(registration, kid), kid, algorithm)
        try:
            return jwt.decode(assertion, key.key, registry=Signatures(algorithms=ALGORITHMS)).claims
        except (JoseError, ValueError, TypeError):
            raise Unauthenticated from None

    def _keys(self, registration: Registration, kid: str | None) -> tuple[PublicKey, ...]:
        if registration.jwks_uri is not None:
            return self._keysets.fetch(registration.jwks_uri, kid=kid)
        return read_public_keys(registration.jwks)

    def _check(self, claims: dict[str, Any], issuer: str) -> tuple[int, str]:
        now = self._clock.timestamp()
        expires, jti = claims.get("exp"), claims.get("jti")
        if claims.get("iss") != issuer or claims.get("sub") != issuer or not self._for_us(claims.get("aud")):
            raise Unauthenticated
        if (
            expires is None
            or not _is_number(expires)
            or not now - _LEEWAY < expires <= now + _LONGEST_LIFE + _LEEWAY
        ):
            raise Unauthenticated
        for name in ("nbf", "iat"):
            if name in claims and not (_is_number(claims[name]) and claims[name] <= now + _LEEWAY):
                raise Unauthenticated
        if not isinstance(jti, str) or not 1 <= len(jti) <= _LONGEST_JTI:
            raise Unauthenticated
        return int(expires), jti

    def _for_us(self, audience: Any) -> bool:
        """Meant for us alone: an assertion that another server could receive as well, it could also send on
        to us.
        """
        named = [audience] if isinstance(audience, str) else audience
        if not isinstance(named, list) or not named:
            return False
        return all(isinstance(one, str) and one in self._audiences for one in named)


def _unverified(assertion: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the assertion says of itself, good for nothing but looking up whose keys to check it with."""
    if len(assertion) > _LONGEST or not assertion.isascii():
        raise Unauthenticated
    try:
        parsed = jws.extract_compact(assertion.encode("ascii"))
        claims = json.loads(parsed.payload or b"")
    except (JoseError, ValueError, TypeError, RecursionError):
        raise Unauthenticated from None
    if not isinstance(claims, dict):
        raise Unauthenticated
    return parsed.headers(), claims


def _choose(keys: tuple[PublicKey, ...], kid: str | None, algorithm: str) -> PublicKey:
    """The key the header names; without a kid only if there is exactly one it can mean."""
    fitting = [key for key in keys if algorithm in key.algorithms and (kid is None or key.kid == kid)]
    if len(fitting) != 1:
        raise Unauthenticated
    return fitting[0]


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and value == value
        and abs(value) < 1e15
    )
