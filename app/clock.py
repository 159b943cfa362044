"""The only place that knows what time it is.

Wall time is the database's, so that all processes agree (a lease taken on one host must mean the same on another): a
process keeps the offset between its own clock and the database's, measured whenever it talks to it, and `now()` applies it.
`elapsed()` counts seconds on a clock that goes on while the machine sleeps (CLOCK_BOOTTIME) and never jumps; leases and
deadlines are watched on it. Waiting goes through here too, so that a test can move time instead of spending it.
"""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from typing import Final

__all__ = ["Clock"]

_BOOTTIME: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Clock:
    """The time of this installation."""

    def __init__(self) -> None:
        self._offset = 0.0

    def timestamp(self) -> float:
        """Seconds since the epoch, in database time."""
        return self.local() + self._offset

    def now(self) -> datetime:
        """The same as an aware UTC datetime."""
        return datetime.fromtimestamp(self.timestamp(), UTC)

    def local(self) -> float:
        """Seconds since the epoch by this machine's own clock; only for measuring the offset and feeding SQLite."""
        return time.time()

    def elapsed(self) -> float:
        """Seconds on a clock that never jumps and does not stop while the machine is suspended."""
        return time.clock_gettime(_BOOTTIME)

    def sleep(self, seconds: float) -> None:
        """Do nothing for so many seconds."""
        if seconds > 0:
            time.sleep(seconds)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Wait until the event is set or so many seconds have passed; true when it is set."""
        return event.wait(max(0.0, seconds))

    @property
    def skew(self) -> float:
        """How many seconds the database's clock is ahead of this machine's."""
        return self._offset

    def agree(self, *, database: float, asked: float, answered: float) -> None:
        """Adopt the database's clock: `database` was read between local times `asked` and `answered` (seconds).

        Half the round trip is the best guess of when it was read; a round trip of over a second says too little.
        """
        if 0 <= answered - asked <= 1.0:
            self._offset = database - (asked + answered) / 2
