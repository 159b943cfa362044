"""Public keys of callers that sign instead of sharing a secret (RFC 7517), stored or fetched from where
they publish them.

Only asymmetric algorithms are understood, and each key only with those it is made for: what an assertion's
header asks for never chooses how it is checked (RFC 8725 §3.1).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from joserfc.errors import JoseError, UnsupportedAlgorithmError
from joserfc.jwk import Key, RSAKey, import_key
from joserfc.jws import JWSRegistry

from app.clock import Clock
from app.errors import Overloaded, Unprocessable
from app.http_client import Deadlines, HttpClient, Purpose, WireFault

__all__ = ["ALGORITHMS", "KeySets", "PublicKey", "Signatures", "read_public_keys"]

ALGORITHMS: Final = ("ES256", "EdDSA", "Ed25519", "PS256", "RS256")
_EDWARDS: Final = frozenset({"EdDSA", "Ed25519"})  # RFC 9864 renames it; the signature is the same
_BY_KIND: Final[Mapping[tuple[str, str | None], frozenset[str]]] = {
    ("RSA", None): frozenset({"RS256", "PS256"}),
    ("EC", "P-256"): frozenset({"ES256"}),
    ("OKP", "Ed25519"): _EDWARDS,
}
_PRIVATE: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
_SHORTEST_RSA: Final = 2048  # bits: RFC 7518 §3.3
_MANY: Final = 32  # keys in one set
_FRESH: Final = 600.0  # seconds a fetched set is used without asking again
_MISS_EVERY: Final = 60.0  # seconds between two fetches for a key that is not in the set
_STALE: Final = 86_400.0  # seconds a fetched set serves while its address does not answer
_RETRY_EVERY: Final = 5.0  # seconds between two attempts at an address that does not answer
_DEADLINES: Final = Deadlines(connect=2.0, read=3.0, total=5.0)


@dataclass(frozen=True, slots=True)
class PublicKey:
    """One verified public key with the algorithms it may be used with."""

    kid: str | None
    key: Key
    algorithms: frozenset[str]


class Signatures(JWSRegistry):
    """The signature algorithms of this package; the library would warn of EdDSA's old name, which most
    clients send.
    """

    def get_alg(self, name: str) -> Any:
        """Look one up; none, HS256 and the rest are not in the list."""
        if name not in ALGORITHMS:
            raise UnsupportedAlgorithmError(f"Algorithm of '{name}' is not allowed")
        return self.algorithms[name]


def read_public_keys(jwks: object) -> tuple[PublicKey, ...]:
    """The signing keys of a JWK set; raises `Unprocessable` for a private key in it or when none can be
    used.
    """
    listed = jwks.get("keys") if isinstance(jwks, Mapping) else None
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not 1 <= len(listed) <= _MANY:
        raise Unprocessable(f'A JWKS is an object with 1 to {_MANY} keys: {{"keys": […]}} (RFC 7517 §5).')
    if any(isinstance(jwk, Mapping) and _PRIVATE & jwk.keys() for jwk in listed):
        raise Unprocessable(
            "The JWKS holds a private or symmetric key; only public keys may be given to anybody."
        )
    keys = tuple(key for jwk in listed if (key := _public_key(jwk)) is not None)
    if not keys:
        raise Unprocessable(
            "No key of the JWKS can be used: RSA of 2048 bits, EC P-256 or Ed25519, for signatures."
        )
    kids = [key.kid for key in keys if key.kid is not None]
    if len(set(kids)) != len(kids):
        raise Unprocessable("Two keys of the JWKS have the same kid.")
    return keys


class KeySets:
    """Key sets fetched from where callers publish them, cached in this process; safe for threads."""

    def __init__(self, http: HttpClient, clock: Clock) -> None:
        self._http = http
        self._clock = clock
        self._lock = threading.Lock()
        self._sets: dict[str, _Fetched] = {}

    def fetch(self, uri: str, *, kid: str | None) -> tuple[PublicKey, ...]:
        """The keys at a URI, not older than ten minutes; asked again, once a minute at most, when `kid` is
        not among them.

        Whoever holds a set that may still serve waits for nobody: one asks, the others go on with what is
        there. Raises `Overloaded` when the keys cannot be had, or are being asked for because of a `kid`
        nobody knows: then it is not known yet whether the caller is the one.
        """
        with self._lock:
            fetched = self._sets.setdefault(uri, _Fetched())
        now = self._clock.elapsed()
        held = fetched.serving(now)
        if held is not None and not fetched.due(now, kid):
            return held
        # Without keys everybody waits those few seconds for the result of one fetch.
        if not fetched.lock.acquire(blocking=held is None):
            assert held is not None
            if _is_missing(kid, held):
                raise _unknown()
            return held
        try:
            if fetched.due(self._clock.elapsed(), kid):
                self._renew(uri, fetched)
            held = fetched.serving(self._clock.elapsed())
        finally:
            fetched.lock.release()
        if held is None:
            raise _unknown()
        return held

    def _renew(self, uri: str, fetched: _Fetched) -> None:
        began = self._clock.elapsed()
        try:
            answer = self._http.send("GET", uri, purpose=Purpose.OPERATOR, deadlines=_DEADLINES)
            if answer.status == 200:
                fetched.kept = (began, read_public_keys(answer.json()))
        except (WireFault, Unprocessable):
            return
        finally:
            # Its end: counted from its beginning, a fetch that took long would be due again for the next in line.
            fetched.tried_at = self._clock.elapsed()


class _Fetched:
    __slots__ = ("kept", "lock", "tried_at")

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held by who fetches; the rest may be read without it
        self.kept: tuple[float, tuple[PublicKey, ...]] | None = None  # when they were asked for, and the keys
        self.tried_at = float("-inf")

    def serving(self, now: float) -> tuple[PublicKey, ...] | None:
        kept = self.kept
        return None if kept is None or now - kept[0] > _STALE else kept[1]

    def due(self, now: float, kid: str | None) -> bool:
        since, kept = now - self.tried_at, self.kept
        if kept is None or now - kept[0] > _FRESH:
            return since >= _RETRY_EVERY
        return _is_missing(kid, kept[1]) and since >= _MISS_EVERY


def _is_missing(kid: str | None, keys: Sequence[PublicKey]) -> bool:
    return kid is not None and all(key.kid != kid for key in keys)


def _unknown() -> Overloaded:
    return Overloaded("The keys of the caller cannot be fetched from its JWKS URI.", retry_after=_RETRY_EVERY)


def _public_key(jwk: object) -> PublicKey | None:
    """One key of a set, or None: a set may hold kinds we do not know, and those are passed over (RFC 7517
    §5).
    """
    if not isinstance(jwk, Mapping) or jwk.get("use", "sig") != "sig":
        return None
    curve = jwk.get("crv")
    kind = (str(jwk.get("kty")), None if curve is None else str(curve))
    algorithms = _narrowed(_BY_KIND.get(kind, frozenset()), jwk.get("alg"))
    kid = jwk.get("kid")
    if not algorithms or not (kid is None or isinstance(kid, str)):
        return None
    try:
        key = import_key({name: jwk[name] for name in ("kty", "crv", "x", "y", "n", "e") if name in jwk})
    except (JoseError, ValueError, TypeError, KeyError):
        return None
    if isinstance(key, RSAKey) and key.raw_value.key_size < _SHORTEST_RSA:
        return None
    return PublicKey(kid, key, algorithms)


def _narrowed(algorithms: frozenset[str], named: object) -> frozenset[str]:
    """What is left when the key names its algorithm; both names of Edwards signatures mean the same one."""
    if named is None or (named in _EDWARDS and algorithms == _EDWARDS):
        return algorithms
    return algorithms & {str(named)}
