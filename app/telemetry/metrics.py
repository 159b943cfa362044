"""The numbers this program counts, for Prometheus.

All metrics stand here, so that names and labels can be read in one place. Labels take a handful of known
words each: a connection, caller or account is never a label.

Several processes answer for one installation, so each keeps its numbers in files under `STATE_DIR/metrics`
and whoever is asked adds them up. `prepare(state_dir)` turns that on; call it once in every process that
counts, before or after anything else was imported, and again in none. Until then a process counts in its
own memory.

A process owns its files by holding a lock on a file beside them. That works between containers that share
the volume but not their process numbers, and dies with the process, however it dies. Files of the dead are
added into one before they are removed, so that totals never go back.

Decision: prometheus-client's memory-mapped files, which cost no system call to count. Writing to a mapped
page for which a full disk has no block kills the process, so the files get all their blocks first; where
that fails, a process counts in memory.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import struct
import threading
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Generic, Literal, TypeVar

import prometheus_client.values
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client import Counter as PrometheusCounter
from prometheus_client import Gauge as PrometheusGauge
from prometheus_client import Histogram as PrometheusHistogram
from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from app.telemetry.events import Event
from app.telemetry.logs import log, lost_lines

__all__ = ["CONTENT_TYPE", "Counter", "Gauge", "Histogram", "expose", "prepare"]

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST

# These parts of the library have no types.
_shared_values: Final[Any] = prometheus_client.values.MultiProcessValue
_Mapped: Final[Any] = MmapedDict
_Collected: Final[Any] = MultiProcessCollector

_Kind = TypeVar("_Kind", PrometheusCounter, PrometheusGauge, PrometheusHistogram)

_MOST_SERIES: Final = 256
"""Label combinations of one metric; those beyond are counted together as `other`."""

_BLOCKS: Final = 512 * 1024
"""Bytes set aside for each file: some 2500 series of 200 bytes. Files grow beyond that only when a disk has
room.
"""

_ADDED: Final = ("counter", "histogram")
_FILES: Final = (*_ADDED, "gauge_livesum", "gauge_livemax")
_OWNER: Final = ".owner"
_DIRECTORY_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"

# Seconds: what a database, a hand-out from memory, and a provider on the other side of an ocean take.
_FAST: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
_SLOW: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 45.0)


class _Measure(ABC, Generic[_Kind]):
    """A metric that comes into being with its first use, in memory or in files, whichever is on by then."""

    def __init__(self, name: str, says: str, *labels: str) -> None:
        self.name = f"drawbridge_{name}"
        self.says = says
        self.label_names = labels
        self._series: dict[tuple[str, ...], _Kind] = {}
        self._parent: _Kind | None = None
        _all.append(self)

    def labels(self, *values: str) -> _Kind:
        """The series with these label values, in the order the labels were declared in."""
        series = self._series.get(values)
        return self._new(values) if series is None else series

    def forget(self) -> None:
        """Begin anew with whatever way of counting is on."""
        self._series = {}
        self._parent = None

    def _new(self, values: tuple[str, ...]) -> _Kind:
        with _lock:
            if len(self._series) >= _MOST_SERIES:
                values = ("other",) * len(values)
            if self._parent is None:
                self._parent = self._make()
            series = self._parent.labels(*values) if self.label_names else self._parent
            return self._series.setdefault(values, series)

    @abstractmethod
    def _make(self) -> _Kind:
        """Make the metric in the registry of this process."""


class Counter(_Measure[PrometheusCounter]):
    """Something that happens; only ever goes up."""

    def inc(self, amount: float = 1.0) -> None:
        """Count, for a metric without labels."""
        self.labels().inc(amount)

    def _make(self) -> PrometheusCounter:
        return PrometheusCounter(self.name, self.says, self.label_names, registry=_local)


class Gauge(_Measure[PrometheusGauge]):
    """A level of each living process; over the processes the sum, or the largest."""

    def __init__(
        self, name: str, says: str, *labels: str, over: Literal["livesum", "livemax"] = "livesum"
    ) -> None:
        super().__init__(name, says, *labels)
        self._over = over

    def set(self, value: float) -> None:
        """Set it, for a metric without labels."""
        self.labels().set(value)

    def inc(self, amount: float = 1.0) -> None:
        """Raise it, for a metric without labels."""
        self.labels().inc(amount)

    def dec(self, amount: float = 1.0) -> None:
        """Lower it, for a metric without labels."""
        self.labels().dec(amount)

    def _make(self) -> PrometheusGauge:
        return PrometheusGauge(
            self.name, self.says, self.label_names, registry=_local, multiprocess_mode=self._over
        )


class Histogram(_Measure[PrometheusHistogram]):
    """How often something took how long, in seconds."""

    def __init__(self, name: str, says: str, *labels: str, buckets: tuple[float, ...] = _FAST) -> None:
        super().__init__(name, says, *labels)
        self._buckets = buckets

    def observe(self, seconds: float) -> None:
        """Count one that took so long, for a metric without labels."""
        self.labels().observe(seconds)

    def observe_all(self, seconds: Sequence[float], *labels: str) -> None:
        """Count many at once, for far less than counting each: what is too busy to count is gathered and counted here."""
        series: Any = self.labels(*labels)
        buckets = Tally(bisect_left(series._upper_bounds, one) for one in seconds)
        series._sum.inc(sum(seconds))
        for bucket, count in buckets.items():
            series._buckets[bucket].inc(count)

    def _make(self) -> PrometheusHistogram:
        return PrometheusHistogram(
            self.name, self.says, self.label_names, registry=_local, buckets=self._buckets
        )


# Counting is reached from everywhere, as logging is; so what is on is kept here and changed by `prepare()`
# alone.
_lock = threading.Lock()
_all: list[_Measure[Any]] = []
_local = CollectorRegistry()
_shared: _Directory | None = None


# -- tokens
hand_outs = Counter("hand_outs", "Tokens handed out.", "provider", "way")
denials = Counter("denials", "Requests for tokens that got none.", "code")
hand_out_seconds = Histogram("hand_out_seconds", "Time to hand out a token, record included.", "way")
waiters = Gauge("waiters", "Requests that wait for a refresh.")
waiters_turned_away = Counter("waiters_turned_away", "Requests that found too many others waiting.")
refreshes = Counter("refreshes", "Refreshes by outcome.", "provider", "outcome")
refresh_seconds = Histogram("refresh_seconds", "Time a provider took to refresh.", "provider", buckets=_SLOW)
refreshes_running = Gauge("refreshes_running", "Refreshes under way.")
breakers_opened = Counter("breakers_opened", "Times an app began to be left alone.", "provider")
reconnects_needed = Counter("reconnects_needed", "Connections a provider refused for good.", "provider")
connects = Counter("connects", "Accounts that came back from a provider.", "provider", "outcome")
journal_entries = Counter(
    "journal_entries", "Answers in the journal: written on their way, or found after a crash.", "outcome"
)

# -- access
authentications = Counter(
    "authentications", "Caller credentials looked at; one that is remembered is not.", "way", "outcome"
)
audit_entries = Counter("audit_entries", "Audit entries recorded.", "way")
audit_seconds = Histogram("audit_seconds", "Time of commits to the audit database.")
audit_spooled = Gauge("audit_spooled", "Audit entries that wait in the spool.")

# -- database and keys
database_faults = Counter("database_faults", "Transactions the database failed.", "database")
transaction_seconds = Histogram(
    "transaction_seconds", "Time of write transactions, waiting included.", "database"
)
epoch_age_seconds = Gauge(
    "epoch_age_seconds", "How old what is known of changes was before the last look.", over="livemax"
)
clock_skew_seconds = Gauge("clock_skew_seconds", "How far this machine's clock is off.", over="livemax")
unopenable = Counter("unopenable_records", "Sealed records that did not open.")

# -- web and jobs
requests = Counter("requests", "HTTP requests answered.", "route", "status")
request_seconds = Histogram("request_seconds", "Time to answer HTTP requests other than for tokens.", "route")
outgoing = Counter("outgoing_requests", "HTTP requests sent.", "purpose", "outcome")
outgoing_seconds = Histogram("outgoing_seconds", "Time of HTTP requests sent.", "purpose", buckets=_SLOW)
jobs = Counter("jobs", "Runs of scheduled jobs.", "job", "outcome")
job_seconds = Histogram("job_seconds", "Time of scheduled jobs.", "job", buckets=_SLOW)
notices = Counter("notices", "Notices to the operator's system.", "outcome")
lines_lost = Gauge("log_lines_lost", "Log lines that could not be written.")


def prepare(state_dir: Path) -> None:
    """Count in files under `state_dir`/metrics from now on, together with the other processes of this
    installation.

    Call it once in each process that serves or works, after its fork if it is forked. It sets the
    environment variable prometheus-client reads; nothing has to be imported later for that. What was
    counted before is dropped. Where the files cannot be made (a full or read-only disk), this process
    counts in memory and the log says so.
    """
    global _shared, _local
    if _shared is not None:
        _shared.leave()
    directory = _Directory(state_dir / "metrics")
    try:
        directory.enter()
    except OSError as error:
        log(Event.METRICS_IN_MEMORY, error=error)
        value_class: Any = prometheus_client.values.MutexValue
        _shared = None
    else:
        os.environ[_DIRECTORY_VARIABLE] = str(directory.path)
        value_class = _shared_values(directory.identity)
        _shared = directory
    with _lock:
        # The library picks this when it is imported; metrics look it up when they are made.
        prometheus_client.values.ValueClass = value_class
        _local = CollectorRegistry()
        for measure in _all:
            measure.forget()


def expose(extra: Iterable[Metric] = ()) -> bytes:
    """All numbers of this installation in Prometheus' text format, and `extra` ones counted for this
    answer.
    """
    registry = CollectorRegistry() if _shared else _local
    lines_lost.set(lost_lines())
    text = b""
    if _shared is not None:
        registry.register(_Sum(_shared))
    text = generate_latest(registry)
    shown = CollectorRegistry()
    shown.register(_Given(list(extra)))
    return text + generate_latest(shown)


class _Sum(Collector):
    """The numbers of all processes together."""

    def __init__(self, directory: _Directory) -> None:
        self._directory = directory

    def collect(self) -> Iterable[Metric]:
        with self._directory.locked():
            self._directory.fold()
            files = [str(file) for file in self._directory.files() if _readable(file)]
            return list(_Collected.merge(files))


class _Given(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


class _Directory:
    """The files of all processes, and the part of this one in them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._process = 0
        self._identity = ""
        self._owner: int | None = None

    def enter(self) -> None:
        """Make this process's files; remove what is left of an installation that no longer runs. Raises
        OSError.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self.locked():
            if not any(self._alive(owner) for owner in self._owners()):
                for file in self.path.glob("*.db"):
                    file.unlink()
            self._claim()
            self.fold()

    def identity(self) -> str:
        """What tells this process's files from all others'; a forked child gets files of its own with its
        first count.

        On a full disk it cannot, and goes on in its parent's: numbers may be lost then, but nothing breaks.
        """
        if self._process != os.getpid():
            try:
                with self.locked():
                    self._claim()
            except OSError as error:
                self._process = os.getpid()
                log(Event.METRICS_IN_MEMORY, error=error)
        return self._identity

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time moves files. A lock of flock(2), for it holds between threads too."""
        with (self.path / "lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def files(self) -> list[Path]:
        return sorted(self.path.glob("*.db"))

    def fold(self) -> None:
        """Add the files of dead processes to the common ones and remove them; their levels are gone with
        them.
        """
        dead = [owner for owner in self._owners() if owner.stem != self._identity and not self._alive(owner)]
        if not dead:
            return
        for kind in _ADDED:
            self._add(
                [self.path / f"{kind}_{owner.stem}.db" for owner in dead], self.path / f"{kind}_folded.db"
            )
        for owner in dead:
            for kind in _FILES:
                (self.path / f"{kind}_{owner.stem}.db").unlink(missing_ok=True)
            owner.unlink(missing_ok=True)

    def _add(self, files: list[Path], total: Path) -> None:
        sums: defaultdict[str, float] = defaultdict(float)
        for file in filter(_readable, (total, *files)):
            for key, value, _, _ in _Mapped.read_all_values_from_file(str(file)):
                sums[key] += value
        fresh = total.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        _set_aside(fresh, max(_BLOCKS, sum(len(key.encode()) + 64 for key in sums)))
        values = _Mapped(str(fresh))
        for key, value in sums.items():
            values.write_value(key, value, 0.0)
        values.close()
        fresh.replace(total)

    def _claim(self) -> None:
        """Become the owner of a new set of files; the lock is held as long as this process lives."""
        identity = f"{os.getpid()}-{secrets.token_hex(4)}"
        for kind in _FILES:
            _set_aside(self.path / f"{kind}_{identity}.db", _BLOCKS)
        self.leave()
        # lockf, not flock: a forked child must not inherit the claim of its parent.
        owner = os.open(self.path / f"{identity}{_OWNER}", os.O_CREAT | os.O_WRONLY, 0o600)
        fcntl.lockf(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._owner, self._identity, self._process = owner, identity, os.getpid()

    def leave(self) -> None:
        """Give up the files this process has, or the handle its parent had; whoever comes next adds them
        up.
        """
        if self._owner is not None:
            os.close(self._owner)
            self._owner = None

    def _owners(self) -> list[Path]:
        return sorted(self.path.glob(f"*{_OWNER}"))

    def _alive(self, owner: Path) -> bool:
        if owner.stem == self._identity:
            return True  # asking would give the lock up: closing any handle of the file does
        with owner.open("r+b") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
        return False


def _set_aside(file: Path, size: int) -> None:
    """Make a file whose blocks exist; a full disk says no here and not later, when it would kill the
    process.
    """
    with file.open("ab") as stream:
        try:
            os.posix_fallocate(stream.fileno(), 0, size)
        except OSError:
            file.unlink(missing_ok=True)
            raise


def _readable(file: Path) -> bool:
    """Whether the file can be added up; one that was damaged must not hide all the others."""
    try:
        for key, _, _, _ in _Mapped.read_all_values_from_file(str(file)):
            json.loads(key)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, RuntimeError, struct.error) as error:
        log(Event.METRICS_FILE_SKIPPED, file=file.name, error=error)
        return False
    return True
