"""Scheduled jobs: they repeat, survive their own faults, and end when asked."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable

import pytest

from app.clock import Clock
from app.errors import DatabaseUnavailable
from app.jobs.schedule import Job, Schedule, pause_after
from app.telemetry import logs


class Hurried(Clock):
    """A clock on which every wait is over at once, but for the event that is waited for."""

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Wait a thousandth of the time."""
        return event.wait(seconds / 1000)


def runs(counted: int, fault: Callable[[int], None] = lambda _: None) -> int:
    """Let a job run so many times, then stop; how often it ran."""
    enough = threading.Event()
    seen: list[int] = []

    def run() -> int:
        seen.append(1)
        if len(seen) >= counted:
            enough.set()
        fault(len(seen))
        return 1

    schedule = Schedule([Job("count", 1.0, run)], Hurried())
    schedule.start()
    assert enough.wait(30.0)
    schedule.stop()
    after = len(seen)
    assert not any(thread.name == "job-count" for thread in threading.enumerate())
    return after


def test_a_job_repeats_until_it_is_stopped() -> None:
    """It runs again and again; after `stop` its thread is gone."""
    assert runs(5) >= 5


def test_a_failing_job_goes_on_and_the_log_is_not_flooded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight failures in a row the first, second, fourth and eighth are told; faults of ours end nothing either."""
    out = io.StringIO()
    monkeypatch.setattr(logs, "_stream", logs._Stream(out, 10))

    def fault(number: int) -> None:
        if number <= 7:
            raise DatabaseUnavailable
        if number == 8:
            raise ZeroDivisionError

    runs(10, fault)
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    failed = [event["code"] for event in events if event["event"] == "jobs:run:failed"]
    assert failed == ["overloaded"] * 3 + ["crashed"]


@pytest.mark.parametrize(
    ("every", "failures", "least", "most"),
    [(1, 0, 0.9, 1.1), (1, 3, 7.2, 8.8), (1, 20, 54, 66), (600, 5, 540, 660)],
)
def test_pauses_grow_with_failures_up_to_a_minute(
    every: float, failures: int, least: float, most: float
) -> None:
    """A job that runs often is asked less often while it fails; one that runs seldom keeps its interval."""
    assert least <= pause_after(every, failures) <= most
