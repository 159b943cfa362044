"""The emulator's clock: the real one plus an offset that a test may advance.

Leases, expiries and windows are all read from here, so that a two-hour session ends in a microsecond.
Waiting (latency, hanging) stays in real time: advancing the clock never wakes a sleeping request.
"""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime


class ShiftedClock:
    """Real time moved forward by an offset in seconds; safe to use from many threads."""

    def __init__(self) -> None:
        self._offset = 0.0
        self._lock = threading.Lock()

    def now(self) -> float:
        """Tell the emulator's time as epoch seconds."""
        with self._lock:
            return time.time() + self._offset

    def advance(self, seconds: float) -> float:
        """Move the clock by `seconds` (negative moves it back) and return the new offset."""
        with self._lock:
            self._offset += seconds
            return self._offset

    def return_to_real(self) -> None:
        """Drop the offset."""
        with self._lock:
            self._offset = 0.0

    @property
    def offset(self) -> float:
        """Seconds between this clock and the real one."""
        with self._lock:
            return self._offset


def iso(moment: float) -> str:
    """Write epoch seconds as an ISO 8601 instant in UTC, to the millisecond."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
