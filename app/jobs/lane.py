"""One app's due connections on their way to the broker: how many at once, how many a second, and when not at all."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final

from app.broker.connection import Connection
from app.broker.refresh import Ending, EndingKind
from app.clock import Clock

__all__ = ["DEFAULT_RATE", "HOLD", "IN_FLIGHT", "Lane"]

HOLD: Final = 10.0
"""Seconds a claimed row is left alone by other workers."""

IN_FLIGHT: Final = 16
"""Refreshes of one app under way or about to be; the broker runs half of them at a time, so its threads never idle."""

# Neither Salesforce nor HubSpot publishes a limit for token requests; this many keep 100,000 connections with tokens of
# an hour alive (100,000 / 3,300 s = 30 a second).
DEFAULT_RATE: Final = 50.0


class Lane:
    """One app's due connections, and how fast they may go out from this worker; `rate` is refreshes per second."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.queue: OrderedDict[str, Connection] = OrderedDict()
        self.rate = DEFAULT_RATE
        self.renewed_at = self.looked_at = float("-inf")
        self._lock = threading.Lock()
        self._running: set[str] = set()
        self._level, self._filled_at = 1.0, clock.elapsed()
        self._paused_until = float("-inf")
        self._probing = False

    def add(self, connection: Connection) -> bool:
        """Queue a claimed connection; false when the queue already holds what goes out within one hold."""
        with self._lock:
            if connection.id in self.queue or connection.id in self._running:
                return True
        if len(self.queue) >= max(IN_FLIGHT, self.rate * HOLD):
            return False
        self.queue[connection.id] = connection
        return True

    def next(self) -> Connection | None:
        """The connection to refresh now, None while the app has as many as it may, is paused, or nothing is queued."""
        now = self._clock.elapsed()
        with self._lock:
            at_once = 1 if self._probing else IN_FLIGHT
            if not self.queue or now < self._paused_until or len(self._running) >= at_once:
                return None
            if not self._take(now):
                return None
            _, connection = self.queue.popitem(last=False)
            self._running.add(connection.id)
            return connection

    def ended(self, connection_id: str, ending: Ending | None) -> None:
        """Note that a refresh is over, however it ended; called from the broker's threads."""
        with self._lock:
            self._running.discard(connection_id)
            if ending is not None and ending.kind is EndingKind.REFRESHED:
                self._probing = False

    def pause(self, until: float) -> None:
        """Send nothing before `until` (elapsed seconds), then one at a time until one succeeds."""
        with self._lock:
            self._paused_until, self._probing = until, True

    def _take(self, now: float) -> bool:
        # A quarter of a second's worth may go out at once: smooth enough for a limit a vendor counts per second.
        size = max(1.0, self.rate / 4)
        self._level = min(size, self._level + (now - self._filled_at) * self.rate)
        self._filled_at = now
        if self._level < 1.0:
            return False
        self._level -= 1.0
        return True
