"""The small chores every serving process does by itself, on one thread: heartbeat, clock, leftovers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from app.clock import Clock
from app.errors import DrawbridgeError
from app.telemetry import Event, log, metrics

__all__ = ["Chore", "Upkeep"]

_TICK: Final = 0.5


@dataclass(frozen=True, slots=True)
class Chore:
    """Something to do every so many seconds."""

    name: str
    every: float
    run: Callable[[], object]


class Upkeep:
    """Runs chores one after another until it is stopped; one that fails is logged and tried again at its next turn."""

    def __init__(self, chores: Sequence[Chore], clock: Clock) -> None:
        self._chores = list(chores)
        self._clock = clock
        self._due = {chore.name: clock.elapsed() + chore.every for chore in chores}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, chore: Chore) -> None:
        """Do one more chore, also when it has begun already."""
        self._due[chore.name] = self._clock.elapsed() + chore.every
        self._chores.append(chore)

    def start(self) -> None:
        """Begin; starting twice does nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End after the chore that is under way, then do each of them once more."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            for chore in self._chores:
                self._do(chore)

    def _run(self) -> None:
        while not self._clock.wait(self._stop, _TICK):
            now = self._clock.elapsed()
            for chore in self._chores:
                if self._due[chore.name] <= now:
                    self._do(chore)
                    self._due[chore.name] = self._clock.elapsed() + chore.every

    def _do(self, chore: Chore) -> None:
        try:
            chore.run()
        except DrawbridgeError as error:
            metrics.jobs.labels(chore.name, "failed").inc()
            log(Event.JOB_FAILED, job=chore.name, code=error.code)
        except Exception:  # noqa: BLE001 - one broken chore must not end the others
            metrics.jobs.labels(chore.name, "failed").inc()
            log(Event.JOB_FAILED, job=chore.name, code="crashed", exc_info=True)
        else:
            metrics.jobs.labels(chore.name, "done").inc()
