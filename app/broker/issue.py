"""Handing out: who may have a token gets a living one at once, and everything is recorded before it leaves.

What a process knows of a connection is kept opened in memory and believed for as long as the `connections` epoch says that
the row has not changed; so the usual hand-out touches no database but the audit trail's. Only when no living token is left
does a caller wait for a refresh, and only so many callers may wait that the rest of the threads go on serving the others.

Order of checks (P3 before P6 before P5 before P2): permission, then life, then the record, then life once more, because the
record may have taken a while.
"""

from __future__ import annotations

import copy
import math
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from math import inf
from typing import Final

from app.access.audit import Entry
from app.access.belief import EpochSource
from app.access.callers import Caller
from app.access.policy import Access, Action
from app.broker.connection import AdminState, Connection, Health, Tokens
from app.broker.refresh import EndingKind, Refresher, trouble_of
from app.broker.store import Store
from app.clock import Clock
from app.db.epoch import Epochs
from app.errors import (
    ConnectionDisabled,
    DatabaseUnavailable,
    DrawbridgeError,
    InvalidRequest,
    NeedsReconnect,
    NotFound,
    Overloaded,
    RefreshInProgress,
)
from app.secret import Secret
from app.telemetry import Event, metrics

__all__ = ["DEFAULT_MAX_WAIT", "LONGEST_MAX_WAIT", "HandOut", "Issuer", "Ready"]

DEFAULT_MAX_WAIT: Final = 10.0
LONGEST_MAX_WAIT: Final = 30.0
FORCED_EVERY: Final = 30.0
_SHORTEST_POLL: Final = 0.025
_LONGEST_POLL: Final = 0.25
# Seconds a waiter trusts a refresh under way to be what it waits for: an account connected anew elsewhere ends its wait.
_LONGEST_BLINDNESS: Final = 1.0
_PATIENCE: Final = 2.0  # seconds a caller waits for another thread to find out what has changed
_TAKING_UP: Final = 5.0  # seconds until whoever claimed a forced refresh has the lease, on a busy machine too
_SLOW_RECORD: Final = 0.15  # seconds; a record that took longer makes us look at the permission again


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HandOut:
    """A token on its way out, with what a caller needs to use it; one object per connection and generation."""

    connection_id: str
    connection: str
    provider: str
    app_id: str
    account_id: str
    user_id: str
    instance_url: str | None
    scopes: tuple[str, ...]
    generation: int
    access_token: Secret | None
    expires_at: datetime | None
    expires: float  # seconds since the epoch; 0 without a token
    life: float
    digest: str  # SHA-256 of the access token in hex
    enabled: bool

    def left(self, now: float) -> float:
        """Seconds the token still lives."""
        return self.expires - now


@dataclass(frozen=True, slots=True)
class Ready:
    """A hand-out that lacks nothing but its record; `needed` is the seconds the token must still live."""

    caller: Caller
    token: HandOut
    needed: float


class Issuer:
    """The hand-out path; `waiters` is how many threads may wait for refreshes at the same time."""

    def __init__(
        self,
        store: Store,
        *,
        access: Access,
        refresher: Refresher,
        epochs: EpochSource,
        clock: Clock,
        waiters: int,
        assumed_life: float,
    ) -> None:
        self._store = store
        self._access = access
        self._refresher = refresher
        self._epochs = epochs
        self._clock = clock
        self._assumed_life = assumed_life
        self._room = threading.BoundedSemaphore(max(1, waiters))
        self._lock = threading.Lock()
        self._known: dict[str, HandOut] = {}
        self._names: dict[str, str] = {}
        self._seen_epoch = -1
        self._seen_removed = -1
        self._seen_at = -inf
        # Token, way and seconds it took; appended to by many threads, emptied by one.
        self._handed: deque[tuple[HandOut, str, float]] = deque()
        self._used: set[str] = set()

    def issue(
        self,
        caller: Caller,
        name: str,
        *,
        min_ttl: float | None = None,
        max_wait: float | None = None,
        rejected: str | None = None,
    ) -> HandOut:
        """A token of the connection that lives at least `min_ttl` seconds; waits at most `max_wait` seconds for one.

        `rejected` is the SHA-256 (hex) of an access token the provider refused: it is refreshed away if it is still the
        current one. Raises `Forbidden`, `NotFound`, `InvalidRequest`, `ConnectionDisabled`, `NeedsReconnect`,
        `ProviderUnavailable` and its kin, `RefreshInProgress` or `AuditUnavailable`.
        """
        began = self._clock.elapsed()
        deadline: float | None = None
        while True:
            self._access.require(caller, Action.TOKEN_ISSUE, name)
            token = self._current(name)
            needed = _needed(token, min_ttl)
            refused = rejected is not None and rejected == token.digest
            if token.enabled and token.left(self._clock.timestamp()) >= needed and not refused:
                if self._recorded(caller, token, needed):
                    way, took = "kept" if deadline is None else "waited", self._clock.elapsed() - began
                    self._handed.append((token, way, took))
                    return token
                continue
            if deadline is None:
                deadline = self._clock.elapsed() + _bounded(max_wait)
            try:
                self._wait_for_another(token, deadline=deadline, forced=refused)
            except (ConnectionDisabled, NeedsReconnect) as decided:
                self._deny(caller, token, decided)
                raise

    def ready(self, caller: Caller, name: str, *, min_ttl: float | None = None) -> Ready | None:
        """The hand-out if everything it needs is known in this process; None when `issue` has to find out, wait or refuse.

        Never waits and records nothing.
        """
        epochs, token = self._epochs.glance(), self._known.get(name)
        if epochs is None or epochs.connections != self._seen_epoch or token is None:
            return None
        if not self._access.remembers(caller, Action.TOKEN_ISSUE, name):
            return None
        if not token.enabled or (min_ttl is not None and min_ttl > token.life / 2):
            return None
        needed = _needed(token, min_ttl)
        return Ready(caller, token, needed) if token.left(self._clock.timestamp()) >= needed else None

    def hand_out(self, those: Sequence[Ready]) -> list[HandOut | None]:
        """Record them all with one wait for the disk; None for each that `issue` has to decide anew.

        Raises `AuditUnavailable`; then nothing may leave.
        """
        began = self._clock.elapsed()
        self._access.record_all([_entry(one.caller, one.token) for one in those])
        took = self._clock.elapsed() - began
        slow = took > _SLOW_RECORD
        now = self._clock.timestamp()
        handed: list[HandOut | None] = []
        for one in those:
            good = one.token.left(now) >= one.needed and not (slow and self._has_changed(one))
            if good:
                self._handed.append((one.token, "kept", took))
            handed.append(one.token if good else None)
        return handed

    def learn(self, epochs: Epochs) -> None:
        """Drop what has changed since the last call, as soon as a change is noticed and not when somebody asks.

        Were the database gone by then, no token that this process knows could be told from one that was changed. Raises
        `DatabaseUnavailable`.
        """
        if epochs.connections != self._seen_epoch:
            self._drop_changed(epochs)

    def waiting(self) -> int:
        """How many threads may still begin to wait."""
        return self._room._value  # the semaphore offers no other way to look

    def count(self) -> None:
        """Count what was handed out since the last call; done now and then, for each count costs a hand-out dearly."""
        counts: Counter[tuple[str, str]] = Counter()
        times: defaultdict[str, list[float]] = defaultdict(list)
        while self._handed:
            token, way, seconds = self._handed.popleft()
            counts[token.provider, way] += 1
            times[way].append(seconds)
            self._used.add(token.connection_id)
        for (provider, way), number in counts.items():
            metrics.hand_outs.labels(provider, way).inc(number)
        for way, those in times.items():
            metrics.hand_out_seconds.observe_all(those, way)

    def take_used(self) -> set[str]:
        """The ids handed out since the last call, for `Store.mark_used`."""
        used, self._used = self._used, set()
        return used

    def _recorded(self, caller: Caller, token: HandOut, needed: float) -> bool:
        """Record the hand-out; false when the token did not outlive that or something may have changed meanwhile."""
        began = self._clock.elapsed()
        self._access.record_all([_entry(caller, token)])
        if self._clock.elapsed() - began > _SLOW_RECORD:
            self._access.require(caller, Action.TOKEN_ISSUE, token.connection)
            if self._current(token.connection) is not token:
                return False
        return token.left(self._clock.timestamp()) >= needed

    def _has_changed(self, one: Ready) -> bool:
        again = self.ready(one.caller, one.token.connection)
        return again is None or again.token is not one.token

    # What this process knows

    def _current(self, name: str) -> HandOut:
        epochs = self._epochs.look()
        if epochs.connections != self._seen_epoch:
            self._drop_changed(epochs)
        return self._known.get(name) or self._load(name)

    def _drop_changed(self, epochs: Epochs) -> None:
        if not self._lock.acquire(timeout=_PATIENCE):
            # Something changed and the database is slow to say what: it may be what was taken away (P6).
            raise DatabaseUnavailable("The database is slow to say what has changed.")
        try:
            if epochs.connections == self._seen_epoch or epochs.read_at <= self._seen_at:
                return  # another thread was here with this reading, or with one made after it
            if epochs.connections < self._seen_epoch:
                # The database went back, and counts anew what was counted before: nothing known can be told from it.
                self._known.clear()
                self._names.clear()
            elif self._seen_epoch >= 0 and self._known:
                for identifier in self._outdated(epochs):
                    self._known.pop(self._names.pop(identifier, ""), None)
            self._seen_epoch, self._seen_removed = epochs.connections, epochs.removed
            self._seen_at = epochs.read_at
        finally:
            self._lock.release()

    def _outdated(self, epochs: Epochs) -> set[str]:
        """The ids of known connections that were changed or removed since the last look."""
        outdated = set(self._store.changes_since(self._seen_epoch))
        if epochs.removed != self._seen_removed:  # no row is left to show it
            known = list(self._names)
            outdated |= set(known) - self._store.surviving(known)
        return outdated

    def _load(self, name: str) -> HandOut:
        epoch = self._seen_epoch
        found = self._store.read_with_tokens(name)
        if found is None:
            raise NotFound(f"There is no connection named {name!r}.")
        token = _hand_out(*found, assumed_life=self._assumed_life)
        with self._lock:
            # A change noticed since would have been dropped before this was kept.
            if self._seen_epoch == epoch:
                self._known[name] = token
                self._names[token.connection_id] = name
        return token

    # Waiting

    def _wait_for_another(self, token: HandOut, *, deadline: float, forced: bool) -> None:
        """Return when the connection may have another token than this; raises what the caller must be told otherwise."""
        with self._place_to_wait():
            if forced and not self._store.claim_forced(token.connection_id, every=FORCED_EVERY):
                self._follow(token, deadline=deadline)
                return None
            # Asked for, so the worker keeps it fresh from now on.
            self._store.mark_used([token.connection_id], now=self._clock.now())
            pause = _SHORTEST_POLL
            while True:
                connection = self._store.get(token.connection_id)
                if connection is None or connection.generation != token.generation:
                    return self._forget(token)
                if not _enabled(connection):
                    raise trouble_of(connection, self._clock.now())
                if not token.enabled:
                    return self._forget(token)  # switched on again a moment ago; its token may well live
                if not self._refreshed(connection, deadline):
                    self._pause(pause, deadline)
                    pause = min(2 * pause, _LONGEST_POLL)

    def _refreshed(self, connection: Connection, deadline: float) -> bool:
        """Have it refreshed; false when another process is at it. True as well when it is time to look at the row again."""
        left = max(0.0, deadline - self._clock.elapsed())
        try:
            ending = self._refresher.ask(connection).result(min(left, _LONGEST_BLINDNESS))
        except FutureTimeout:
            if left > _LONGEST_BLINDNESS:
                return True
            raise RefreshInProgress() from None
        except CancelledError:
            raise Overloaded("This process is shutting down.") from None
        if ending.error is not None:
            raise copy.copy(ending.error)
        return ending.kind is not EndingKind.BUSY

    def _follow(self, token: HandOut, *, deadline: float) -> None:
        """Somebody forced a refresh just now: wait for its end, or say when the next may be forced."""
        pause = _SHORTEST_POLL
        while True:
            connection = self._store.get(token.connection_id)
            if connection is None or connection.generation != token.generation:
                return self._forget(token)
            now = self._clock.now()
            if not _enabled(connection) or connection.health is Health.NEEDS_RECONNECT:
                raise trouble_of(connection, now)
            if connection.lease_until is None or connection.lease_until <= now:
                since = (now - connection.forced_at).total_seconds() if connection.forced_at else 0.0
                if _failed_since_forced(connection) or since > _TAKING_UP:
                    raise RefreshInProgress(
                        "A refresh was forced a moment ago and brought no other token.",
                        retry_after=max(1.0, FORCED_EVERY - since),
                    )
            self._pause(pause, deadline)
            pause = min(2 * pause, _LONGEST_POLL)

    def _pause(self, seconds: float, deadline: float) -> None:
        left = deadline - self._clock.elapsed()
        if left <= 0:
            raise RefreshInProgress()
        self._clock.sleep(min(seconds, left))

    def _forget(self, token: HandOut) -> None:
        with self._lock:
            if self._known.get(token.connection) is token:
                del self._known[token.connection]

    @contextmanager
    def _place_to_wait(self) -> Iterator[None]:
        if not self._room.acquire(blocking=False):
            metrics.waiters_turned_away.inc()
            raise RefreshInProgress("Too many callers are waiting for refreshes.")
        metrics.waiters.inc()
        try:
            yield
        finally:
            metrics.waiters.dec()
            self._room.release()

    def _deny(self, caller: Caller, token: HandOut, decided: DrawbridgeError) -> None:
        """Record what was decided about this connection; a provider that is away decides nothing."""
        self._access.refuse(caller, token.connection, code=decided.code)


def _entry(caller: Caller, token: HandOut) -> Entry:
    return Entry(
        caller.actor, Event.TOKEN_ISSUED, token.connection, "issued", {"generation": token.generation}
    )


def _needed(token: HandOut, min_ttl: float | None) -> float:
    if min_ttl is None:
        return min(60.0, token.life / 4)
    if not math.isfinite(min_ttl):
        raise InvalidRequest("min_ttl is not a number of seconds.")
    if min_ttl > token.life / 2:
        raise InvalidRequest(f"min_ttl may be at most {int(token.life / 2)} seconds for this connection.")
    return max(min_ttl, 0.0) or 1e-9  # never a token that dies this very moment


def _bounded(max_wait: float | None) -> float:
    if max_wait is None:
        return DEFAULT_MAX_WAIT
    if math.isnan(max_wait):
        raise InvalidRequest("max_wait is not a number of seconds.")
    return min(max(max_wait, 0.0), LONGEST_MAX_WAIT)


def _failed_since_forced(connection: Connection) -> bool:
    """Whether the refresh that was forced last, or a later one, has ended without a token."""
    failed_at, forced_at = connection.last_error_at, connection.forced_at
    return failed_at is not None and forced_at is not None and failed_at >= forced_at


def _enabled(connection: Connection) -> bool:
    return connection.admin_state is AdminState.ENABLED and connection.exported_at is None


def _hand_out(connection: Connection, tokens: Tokens, *, assumed_life: float) -> HandOut:
    access_token = tokens.access_token
    alive = access_token is not None and connection.expires_at is not None
    return HandOut(
        connection_id=connection.id,
        connection=connection.name,
        provider=connection.provider,
        app_id=connection.app_id,
        account_id=connection.account_id,
        user_id=connection.user_id,
        instance_url=connection.instance_url,
        scopes=connection.scopes_granted,
        generation=connection.generation,
        access_token=access_token,
        expires_at=connection.expires_at,
        expires=connection.expires_at.timestamp() if alive and connection.expires_at else 0.0,
        life=connection.life_seconds or assumed_life,
        digest=access_token.sha256() if access_token else "",
        enabled=_enabled(connection),
    )
