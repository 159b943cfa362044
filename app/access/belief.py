"""How long this process goes on believing what it knows while the database is away."""

from __future__ import annotations

from typing import Protocol

from app.clock import Clock
from app.db.epoch import Epochs, EpochWatch
from app.errors import DatabaseUnavailable

__all__ = ["Belief", "EpochSource"]


class EpochSource(Protocol):
    """Whatever can say where the epochs stand: the watch itself, or a `Belief` over it."""

    def look(self) -> Epochs: ...

    def glance(self) -> Epochs | None: ...


class Belief:
    """The epochs, or for `outage_grace` seconds after the last good look the last ones seen (P3 before P6
    before P5).
    """

    def __init__(self, watch: EpochWatch, clock: Clock, *, outage_grace: float) -> None:
        self._watch = watch
        self._clock = clock
        self._outage_grace = outage_grace

    def look(self) -> Epochs:
        """Where the epochs stand; raises `DatabaseUnavailable` when the database has been away too long."""
        try:
            return self._watch.look()
        except DatabaseUnavailable:
            last = self._watch.last
            if last is None or self._clock.elapsed() - last.read_at > self._outage_grace:
                raise
            return last

    def glance(self) -> Epochs | None:
        """Where the epochs stand if that is known right now; never waits."""
        return self._watch.glance()
