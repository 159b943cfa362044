"""The one way to refresh: request, worker and command line all come through `Refresher.ask`.

    look at the row ─► may it be refreshed? ─► take the lease (one conditional UPDATE, the attempt in the same transaction)
      ─► ask the provider, no transaction open ─► journal an answer with a new refresh token ─► save, fenced on generation

What several callers of one process want of one generation is one piece of work. Between processes the lease decides. A
process that dies leaves its attempt open; `connection.may_refresh` says when another may go on (P1).

Each app has a lane of its own, so that a provider that hangs holds up nobody else's refreshes.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import Enum
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection as Transaction

from app.broker import alarms, findings, notices
from app.broker.adoption import Adoption
from app.broker.apps import PATIENCE, Apps
from app.broker.connection import (
    AppTrouble,
    Connection,
    Crowd,
    Health,
    Rhythm,
    Settled,
    Tokens,
    may_refresh,
    next_look,
    settle,
)
from app.broker.doctor import Facts, diagnose
from app.broker.findings import FindingKind
from app.broker.journal import FACT_NAMES, FACT_STAMPS, Entry, Journal
from app.broker.notices import NoticeEvent
from app.broker.store import Lease, Store, new_id
from app.clock import Clock
from app.crypto.envelope import Sealed
from app.db.engine import Database
from app.db.epoch import read_counter
from app.db.schema import attempts, connections
from app.errors import (
    ConnectionDisabled,
    DatabaseUnavailable,
    DrawbridgeError,
    NeedsReconnect,
    Overloaded,
    ProviderMisconfigured,
    ProviderRateLimited,
    ProviderUnavailable,
    RefreshInProgress,
)
from app.http_client import Abandoned, Deadlines, HttpClient
from app.oauth2.client import Wire
from app.oauth2.outcomes import Granted, Misconfigured, NotSent, Outcome, Refused, Unavailable, Unknown
from app.oauth2.provider import Account, App, Grant, Provider
from app.telemetry import Event, log, metrics

__all__ = ["Ending", "EndingKind", "Process", "Refresher", "trouble_of"]

_LANE_THREADS: Final = 8
_CROWD_WINDOW: Final = timedelta(minutes=10)
_HOLD_MEMORY: Final = timedelta(hours=1)
_PERSIST_FOR: Final = (
    30.0  # seconds to keep trying to commit an outcome before the journal or the lease must carry it
)
_CONNECT_SECONDS: Final = 5.0
_BEGIN: Final = sa.insert(attempts)
_FINISH: Final = sa.update(attempts).where(
    attempts.c.id == sa.bindparam("attempt"), attempts.c.finished_at.is_(None)
)


class EndingKind(Enum):
    """How one piece of refreshing ended, seen from this process."""

    REFRESHED = "refreshed"
    MOVED = "moved"  # the generation had moved on: what was wanted is there
    BUSY = "busy"  # another process holds the lease
    HELD = "held"  # not now; `error` says why
    FAILED = "failed"  # tried, and no token came of it; `error` says why


@dataclass(frozen=True, slots=True)
class Ending:
    """The result every waiter gets; `error` is what a caller without a usable token is told."""

    kind: EndingKind
    error: DrawbridgeError | None = None


class _Fate(Enum):
    """What became of a grant when it was to be stored."""

    SAVED = "saved"
    MOVED = "moved"  # the row has another generation by now
    GONE = "gone"  # there is no row any more


@dataclass(frozen=True, slots=True)
class Process:
    """Who refreshes: named in every attempt, so that people know where a lost answer may lie."""

    id: str
    host: str


class Refresher:
    """Runs refreshes on threads of its own, at most one for each (connection, generation) in this process."""

    def __init__(
        self,
        database: Database,
        store: Store,
        *,
        apps: Apps,
        journal: Journal,
        adoption: Adoption,
        http: HttpClient,
        clock: Clock,
        process: Process,
        lease_seconds: float,
        timeout_seconds: float,
        ahead_seconds: float,
    ) -> None:
        self._database = database
        self._store = store
        self._apps = apps
        self._journal = journal
        self._adoption = adoption
        self._http = http
        self._clock = clock
        self._process = process
        self._lease_seconds = lease_seconds
        self._ahead = ahead_seconds
        self._timeout = timeout_seconds
        self._deadlines = Deadlines(
            connect=min(_CONNECT_SECONDS, timeout_seconds), read=timeout_seconds, total=timeout_seconds
        )
        self._lock = threading.Lock()
        self._running: dict[tuple[str, int], Future[Ending]] = {}
        self._lanes: dict[str, ThreadPoolExecutor] = {}
        self._closed = False
        self._unsaved: list[Callable[[], bool]] = []
        self._saving = threading.Lock()

    def ask(self, connection: Connection) -> Future[Ending]:
        """Have this generation of the connection refreshed; whoever asks for the same meanwhile gets the same future."""
        key = (connection.id, connection.generation)
        with self._lock:
            running = self._running.get(key)
            if running is not None:
                return running
            if self._closed:
                raise Overloaded("This process is shutting down.")
            lane = self._lanes.get(connection.app_id)
            if lane is None:
                lane = ThreadPoolExecutor(_LANE_THREADS, thread_name_prefix=f"refresh-{len(self._lanes)}")
                self._lanes[connection.app_id] = lane
            future = lane.submit(self._run, connection.id, connection.generation)
            self._running[key] = future
        future.add_done_callback(lambda _: self._forget(key))
        return future

    def in_flight(self) -> int:
        """How many refreshes this process is busy with."""
        with self._lock:
            return len(self._running)

    def close(self) -> None:
        """Take no more work and wait for what runs; what was queued but not begun is dropped."""
        with self._lock:
            self._closed = True
            lanes = list(self._lanes.values())
        for lane in lanes:
            lane.shutdown(wait=True, cancel_futures=True)
        self.save_leftovers()

    def save_leftovers(self) -> int:
        """Try again to commit what the database refused; how many outcomes are still waiting."""
        with self._saving:  # nobody may find the list empty while what was in it is on its way
            self._save_waiting()
            with self._lock:
                return len(self._unsaved)

    def _save_waiting(self) -> None:
        with self._lock:
            waiting, self._unsaved = self._unsaved, []
        while waiting:
            try:
                saved = waiting[0]()
            except BaseException:
                with self._lock:
                    self._unsaved.extend(waiting[1:])
                raise
            attempt = waiting.pop(0)
            if not saved:
                with self._lock:
                    self._unsaved.append(attempt)

    def require_adopted(self) -> None:
        """Pass when this database's grants are ours to use; raises `RefreshHeld` with the reason."""
        self._adoption.require()

    def wire(self, before_body: Callable[[], None] | None = None) -> Wire:
        """A wire with this installation's deadlines, for calls that are not refreshes as well."""
        return Wire(http=self._http, deadlines=self._deadlines, clock=self._clock, before_body=before_body)

    def journal_answer(self, attempt: str, after: Connection, sealed: Sealed) -> str | None:
        """Put an answer on the disk before it is committed; its entry's name, None when the disk refused."""
        entry = Entry(
            attempt=attempt,
            connection=after.id,
            generation=after.generation,
            sealed=sealed,
            facts=_facts(after),
        )
        try:
            self._journal.append(entry)
        except Overloaded as error:
            # Better committed without a journal than thrown away: the disk may be full and the database elsewhere.
            log(Event.JOURNAL_FAILED, attempt=attempt, code=error.code)
            return None
        return attempt

    def journal_left(self, attempt: str) -> None:
        """The answer of a connect could not be committed, and this process does not try again: recovery gives it back."""
        self._journal.leave(attempt)

    def journal_done(self, attempt: str) -> None:
        """The answer is committed, or of no use."""
        self._journal.done(attempt)

    def learn_life(self, after: Connection, app: App, provider: Provider, granted: Granted) -> None:
        """Where the answer names no life, ask once per mint; until then, and failing that, the assumed one holds."""
        if granted.expires_in is not None:
            return
        life = provider.learn_life(app, granted, wire=self.wire())
        if life is None:
            log(Event.LIFE_UNKNOWN, connection=after.name)
            return
        known = replace(
            after,
            life_seconds=life,
            life_known=True,
            expires_at=granted.sent_at + timedelta(seconds=life),
        )
        look = next_look(known, now=self._clock.now(), rhythm=self.rhythm(provider))
        known = replace(known, refresh_at=look)
        # A generation that moved on meanwhile has its own life to learn.
        self._persist(lambda transaction: bool(self._store.save_life(transaction, known)))

    def rhythm(self, provider: Provider) -> Rhythm:
        """The durations a transition of this provider's connections needs, with fresh jitter."""
        return Rhythm(
            lease=self._lease_seconds,
            ahead=self._ahead,
            assumed_life=provider.assumed_life,
            jitter=random.random(),  # noqa: S311 - spreads load, guards nothing
        )

    def _forget(self, key: tuple[str, int]) -> None:
        with self._lock:
            self._running.pop(key, None)

    # One refresh, in a lane's thread

    def _run(self, connection_id: str, generation: int) -> Ending:
        metrics.refreshes_running.inc()
        try:
            return self._refresh(connection_id, generation)
        except DrawbridgeError as error:
            log(Event.REFRESH_HELD, connection_id=connection_id, code=error.code)
            return Ending(EndingKind.HELD, error)
        finally:
            metrics.refreshes_running.dec()

    def _refresh(self, connection_id: str, generation: int) -> Ending:
        self._adoption.require()
        if self.save_leftovers():
            # The newer token of this very connection may be among them; the one in the row would then be a spent one.
            return Ending(EndingKind.HELD, DatabaseUnavailable())
        seen = self._store.get(connection_id)
        if seen is None or seen.generation != generation:
            return Ending(EndingKind.MOVED)
        now = self._clock.now()
        if seen.lease_until is not None and seen.lease_until > now:
            return Ending(EndingKind.BUSY)
        held = self._held(seen, now)
        if held is not None:
            return Ending(EndingKind.HELD, held)
        app = self._apps.open(seen.app_id)
        provider = self._apps.provider(seen.provider)
        # Before the refresh token is spent, not after: what comes back must be sealed even if the database is gone by then.
        self._store.check_sealing()
        lease = self._take(seen)
        if lease is None:
            return Ending(EndingKind.BUSY)
        with metrics.refresh_seconds.labels(seen.provider).time():
            outcome = self._present(lease, app, provider)
        log(
            Event.REFRESH_ENDED,
            connection=seen.name,
            attempt=lease.attempt,
            generation=generation,
            outcome=outcome.kind,
            code=getattr(outcome, "code", None),
        )
        metrics.refreshes.labels(seen.provider, outcome.kind).inc()
        return self._conclude(lease, app, provider, outcome)

    def _held(self, seen: Connection, now: datetime) -> DrawbridgeError | None:
        if not may_refresh(seen, now):
            return trouble_of(seen, now)
        if seen.retry_at is not None and seen.retry_at > now:
            return trouble_of(seen, now)
        breaker = self._apps.breaker(seen.app_id)
        if breaker is None:
            return None
        wait = max(1.0, (breaker.until - now).total_seconds())
        if breaker.reason == AppTrouble.MISCONFIGURED.value:
            return ProviderMisconfigured(retry_after=wait)
        return ProviderUnavailable(retry_after=wait)

    def _take(self, seen: Connection) -> Lease | None:
        attempt = new_id()
        # Counted from before the database is asked: whatever it took, our lease is at least that old there.
        ends = self._clock.elapsed() + self._lease_seconds
        # An attempt left open on a token that may rotate was possibly carried out: this one is then the last.
        last_try = seen.open_attempt is not None and seen.may_rotate
        try:
            with self._database.write() as transaction:
                taken = self._store.take_lease(
                    transaction, seen, attempt=attempt, seconds=self._lease_seconds, last_try=last_try
                )
                if not taken:
                    return None
                self._adoption.require_not_behind(read_counter(transaction, "connections"))
                now = self._clock.now()
                if seen.open_attempt is not None:
                    _finish(transaction, seen.open_attempt, outcome="unknown", code="holder_died", now=now)
                self._begin(transaction, seen, attempt, now=now)
                connection, tokens = self._store.read_leased(transaction, seen.id)
        except DatabaseUnavailable:
            self._give_lease_back(seen, attempt)
            raise
        return Lease(connection=connection, tokens=tokens, attempt=attempt, ends=ends)

    def _begin(self, transaction: Transaction, seen: Connection, attempt: str, *, now: datetime) -> None:
        values = {
            "id": attempt,
            "connection_id": seen.id,
            "app_id": seen.app_id,
            "generation": seen.generation,
            "host": self._process.host,
            "process_id": self._process.id,
            "journal": self._journal.name,
            "started_at": now,
        }
        transaction.execute(_BEGIN, values)

    def _give_lease_back(self, seen: Connection, attempt: str) -> None:
        """The lease may be ours without our having been told, and we do not use it: let go of it once the database answers.

        Nothing was sent. Left alone the open attempt would be taken for one that may have been carried out.
        """

        def once() -> bool:
            try:
                with self._database.write() as transaction:
                    self._store.give_lease_back(transaction, seen, attempt=attempt)
                    _finish(
                        transaction, attempt, outcome="not_sent", code="lease_unclear", now=self._clock.now()
                    )
            except DatabaseUnavailable:
                return False
            return True

        with self._lock:
            self._unsaved.append(once)

    def _present(self, lease: Lease, app: App, provider: Provider) -> Outcome:
        sent = False

        def before_body() -> None:
            nonlocal sent
            if self._clock.elapsed() > lease.ends - self._timeout:
                raise Abandoned("lease_ran_out")
            if lease.connection.last_try and self._has_moved(lease.connection):
                raise Abandoned("answer_came")
            sent = True

        connection, tokens = lease.connection, lease.tokens
        if connection.grant_type == "authorization_code" and tokens.refresh_token is None:
            return Refused("no_refresh_token")
        grant = Grant(
            connection.grant_type,  # type: ignore[arg-type]  # the column holds only what we wrote
            refresh_token=tokens.refresh_token,
            access_token=tokens.access_token,
            subject=tokens.subject,
            private_key=tokens.private_key,
        )
        try:
            return provider.refresh(app, grant, wire=self.wire(before_body))
        except Exception:  # noqa: BLE001 - a bug in a provider file must not leave the lease open for nothing
            log(Event.REFRESH_CRASHED, connection=connection.name, attempt=lease.attempt, exc_info=True)
            return Unknown("internal") if sent else NotSent("internal")

    def _has_moved(self, connection: Connection) -> bool:
        """Whether the answer of the attempt that was taken over has come after all; what cannot be known counts as yes."""
        try:
            standing = self._store.get(connection.id)
        except DatabaseUnavailable:
            return True
        return standing is None or standing.generation != connection.generation

    # What came of it

    def _conclude(self, lease: Lease, app: App, provider: Provider, outcome: Outcome) -> Ending:
        now = self._clock.now()
        told = self._told(lease.connection, app, provider, outcome)
        if told is not None and told.identity != lease.connection.identity:
            # A sandbox copied anew keeps the grant and becomes another org: its token is not this connection's.
            outcome = Refused("account_changed")
        rhythm = self.rhythm(provider)
        if not isinstance(outcome, Granted):
            return self._note_failure(lease, outcome, now=now, rhythm=rhythm)
        settled = settle(
            lease.connection, outcome, now=now, rhythm=rhythm, tokens=lease.tokens, crowd=Crowd()
        )
        if told is not None and told.instance_url is not None:
            moved = replace(settled.connection, instance_url=told.instance_url)
            settled = replace(settled, connection=moved)
        return self._keep(lease, app, provider, settled=settled, granted=outcome)

    def _note_failure(self, lease: Lease, outcome: Outcome, *, now: datetime, rhythm: Rhythm) -> Ending:
        """Store what an outcome without tokens says; the crowd is counted in the same transaction, which is tried again."""
        settled: list[Settled] = []

        def save(transaction: Transaction) -> None:
            crowd = self._crowd(transaction, lease.connection, outcome, now)
            settled[:] = [
                settle(lease.connection, outcome, now=now, rhythm=rhythm, tokens=lease.tokens, crowd=crowd)
            ]
            self._save_failure(transaction, lease, settled[0], outcome, now)

        if not self._persist(save):
            return Ending(EndingKind.FAILED, DatabaseUnavailable())
        return Ending(EndingKind.FAILED, trouble_of(settled[0].connection, now))

    def _told(self, connection: Connection, app: App, provider: Provider, outcome: Outcome) -> Account | None:
        """Who the answer says the token is for; an answer that says it badly must not cost us the token."""
        if not isinstance(outcome, Granted):
            return None
        try:
            return provider.account_told(app, outcome)
        except ProviderMisconfigured as error:
            log(Event.ANSWER_ODD, connection=connection.name, code=error.code)
            return None

    def _keep(
        self, lease: Lease, app: App, provider: Provider, *, settled: Settled, granted: Granted
    ) -> Ending:
        tokens = settled.tokens
        assert tokens is not None
        after = settled.connection
        sealed = self._store.seal(tokens, after.id, generation=after.generation)
        # With the same refresh token as before nothing is lost that could not be asked for again.
        anew = granted.refresh_token is not None and granted.refresh_token != lease.tokens.refresh_token
        journaled = anew and self.journal_answer(lease.attempt, after, sealed) is not None
        saved: list[tuple[_Fate, int]] = []

        def save(transaction: Transaction) -> None:
            saved[:] = [self._save_grant(transaction, lease, settled, sealed)]

        def finish() -> None:
            overrun = self._clock.elapsed() - lease.ends
            fate, epoch = saved[0]
            self._adoption.saw(epoch)
            if journaled:
                self._journal.done(lease.attempt)
            if fate is _Fate.SAVED and overrun > 0:
                seconds, name = round(overrun, 3), lease.connection.name
                log(Event.LEASE_OVERRUN, connection=name, attempt=lease.attempt, seconds=seconds)
            if fate is not _Fate.SAVED:
                self._came_too_late(lease, app, provider, tokens=tokens, gone=fate is _Fate.GONE)

        if not self._persist(save, then=finish):
            return Ending(EndingKind.HELD, DatabaseUnavailable())
        if saved[0][0] is not _Fate.SAVED:
            return Ending(EndingKind.MOVED)
        self._learn_later(after, app, provider, granted)
        return Ending(EndingKind.REFRESHED)

    def _learn_later(self, after: Connection, app: App, provider: Provider, granted: Granted) -> None:
        """Ask for the token's life once those who waited for it have it: introspection may hang as well (P2)."""
        if granted.expires_in is not None:
            return

        def learn() -> None:
            try:
                self.learn_life(after, app, provider, granted)
            except Exception:  # noqa: BLE001 - nobody waits for this future; a bug in a provider file must show
                log(Event.REFRESH_CRASHED, connection=after.name, exc_info=True)

        with self._lock:
            if not self._closed:
                self._lanes[after.app_id].submit(learn)

    def _save_grant(
        self, transaction: Transaction, lease: Lease, settled: Settled, sealed: Sealed
    ) -> tuple[_Fate, int]:
        """What became of the answer, and the epoch under which it is stored."""
        after, now = settled.connection, self._clock.now()
        saved = self._store.save_tokens(transaction, after, sealed)
        _finish(transaction, lease.attempt, outcome="granted" if saved else "superseded", code=None, now=now)
        self._end_alarms(transaction, lease.connection, now=now)
        if not saved:
            gone = self._store.get_within(transaction, after.id) is None
            # Another row may stand for the same account by now, with this very grant: then it is not ours to revoke.
            given_up = gone and not self._store.stands(transaction, after.app_id, after.identity)
            return _Fate.GONE if given_up else _Fate.MOVED, 0
        if self._clock.elapsed() > lease.ends:
            # Another process may have tried meanwhile and taken the connection for lost.
            tell_recovered(transaction, after, now=now)
        return _Fate.SAVED, saved

    def _save_failure(
        self, transaction: Transaction, lease: Lease, settled: Settled, outcome: Outcome, now: datetime
    ) -> None:
        after = settled.connection
        saved = self._store.save_health(transaction, after, attempt=lease.attempt)
        _finish(
            transaction, lease.attempt, outcome=outcome.kind, code=getattr(outcome, "code", None), now=now
        )
        self._tell_of_trouble(transaction, after, settled.trouble, now=now)
        if isinstance(outcome, Misconfigured) and not outcome.whole_app:
            self._tell_of_many(transaction, after, now=now)
        if saved and settled.lost:
            tell_lost(transaction, after, now=now, vendor=self._apps.provider(after.provider))

    def _tell_of_trouble(
        self, transaction: Transaction, after: Connection, trouble: AppTrouble, *, now: datetime
    ) -> None:
        vendor = self._apps.provider(after.provider)
        app_id, code = after.app_id, (after.last_error or "")[:64]
        if trouble is AppTrouble.CROWD:
            kind = FindingKind.MASS_REFUSAL
            alarms.lapse(transaction, kind, app_id=app_id, vendor=vendor, now=now)
            alarms.sound(transaction, kind, app_id=app_id, vendor=vendor, code=after.refused_code, now=now)
        if trouble in (AppTrouble.DOWN, AppTrouble.MISCONFIGURED):
            failures = self._apps.went_wrong(transaction, app_id, trouble, now=now)
            if trouble is AppTrouble.MISCONFIGURED:
                kind = FindingKind.APP_MISCONFIGURED
                alarms.sound(transaction, kind, app_id=app_id, vendor=vendor, code=code, now=now)
            elif failures >= PATIENCE or self._failing_alike(transaction, after, code, now=now).crowded:
                kind = FindingKind.PROVIDER_DOWN
                alarms.sound(transaction, kind, app_id=app_id, vendor=vendor, code=code, now=now)

    def _tell_of_many(self, transaction: Transaction, after: Connection, *, now: datetime) -> None:
        """Each connection backs off alone; when a crowd does so for the same reason, people are told once."""
        code = after.last_error or ""
        if self._failing_alike(transaction, after, code, now=now).crowded:
            vendor = self._apps.provider(after.provider)
            kind = FindingKind.MASS_FAILURE
            alarms.sound(transaction, kind, app_id=after.app_id, vendor=vendor, code=code, now=now)

    def _end_alarms(self, transaction: Transaction, before: Connection, *, now: datetime) -> None:
        """A grant came: what was told of the app and is over now is told to be over."""
        went_well = self._apps.went_well(transaction, before.app_id)
        if not went_well and before.last_error is None:
            return
        vendor = self._apps.provider(before.provider)
        for finding in findings.of_app(transaction, before.app_id):
            match finding.kind:
                case FindingKind.APP_MISCONFIGURED:
                    over = went_well
                case FindingKind.MASS_REFUSAL:
                    over = before.health is Health.DOUBTFUL
                case FindingKind.PROVIDER_DOWN | FindingKind.MASS_FAILURE:
                    # One success of many proves little: it is over when those that still fail are no crowd any more.
                    alike = self._failing_alike(transaction, before, finding.code or "", now=now, besides=0)
                    over = not alike.crowded
                case _:
                    over = False
            if over:
                kind = FindingKind(finding.kind)
                alarms.end(transaction, kind, app_id=before.app_id, vendor=vendor, now=now)

    def _failing_alike(
        self, transaction: Transaction, one: Connection, error: str, *, now: datetime, besides: int = 1
    ) -> Crowd:
        """How many connections of the app have failed with this error lately; `besides` counts `one` itself."""
        alike = sa.and_(
            connections.c.id != one.id,
            connections.c.last_error == error,
            connections.c.last_error_at >= now - _CROWD_WINDOW,
        )
        count, total = _counted(transaction, one.app_id, alike)
        return Crowd(refused=count + besides, total=total)

    def _came_too_late(
        self, lease: Lease, app: App, provider: Provider, *, tokens: Tokens, gone: bool
    ) -> None:
        """The row moved on while the provider was asked: a newer install stands, or the connection is gone."""
        log(Event.REFRESH_DISCARDED, connection=lease.connection.name, attempt=lease.attempt, gone=gone)
        if gone:
            grant = Grant(
                "authorization_code", refresh_token=tokens.refresh_token, access_token=tokens.access_token
            )
            provider.revoke(app, grant, wire=self.wire())

    def _crowd(
        self, transaction: Transaction, connection: Connection, outcome: Outcome, now: datetime
    ) -> Crowd:
        may_refuse = isinstance(outcome, Refused) or (
            isinstance(outcome, Unavailable) and outcome.then is not None
        )
        if not may_refuse:
            return Crowd()
        refused = sa.and_(
            connections.c.id != connection.id,
            connections.c.health == Health.DOUBTFUL.value,
            connections.c.last_error_at >= now - _CROWD_WINDOW,
        )
        count, total = _counted(transaction, connection.app_id, refused)
        held_since, spent = findings.hold_of(transaction, connection.app_id, since=now - _HOLD_MEMORY)
        return Crowd(refused=count + 1, total=total, held_since=held_since, spent=spent)

    def _persist(
        self, write: Callable[[Transaction], object], *, then: Callable[[], None] | None = None
    ) -> bool:
        """Commit, trying for a while; what still cannot be committed waits for `save_leftovers`."""

        def once() -> bool:
            try:
                with self._database.write() as transaction:
                    write(transaction)
            except DatabaseUnavailable:
                return False
            if then is not None:
                then()
            return True

        give_up = self._clock.elapsed() + _PERSIST_FOR
        pause = 0.05
        while not once():
            if self._closed or self._clock.elapsed() > give_up:
                log(Event.OUTCOME_UNSAVED, waiting=len(self._unsaved) + 1)
                with self._lock:
                    self._unsaved.append(once)
                return False
            self._clock.sleep(pause)
            pause = min(2 * pause, 1.0)
        return True


def trouble_of(connection: Connection, now: datetime) -> DrawbridgeError:
    """What a caller is told who needs a token this connection cannot give."""
    if connection.admin_state.value != "enabled":
        return ConnectionDisabled()
    if connection.exported_at is not None:
        return ConnectionDisabled("The connection was moved to another installation.")
    if connection.health is Health.NEEDS_RECONNECT:
        return NeedsReconnect()
    wait = None
    if connection.retry_at is not None and connection.retry_at > now:
        wait = max(1.0, (connection.retry_at - now).total_seconds())
    kind, _, _ = (connection.last_error or "").partition(":")
    if kind == "misconfigured":
        return ProviderMisconfigured(retry_after=wait)
    if kind == "rate_limited":
        return ProviderRateLimited(retry_after=wait)
    if kind:
        return ProviderUnavailable(retry_after=wait)
    return RefreshInProgress()


def _counted(transaction: Transaction, app_id: str, which: sa.ColumnElement[bool]) -> tuple[int, int]:
    """How many of the app's connections fit, and how many of it there are that are enabled."""
    mine = connections.c.app_id == app_id
    count = transaction.execute(
        sa.select(sa.func.count()).select_from(connections).where(mine, which)
    ).scalar_one()
    total = transaction.execute(
        sa.select(sa.func.count())
        .select_from(connections)
        .where(mine, connections.c.admin_state == "enabled")
    ).scalar_one()
    return count, total


def tell_lost(transaction: Transaction, connection: Connection, *, now: datetime, vendor: Provider) -> None:
    """Let people know that the connection needs an admin, in the transaction that says so."""
    found = diagnose(Facts(connection=connection, vendor=vendor, now=now))
    metrics.reconnects_needed.labels(connection.provider).inc()
    log(
        Event.CONNECTION_LOST,
        connection=connection.name,
        provider=connection.provider,
        code=connection.last_error,
    )
    findings.report(
        transaction,
        FindingKind.NEEDS_RECONNECT,
        now=now,
        app_id=connection.app_id,
        connection_id=connection.id,
        code=connection.last_error,
    )
    notices.announce(
        transaction,
        NoticeEvent.NEEDS_RECONNECT,
        now=now,
        connection=connection.name,
        provider=connection.provider,
        code=connection.last_error,
        fault=found.fault.value,
        cause=found.cause,
        sentence=found.sentence,
        who=found.who,
        how=found.how,
    )


def tell_recovered(transaction: Transaction, connection: Connection, *, now: datetime) -> None:
    """If people were told that the connection is lost, tell them that it is not any more, in the same transaction."""
    if not findings.close(
        transaction,
        FindingKind.NEEDS_RECONNECT,
        now=now,
        app_id=connection.app_id,
        connection_id=connection.id,
    ):
        return
    notices.announce(
        transaction,
        NoticeEvent.RECOVERED,
        now=now,
        connection=connection.name,
        provider=connection.provider,
    )
    log(Event.CONNECTION_RECOVERED, connection=connection.name, provider=connection.provider)


def _finish(transaction: Transaction, attempt: str, *, outcome: str, code: str | None, now: datetime) -> None:
    ending = {"attempt": attempt, "outcome": outcome, "code": code, "finished_at": now}
    transaction.execute(_FINISH, ending)


def _facts(after: Connection) -> dict[str, object]:
    """The columns that go with journaled tokens, as JSON; `Store.replay` goes the way back."""
    facts: dict[str, object] = {name: getattr(after, name) for name in FACT_NAMES}
    facts["rotation"] = after.rotation.value
    facts["scopes_granted"] = list(after.scopes_granted)
    for name in FACT_STAMPS:
        instant = getattr(after, name)
        facts[name] = None if instant is None else int(instant.timestamp() * 1_000_000)
    return facts | {"provider": after.provider, "app_id": after.app_id, "identity": after.identity}
