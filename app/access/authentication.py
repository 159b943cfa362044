"""The hot path: an Authorization header in, a verified caller out.

A header that was verified once is believed, under the SHA-256 of its text, while the epoch "access" stands
still, and a token not beyond its own expiry. Only successes are kept; a failure costs one indexed look-up
at most, each time.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from hashlib import sha256
from math import inf
from typing import Final

from app.access.belief import EpochSource
from app.access.callers import Caller, CallerId, Callers
from app.access.credentials import LONGEST_HEADER, Basic, Bearer, parse
from app.access.denials import Denials
from app.access.limits import Rates
from app.access.signing import AccessTokens
from app.clock import Clock
from app.errors import Forbidden, RateLimited, Unauthenticated
from app.telemetry import metrics

__all__ = ["Authentication"]

_MANY: Final = 20_000  # verified headers kept; each renewal of a caller's token adds one


class Authentication:
    """Tells who is asking; safe for threads."""

    def __init__(
        self,
        callers: Callers,
        tokens: AccessTokens,
        *,
        epochs: EpochSource,
        denials: Denials,
        clock: Clock,
    ) -> None:
        self._callers = callers
        self._tokens = tokens
        self._epochs = epochs
        self._denials = denials
        self._clock = clock
        self._rates = Rates(clock)
        self._believed = _Believed(-1)
        self._lock = threading.Lock()
        self._used: dict[CallerId, datetime] = {}

    def authenticate(self, header: str | None, *, address: str | None = None) -> Caller:
        """The caller a header proves, or `Unauthenticated`, which is on record by then; the message never
        says why.

        `address` is where the request came from. Raises `Forbidden` outside the caller's allow-list,
        `RateLimited` above its rate, and `AuditUnavailable` when a refusal cannot be recorded.
        """
        try:
            caller = self._believe(header)
        except Unauthenticated:
            self._denials.unknown(_way(header))
            raise
        self.admit(caller, address=address)
        return caller

    def recall(self, header: str) -> Caller | None:
        """The caller a header proved before; None when it has to be looked at anew. Never waits, records nothing."""
        epochs, believed = self._epochs.glance(), self._believed
        if epochs is None or believed.epoch != epochs.access or len(header) > LONGEST_HEADER:
            return None
        found = believed.headers.get(_key(header))
        return found[0] if found is not None and self._clock.timestamp() < found[1] else None

    def admit(self, caller: Caller, *, address: str | None) -> None:
        """Hold a caller that has proved itself to its allow-list and its rate."""
        if caller.allow_ips and not caller.may_come_from(address):
            self._denials.known(caller.actor, action="authenticate", target="", code="address")
            raise Forbidden("This caller may not come from that address.")
        self._rates.take(caller.id, caller.rate)
        self._used[caller.id] = self._clock.now()

    def admits(self, caller: Caller, *, address: str | None) -> bool:
        """Whether `admit` lets it pass, which is counted then; records nothing. `readmit` undoes the count."""
        if caller.allow_ips and not caller.may_come_from(address):
            return False
        try:
            self._rates.take(caller.id, caller.rate)
        except RateLimited:
            return False
        self._used[caller.id] = self._clock.now()
        return True

    def readmit(self, caller: Caller) -> None:
        """Forget one that `admits` let pass: its request will be admitted anew."""
        self._rates.give_back(caller.id)

    def note_used(self) -> None:
        """Write down when callers last asked; once a minute is enough."""
        with self._lock:
            used, self._used = self._used, {}
        self._callers.note_used(dict(used))  # a copy: a thread may still be putting itself into the old one

    def _believe(self, header: str | None) -> Caller:
        if header is None or len(header) > LONGEST_HEADER:
            raise Unauthenticated
        epoch = self._epochs.look().access
        believed = self._believed
        if believed.epoch != epoch:
            believed = self._believed = _Believed(epoch)
        key = _key(header)
        found = believed.headers.get(key)
        if found is not None and self._clock.timestamp() < found[1]:
            return found[0]
        # The epoch was read first: what is verified now is at least as new as it, and is dropped with it.
        verified = self._verify(header)
        metrics.authentications.labels(_way(header), "accepted").inc()
        if len(believed.headers) >= _MANY:
            believed.headers.clear()
        believed.headers[key] = verified
        return verified[0]

    def _verify(self, header: str) -> tuple[Caller, float]:
        match parse(header):
            case Basic(client_id, secret):
                return self._callers.by_secret(client_id, secret), inf
            case Bearer(token):
                verified = self._tokens.verify(token)
        registration = self._callers.by_client_id(verified.client_id)
        if registration is None or not registration.caller.enabled:
            raise Unauthenticated
        if registration.caller.version != verified.caller_version:
            raise Unauthenticated
        return replace(registration.caller, scopes=verified.scopes), verified.expires_at


class _Believed:
    __slots__ = ("epoch", "headers")

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.headers: dict[bytes, tuple[Caller, float]] = {}


_WAYS: Final[Mapping[str, str]] = {"basic": "basic", "bearer": "bearer"}


def _key(header: str) -> bytes:
    return sha256(header.encode("utf-8", "surrogatepass")).digest()


def _way(header: str | None) -> str:
    if header is None:
        return "none"
    return _WAYS.get(header[:16].strip().partition(" ")[0].lower(), "other")
