"""How often a caller may ask: a token bucket for each, in each process."""

from __future__ import annotations

import threading
from typing import Final

from app.clock import Clock
from app.errors import RateLimited

__all__ = ["DEFAULT_RATE", "Rates"]

DEFAULT_RATE: Final = 100.0  # requests per second and process
_MANY: Final = 10_000  # buckets; more than that are of callers long gone


class Rates:
    """A bucket per caller that holds one second's worth and at least one request; safe for threads."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}

    def give_back(self, caller_id: str) -> None:
        """Undo one `take` whose request will be counted again."""
        with self._lock:
            if (found := self._buckets.get(caller_id)) is not None:
                self._buckets[caller_id] = (found[0] + 1.0, found[1])

    def take(self, caller_id: str, rate: float | None) -> None:
        """Count one request; raises `RateLimited` with the seconds until the next may come."""
        per_second = DEFAULT_RATE if rate is None else rate
        size = max(1.0, per_second)
        now = self._clock.elapsed()
        with self._lock:
            level, since = self._buckets.get(caller_id, (size, now))
            level = min(size, level + max(0.0, now - since) * per_second)
            allowed = level >= 1.0
            if len(self._buckets) > _MANY:
                self._buckets.clear()
            self._buckets[caller_id] = (level - 1.0 if allowed else level, now)
        if not allowed:
            raise RateLimited(retry_after=(1.0 - level) / per_second)
