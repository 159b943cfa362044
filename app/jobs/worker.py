"""The worker: refreshes tokens before they run out, and sees to what else must happen without being asked for.

Its loop claims connections whose time has come, sorts them by app and hands them to the broker's one way to refresh:

    due rows ──claim, held for 10 s──► queue of the app ──as many as the app may have at once──► Refresher.ask

The arithmetic for 1,000 connections with tokens of 60 s: each is looked at about 35 s after its refresh (the window is a
third of the life, widened by jitter), so 1,000 / 35 = 29 a second. A claim takes up to 200 and the next follows at once
while there are more, so claiming is never what limits it; 16 at once per app at 250 ms each are 64 a second.

Nothing starves: each app has its own queue, and one that is full lets go of what it cannot take, so that those behind it
are reached by the next claim. What was let go is due again when its hold has passed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from typing import Final

from app.bootstrap import Services
from app.broker.connection import Connection, Health
from app.broker.installation import alive
from app.broker.refresh import Ending
from app.errors import DrawbridgeError, NotFound, Overloaded
from app.jobs.housekeeping import Tidying, prune_trail
from app.jobs.lane import DEFAULT_RATE, HOLD, Lane
from app.jobs.schedule import Job, Schedule, pause_after
from app.telemetry import Event, log

__all__ = ["RATE_OPTION", "Worker"]

_CLAIM: Final = 200
_TICK: Final = 0.5  # seconds between claims when there was nothing more to claim
_LOOK: Final = 1.0  # seconds between two looks at an app's breaker
_RENEW: Final = 10.0  # seconds between two looks at an app's options and at how many workers there are
_LATE_EVERY: Final = 60.0
_REVOKE_AT_ONCE: Final = 4
# Longer than a revocation with all its requests may take at the largest time-outs in use.
_REVOKE_HOLD: Final = 120.0
# Often, though rows grow old day by day: a worker that is replaced every day must get to it as well, and only the one
# that has lived longest does it, which a young one becomes when the others go.
_RETENTION: Final = 3600.0

RATE_OPTION: Final = "max_refreshes_per_second"


class Worker:
    """One worker process; `run` works until `stop` is called. `held` says why nothing is refreshed, None when it is."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._clock = services.clock
        self._stopping = False
        self._wake = threading.Event()
        self._lanes: dict[str, Lane] = {}
        self._sharing = 1
        self._shared_at = float("-inf")
        self._late_at = float("-inf")
        self.held: str | None = None
        self._schedule = Schedule(chores(services), services.clock)

    def stop(self) -> None:
        """Ask `run` to finish what it began and return; safe in a signal handler, as often as one likes."""
        self._stopping = True

    def run(self) -> None:
        """Start the services, work until `stop`, and return when every refresh that was begun has ended."""
        self._services.start()
        self._schedule.start()
        try:
            self._work()
        finally:
            began = self._clock.elapsed()
            log(Event.STOPPING, kind="worker", waiting=self._services.refresher.in_flight())
            self._schedule.stop()
            self._services.close()
            log(Event.STOPPED, kind="worker", seconds=round(self._clock.elapsed() - began, 3))

    def _work(self) -> None:
        failures, next_claim = 0, 0.0
        while not self._stopping:
            self._wake.clear()
            try:
                if self._clock.elapsed() >= next_claim:
                    full = self._claim()
                    next_claim = self._clock.elapsed() + (0.0 if full else pause_after(_TICK, 0))
                self._dispatch()
                failures = 0
            except DrawbridgeError as error:
                failures += 1
                if failures & (failures - 1) == 0:
                    log(Event.JOB_FAILED, job="refresh", code=error.code, error=error)
                # Short: callers wait for these tokens as soon as the database is back.
                next_claim = self._clock.elapsed() + min(pause_after(_TICK, failures), 5.0)
            self._clock.wait(self._wake, 0.05 if self._queued() else 0.25)

    # Claiming

    def _claim(self) -> bool:
        """Take due connections into the queues of their apps; true when there may be more to take at once."""
        if self._refreshing_is_held():
            return False
        claimed = self._services.store.claim_due(limit=_CLAIM, hold=HOLD)
        now = self._clock.now()
        kept = [self._lane(connection.app_id).add(connection) for connection in claimed]
        self._tell_if_late(claimed, now)
        return len(claimed) == _CLAIM and any(kept)

    def _refreshing_is_held(self) -> bool:
        """Whether the database is not ours to refresh from (`drawbridge adopt`); told once, not every tick."""
        reason = self._services.adoption.disagreement()
        if reason is not None and reason.code != self.held:
            log(Event.REFRESH_HELD, code=reason.code, reason=reason.says)
        self.held = None if reason is None else reason.code
        return reason is not None

    def _lane(self, app_id: str) -> Lane:
        lane = self._lanes.get(app_id)
        if lane is None:
            lane = self._lanes[app_id] = Lane(self._clock)
        return lane

    def _tell_if_late(self, claimed: list[Connection], now: datetime) -> None:
        late = [
            (now - one.expires_at).total_seconds()
            for one in claimed
            if one.expires_at and _should_be_fresh(one)
        ]
        if max(late, default=0.0) > 0 and self._clock.elapsed() - self._late_at > _LATE_EVERY:
            self._late_at = self._clock.elapsed()
            log(Event.WORKER_LATE, job="refresh", seconds=round(max(late), 1))

    # Handing to the broker

    def _queued(self) -> bool:
        return any(lane.queue for lane in self._lanes.values())

    def _dispatch(self) -> None:
        for app_id, lane in self._lanes.items():
            if lane.queue and not self._ready(app_id, lane):
                continue
            while not self._stopping and (connection := lane.next()) is not None:
                self._begin(lane, connection)

    def _begin(self, lane: Lane, connection: Connection) -> None:
        try:
            future = self._services.refresher.ask(connection)
        except Overloaded:
            lane.ended(connection.id, None)
            return

        def ended(future: Future[Ending]) -> None:
            lane.ended(connection.id, None if future.cancelled() or future.exception() else future.result())
            self._wake.set()

        future.add_done_callback(ended)

    def _ready(self, app_id: str, lane: Lane) -> bool:
        """Look whether the app's limits or its breaker have changed; false when there is no such app any more."""
        try:
            self._renew(app_id, lane)
        except NotFound:
            lane.queue.clear()
            return False
        self._look_at_breaker(app_id, lane)
        return True

    def _renew(self, app_id: str, lane: Lane) -> None:
        now = self._clock.elapsed()
        if now - self._shared_at > _RENEW:
            rows = alive(self._services.database, now=self._clock.now())
            self._sharing, self._shared_at = max(1, sum(row.kind == "worker" for row in rows)), now
        if now - lane.renewed_at > _RENEW:
            rate = self._services.apps.row(app_id).options.get(RATE_OPTION, DEFAULT_RATE)
            lane.renewed_at, lane.rate = now, float(rate) / self._sharing

    def _look_at_breaker(self, app_id: str, lane: Lane) -> None:
        now = self._clock.elapsed()
        if now < lane.looked_at + _LOOK:
            return
        lane.looked_at = now
        breaker = self._services.apps.breaker(app_id)
        if breaker is not None:
            lane.pause(now + (breaker.until - self._clock.now()).total_seconds())


def _should_be_fresh(connection: Connection) -> bool:
    """Whether an expired token of this connection says that we were slow, rather than its provider or its admin."""
    asked = connection.last_used_at or connection.connected_at
    if asked is None or connection.expires_at is None or connection.last_refresh_at is None:
        return False
    return connection.health is Health.HEALTHY and asked <= connection.expires_at


def chores(services: Services) -> list[Job]:
    """What a worker does beside refreshing."""
    tidying = Tidying(services.database, services.clock)
    return [
        Job("revoke", 1.0, revoking(services)),
        Job("notices", 2.0, services.courier.deliver_due),
        Job("findings", 60.0, services.examiner.lapse),
        Job("recover", 30.0, services.recovery.run),
        Job("spools", 60.0, services.trail.adopt_orphans),
        Job("spent ids", 300.0, services.spent_ids.sweep),
        Job("tidy", 600.0, tidying.run),
        Job("retention", _RETENTION, lambda: prune_trail(services)),
    ]


def revoking(services: Services) -> Callable[[], int]:
    """A job that carries out what admins disconnected, a few at a time and side by side."""

    def run() -> int:
        claimed = services.store.claim_disconnecting(limit=_REVOKE_AT_ONCE, hold=_REVOKE_HOLD)
        if not claimed:
            return 0
        with ThreadPoolExecutor(_REVOKE_AT_ONCE, thread_name_prefix="revoke") as pool:
            return sum(pool.map(services.revoker.carry_out, [connection.id for connection in claimed]))

    return run
