"""Chores that run every so often, each on a thread of its own, so that a slow one delays no other."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from app.clock import Clock
from app.errors import DrawbridgeError
from app.telemetry import Event, log, metrics

__all__ = ["Job", "Schedule", "pause_after"]

_SPREAD: Final = 0.1  # of the interval, either way: workers that start together must not stay in step
_LONGEST_PAUSE: Final = 60.0  # seconds; a failing job that runs less often than this keeps its interval


@dataclass(frozen=True, slots=True)
class Job:
    """Something to do every so many seconds; `run` returns how many things it did."""

    name: str
    every: float
    run: Callable[[], int]


class Schedule:
    """Runs jobs until it is stopped; a job that fails is logged and runs again after a growing pause."""

    def __init__(self, jobs: Sequence[Job], clock: Clock) -> None:
        self._jobs = tuple(jobs)
        self._clock = clock
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin; each job runs for the first time within its first interval. Starting twice does nothing."""
        if self._threads:
            return
        for job in self._jobs:
            thread = threading.Thread(target=self._repeat, args=(job,), name=f"job-{job.name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Begin no job any more and wait for those that run."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, job: Job) -> None:
        failures = 0
        pause = random.uniform(0.0, min(job.every, _LONGEST_PAUSE))  # noqa: S311 - spreads load, guards nothing
        while not self._clock.wait(self._stop, pause):
            failures = 0 if self._ran(job, failures) else failures + 1
            pause = pause_after(job.every, failures)

    def _ran(self, job: Job, failures: int) -> bool:
        began = self._clock.elapsed()
        try:
            done = job.run()
        except DrawbridgeError as error:
            self._failed(job, began, failures, code=error.code)
            return False
        except Exception:  # noqa: BLE001 - a fault in one job must end neither its thread nor the worker
            self._failed(job, began, failures, code="crashed")
            return False
        seconds = self._clock.elapsed() - began
        metrics.jobs.labels(job.name, "done").inc()
        metrics.job_seconds.labels(job.name).observe(seconds)
        if done or failures:
            log(Event.JOB_RAN, job=job.name, seconds=round(seconds, 3), done=done)
        return True

    def _failed(self, job: Job, began: float, failures: int, *, code: str) -> None:
        metrics.jobs.labels(job.name, "failed").inc()
        if (
            failures & (failures + 1) == 0
        ):  # the 1st, 2nd, 4th, 8th … in a row: an outage must not flood the log
            seconds = round(self._clock.elapsed() - began, 3)
            log(Event.JOB_FAILED, job=job.name, seconds=seconds, code=code, exc_info=True)


def pause_after(every: float, failures: int) -> float:
    """Seconds until a job's next run, after so many failures in a row."""
    pause = every if failures == 0 else max(every, min(every * 2.0 ** min(failures, 16), _LONGEST_PAUSE))
    return pause * random.uniform(1 - _SPREAD, 1 + _SPREAD)  # noqa: S311 - spreads load, guards nothing
