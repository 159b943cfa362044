"""Refusals, on record before the answer leaves, and bounded so that nobody fills the disk with them.

Who cannot prove to be anybody gets ten rows a minute in each process and way, then is only counted; the
same refusal of a known caller gets five rows a second. What was counted becomes one row when its time is
over (`tick`); while it cannot be recorded it stays counted.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final

from app.access.audit import Detail, Entry, Trail
from app.clock import Clock
from app.telemetry import Event, log, metrics, scrub

__all__ = ["Denials"]

_UNKNOWN_ROWS: Final = 10
_UNKNOWN_SECONDS: Final = 60.0
_KNOWN_ROWS: Final = 5
_KNOWN_SECONDS: Final = 1.0
_MANY: Final = 10_000  # different refusals being counted; beyond it the counts are written early


@dataclass(frozen=True, slots=True)
class _Refusal:
    actor: str
    event: Event
    target: str
    detail: tuple[tuple[str, str], ...]

    def entry(self, outcome: str, **more: Detail) -> Entry:
        return Entry(self.actor, self.event, self.target, outcome, {**dict(self.detail), **more})


@dataclass(slots=True)
class _Window:
    until: float
    seen: int = 0
    counted: int = 0


class Denials:
    """Writes refusals into the trail; safe for threads."""

    def __init__(self, trail: Trail, clock: Clock) -> None:
        self._trail = trail
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: dict[_Refusal, _Window] = {}

    def unknown(self, way: str) -> None:
        """Record that a credential was refused; `way` is basic, bearer, assertion, none or the like."""
        metrics.authentications.labels(way, "refused").inc()
        refusal = _Refusal("anonymous", Event.AUTHENTICATION_FAILED, "", (("way", way),))
        if self._counts(refusal, rows=_UNKNOWN_ROWS, seconds=_UNKNOWN_SECONDS):
            self._trail.record(refusal.entry("refused"))
            log(Event.AUTHENTICATION_FAILED, way=way, count=1)

    def known(self, actor: str, *, action: str, target: str, code: str) -> None:
        """Record that a known caller may not do this; a target that looks like a secret or a person is not
        written down.
        """
        target = target if scrub(target) == target else "(redacted)"
        refusal = _Refusal(actor, Event.ACCESS_DENIED, target, (("action", action), ("code", code)))
        self._known(refusal, "denied")

    def connection(self, actor: str, *, target: str, code: str) -> None:
        """Record that a caller that may have it gets no token of a connection, for what has become of that;
        `code` is the answer's.
        """
        self._known(_Refusal(actor, Event.TOKEN_REFUSED, target, (("code", code),)), code)

    def tick(self) -> None:
        """Write the counts whose time is over; call it every second or so, and once before the process
        ends.
        """
        self._write_counts(self._over(self._clock.elapsed()))

    def flush(self) -> None:
        """Write every count now."""
        self._write_counts(self._over(float("inf")))

    def _known(self, refusal: _Refusal, outcome: str) -> None:
        if self._counts(refusal, rows=_KNOWN_ROWS, seconds=_KNOWN_SECONDS):
            self._trail.record(refusal.entry(outcome))

    def _counts(self, refusal: _Refusal, *, rows: int, seconds: float) -> bool:
        """Whether this one gets a row of its own; what an earlier window counted is written by the way."""
        now = self._clock.elapsed()
        over: list[tuple[_Refusal, int]] = []
        with self._lock:
            window = self._windows.get(refusal)
            if window is None or now >= window.until:
                if window is not None and window.counted:
                    over.append((refusal, window.counted))
                window = self._windows[refusal] = _Window(now + seconds)
            window.seen += 1
            own_row = window.seen <= rows
            window.counted += not own_row
            crowded = len(self._windows) > _MANY
        self._write_counts(over)
        if crowded:
            self.flush()
        return own_row

    def _over(self, now: float) -> list[tuple[_Refusal, int]]:
        with self._lock:
            ended = [(refusal, window) for refusal, window in self._windows.items() if now >= window.until]
            for refusal, _ in ended:
                del self._windows[refusal]
        return [(refusal, window.counted) for refusal, window in ended if window.counted]

    def _write_counts(self, over: list[tuple[_Refusal, int]]) -> None:
        written = 0
        try:
            for refusal, count in over:
                self._trail.record(refusal.entry("counted", count=count))
                written += 1
        finally:
            self._put_back(over[written:])

    def _put_back(self, unwritten: list[tuple[_Refusal, int]]) -> None:
        """Count again what could not be recorded, as a window that is over: the next `tick` tries it anew."""
        with self._lock:
            for refusal, count in unwritten:
                self._windows.setdefault(refusal, _Window(float("-inf"))).counted += count
