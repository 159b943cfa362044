"""The trail: who did what to what, on the disk before the answer leaves.

`record` returns when the row is durable. Threads that arrive while a commit runs share the next one: the first
to find nobody committing leads, commits everything that waits and wakes the others. A writer thread instead cost
a lone request about a fifth more CPU time; with 4 and 16 threads the difference was within the noise.

When the audit database does not take rows they go to the `spool` of this process start and are brought in
later, in order and once. A database that is away is borne for `outage_grace` seconds, a full disk for as
long as the reserve lasts; after that `record` raises `AuditUnavailable`, and whoever wanted to hand
something out must not.

    online ──commit fails──► spooling ──grace over, or reserve used up──► refusing
       ▲                        │                                            │
       └──── database takes the spool, or answers: tried every second ──────┘

After a commit whose outcome is unknown and that could not be spooled either, nobody knows where the chain stands:
nothing is recorded until the database answers, and then a new chain begins. That a row may exist for a
hand-out that did not happen is harmless; the reverse is not.

The stored head of the chain follows its rows within a second (`_HEAD_EVERY`). A killed process may leave it that far
behind: then rows of its last second could be cut off unseen, unless the logged head is at hand.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import sqlite3
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

from sqlalchemy.exc import DBAPIError, IntegrityError

from app.access.chain import ChainKeys, Head, Row
from app.access.inspection import Verdict, inspect, prune
from app.access.ledger import Ledger, Writer
from app.access.spool import Batch, Spool, orphans
from app.clock import Clock
from app.db.engine import Database
from app.errors import AuditUnavailable, DatabaseUnavailable
from app.telemetry import Event, log, metrics

__all__ = ["Entry", "Found", "Page", "Trail"]

Detail = str | int | float | bool | None | Sequence[str]

_BATCH_LIMIT: Final = 1000
_SLICE: Final = (
    0.0008  # seconds a leader waits for the next to come; about what a request costs on a busy core
)
_RESERVE: Final = 4 * 1024 * 1024  # about 15 000 rows
_HEAD_EVERY: Final = 1.0  # seconds the stored head may be behind the rows
_HEAD_LATE: Final = 10.0  # seconds after which a head that cannot be moved is told
_IDLE_ROUNDS: Final = 10  # after so many seconds without a row the thread that moves the head ends
_MARK_EVERY: Final = 3600.0  # seconds between two marks of a living writer in the register
_REVIVE_EVERY: Final = 1.0  # seconds between two attempts to return to the database
_ACTOR: Final = re.compile(r"[a-z]+(:[A-Za-z0-9._-]{1,80})?")
_ACTION: Final = re.compile(r"[a-z_]+:[a-z_]+:[a-z_]+")
_OUTCOME: Final = re.compile(r"[a-z_]{1,32}")
_TARGET: Final = re.compile(r"[A-Za-z0-9._:/*+-]{0,160}")
_KEY: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")
# No "@": an e-mail address does not fit. No longer than a SHA-256 in hex: nor do the vendors' access tokens.
_HARMLESS: Final = re.compile(r"[A-Za-z0-9 ._:/*+,=-]{0,64}")
_PERMISSION: Final = re.compile(r"[a-z]+:[a-z]+@[a-z0-9._*-]{1,128}")
_REDACTED: Final = "(redacted)"
_dump = json.JSONEncoder(separators=(",", ":"), sort_keys=True).encode


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing to record.

    `actor` is caller:NAME, admin:cli, admin:session, worker, hubspot:PORTAL or anonymous; `action` a
    registered event name; `target` a name of ours; `outcome` a word. `detail` holds structured facts only:
    a text that could be an address or a token is replaced by "(redacted)", a target that could not be a
    name of ours by "(invalid)".
    """

    actor: str
    action: str
    target: str = ""
    outcome: str = "done"
    detail: Mapping[str, Detail] | None = None

    def texts(self) -> tuple[str, str, str, str, str | None]:
        """The five text columns; ValueError when actor, action or outcome are not words of ours."""
        _check_words(self.actor, self.action, self.outcome)
        target = self.target if _TARGET.fullmatch(self.target) else "(invalid)"
        return self.actor, self.action, target, self.outcome, _detail_text(self.detail)


@dataclass(frozen=True, slots=True)
class Found:
    """One row as people read it."""

    writer: str
    n: int
    at: datetime
    actor: str
    action: str
    target: str
    outcome: str
    detail: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Page:
    """Search results, newest first; `next` goes into the following call's `before`, None at the end."""

    rows: tuple[Found, ...]
    next: str | None


class Trail:
    """The audit trail of one process; safe for threads and over a fork.

    `key` (at least 32 bytes) comes from outside the audit database. `outage_grace` in seconds, 0 = fail
    closed; `reserve` is the number of bytes allocated in `state_dir` for a full disk, at the first record
    of the process.
    """

    _keeper: threading.Thread | None

    def __init__(
        self,
        database: Database,
        key: bytes,
        *,
        clock: Clock,
        state_dir: Path,
        outage_grace: float = 60.0,
        reserve: int = _RESERVE,
    ) -> None:
        self._database = database
        self._keys = ChainKeys(key)
        self._ledger = Ledger(database, self._keys)
        self._clock = clock
        self._state_dir = state_dir
        self._outage_grace = outage_grace
        self._reserve = reserve
        self._chain: _Chain | None = None
        self._led = False
        self._gathering = False
        self._enough = threading.Lock()
        self._stopped = threading.Event()
        self._begin()
        _call_after_fork(self)

    # --------------------------------------------------------------------------------------- recording

    def record(self, entry: Entry) -> None:
        """Write one row and return when it is durable; raises `AuditUnavailable`, and then nothing may be
        handed out.
        """
        self.record_all((entry,))

    def record_all(self, entries: Sequence[Entry]) -> None:
        """The same for several rows: all of them durable, or none; at least one, and a few hundred at most."""
        ticket = _Ticket([entry.texts() for entry in entries])
        with self._mutex:
            self._waiting.append(ticket)
            leads = not self._led
            self._led = True
            if self._gathering and len(self._waiting) >= self._expected:
                self._gathering = False
                self._enough.release()
        if not leads:
            ticket.woken.acquire()
        try:
            if not ticket.settled:
                self._lead()
        finally:
            ticket.wake_next()
        if ticket.failure is not None:
            raise AuditUnavailable(ticket.failure)

    def head(self) -> Head | None:
        """Where this process's chain stands; None while it has recorded nothing."""
        chain = self._chain
        if chain is None:
            return None
        with self._pen:
            return Head(chain.writer.id, chain.n, chain.mac.hex()) if chain.n else None

    @property
    def standing(self) -> Literal["online", "behind", "spooling", "refusing"]:
        """Where this process's rows go at this moment; a database that has gone is noticed when a row is written.

        "behind": into the database, but the stored head has not moved for more than ten seconds.
        """
        chain, stuck = self._chain, self._stuck_since
        if chain is None or chain.away_since is None:
            late = stuck is not None and self._clock.elapsed() - stuck > _HEAD_LATE
            return "behind" if late else "online"
        return "spooling" if self._refusal(chain) is None and not chain.told else "refusing"

    def log_head(self) -> None:
        """Put the head, and that of the register of writers, into the log, which somebody else keeps: `verify`
        can hold the database to it. Once a minute.
        """
        if (head := self.head()) is None:
            return
        _log_head(head)
        with suppress(DatabaseUnavailable):  # told elsewhere; the next minute has another head
            self._mark_now_and_then()
            if (end := self._ledger.register_head()) is not None:
                _log_head(end)

    def adopt_orphans(self) -> int:
        """Bring in what killed processes left in `state_dir`; the count of rows.

        Call it when a process starts and now and then. Raises `DatabaseUnavailable`; what was not brought
        in stays.
        """
        count = 0
        for spool in orphans(self._state_dir):
            count += self._adopt(spool)
        if count:
            log(Event.AUDIT_CAUGHT_UP, entries=count)
        return count

    def close(self) -> None:
        """Bring in what is spooled if the database allows, and give up the reserve; recording again begins
        a new chain.
        """
        self._stopped.set()
        # Away for now: the rows beyond the stored head are proved by their macs all the same.
        with suppress(DatabaseUnavailable):
            self._move_head()
        with self._pen:
            chain, self._chain = self._chain, None
            self._keeper = None
            self._stopped = threading.Event()
        if chain is not None and (chain.spool is None or self._part_with(chain.spool)) and chain.n:
            # Away for now: whoever ends without a mark in the register is as if killed.
            with suppress(DatabaseUnavailable):
                self._ledger.mark(chain.writer.id, chain.n, chain.mac)
        self.count()

    def count(self) -> None:
        """Count what was recorded since the last call; done now and then, for each count costs a hand-out dearly."""
        rows, times = 0, []
        while self._committed:
            some, seconds = self._committed.popleft()
            rows += some
            times.append(seconds)
        if times:
            metrics.audit_entries.labels("database").inc(rows)
            metrics.audit_seconds.observe_all(times)
        chain = self._chain
        metrics.audit_spooled.set(0 if chain is None else chain.spooled)

    # ----------------------------------------------------------------------------------------- reading

    def verify(self, heads: Sequence[Head] = ()) -> Verdict:
        """Check every row, gap and head; with `heads` from the log also what the database alone cannot
        know.
        """
        self._move_head()
        return inspect(self._ledger, self._keys, heads)

    def prune(self, older_than: datetime) -> int:
        """Remove each writer's rows from before a moment, behind a kept head; the count of rows removed.

        Rows are checked on their way out; a chain that is broken is left as it is, for `verify` to show.
        """
        self._move_head()
        return prune(self._ledger, self._keys, older_than)

    def export(self, *, since: datetime | None = None) -> Iterator[str]:
        """Every row as one line of JSON, by writer and number."""
        for row in self._ledger.all_rows(since=since):
            fields = {**_shown(row), "mac": row.mac.hex()}
            yield _dump(fields)

    def search(
        self,
        *,
        actor: str | None = None,
        action: str | None = None,
        target: str | None = None,
        outcome: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> Page:
        """Rows that match every given field, newest first, a page at a time; ValueError for a `before` not
        from us.
        """
        wanted = {"actor": actor, "action": action, "target": target, "outcome": outcome}
        equal = {name: value for name, value in wanted.items() if value is not None}
        rows = self._ledger.search(
            equal=equal, since=since, until=until, before=_position(before), limit=limit + 1
        )
        page, more = rows[:limit], len(rows) > limit
        return Page(
            tuple(map(_found, page)), f"{page[-1].at}.{page[-1].writer}.{page[-1].n}" if more else None
        )

    # -------------------------------------------------------------------------------------- committing

    def _begin(self) -> None:
        """Fresh locks and no chain: for a new object and for a forked child, where old locks may be held by
        nobody.
        """
        self._mutex = threading.Lock()
        self._pen = (
            threading.Lock()
        )  # who holds it may write: to the database, to the spool, to the chain's state
        self._waiting: list[_Ticket] = []
        self._led = False
        self._gathering = False  # a leader waits for more to come, until `_enough` is released
        self._enough = threading.Lock()
        self._enough.acquire()
        self._expected = 1
        self._settled = 0
        # Rows and seconds of commits that are not counted yet; a child must not count those of its parent.
        self._committed: deque[tuple[int, float]] = deque()
        self._stopped = threading.Event()
        self._reviver: threading.Thread | None = None
        self._keeper = None  # moves the stored head behind the rows
        self._heads = threading.Lock()  # who holds it may move stored heads
        self._left: list[
            tuple[Writer, int, bytes]
        ] = []  # ends of chains that were left, still to be stored as heads
        self._stuck_since: float | None = None
        self._told_stuck = False
        inherited, self._chain = self._chain, None
        if inherited is not None and inherited.spool is not None:
            inherited.spool.abandon()  # the lock is the parent's; kept open here it would outlive the parent

    def _lead(self) -> None:
        try:
            self._gather()
            with self._pen:
                try:
                    self._commit()
                finally:
                    self._watch_head()
        finally:
            self._pass_on()

    def _gather(self) -> None:
        """Wait for those who are about to come, as long as they keep coming.

        Callers that were answered together ask again together. Without this the first of them would commit alone while all
        others queue; so the leader waits until as many are there as were under way at the end of the last commit. Where
        nobody else is under way there is no waiting.
        """
        arrived = 0
        while True:
            with self._mutex:
                before, arrived = arrived, len(self._waiting)
                if arrived >= self._expected or arrived == before:
                    return
                self._gathering = True
            if not self._enough.acquire(timeout=_SLICE):
                with self._mutex:
                    if not self._gathering:  # released at the last moment
                        self._enough.acquire()
                    self._gathering = False

    def _pass_on(self) -> None:
        """Make the first who still waits the next leader."""
        with self._mutex:
            heir = self._waiting[0] if self._waiting else None
            self._led = heir is not None
            self._expected = min(self._settled + len(self._waiting), _BATCH_LIMIT)
        if heir is not None:
            heir.woken.release()

    def _commit(self) -> None:
        chain = self._chain
        if chain is None:
            chain = self._chain = self._new_chain()
        tickets: list[_Ticket] = []
        rows: list[Row] = []

        def collect() -> list[Row]:
            tickets.extend(self._take())
            self._settled = len(tickets)
            rows.extend(self._rows(chain, tickets))
            return rows

        try:
            if chain.away_since is None:
                if not chain.registered:
                    self._ledger.raise_head(chain.writer, 0, chain.mac)
                    chain.registered = True
                began = self._clock.elapsed()
                self._ledger.append(collect)
                chain.advance(rows)
                self._committed.append((len(rows), self._clock.elapsed() - began))
                _settle(tickets, None)
                return
        except DatabaseUnavailable as error:
            chain.away(self._clock.elapsed(), full=_is_full(error))
            log(Event.AUDIT_SPOOLING, entries=len(rows), reason=error.detail)
        except IntegrityError:
            chain.away(self._clock.elapsed(), full=False)
            chain.certain = False
            log(Event.AUDIT_UNAVAILABLE, reason="The stored rows are not as this process left them.")
        except BaseException:
            chain.away(self._clock.elapsed(), full=False)
            chain.certain = False
            _settle(tickets or self._take(), "Recording failed; the log names the cause.")
            raise
        finally:
            if chain.away_since is not None:
                self._start_reviver()
        self._spool(chain, tickets or self._take(), rows)

    def _spool(self, chain: _Chain, tickets: list[_Ticket], rows: list[Row]) -> None:
        attempted = bool(
            rows
        )  # a commit of these very rows may have succeeded unseen: they keep their numbers
        refusal = self._refusal(chain)
        if refusal is None:
            rows = rows or self._rows(chain, tickets)
            try:
                chain.write_spool(rows)
                metrics.audit_entries.labels("spool").inc(len(rows))
            except OSError as error:
                refusal = f"The reserve of the audit trail cannot take more: {error.strerror}."
        if refusal is not None:
            chain.certain = chain.certain and not attempted
            chain.tell_once(refusal)
        _settle(tickets, refusal)

    def _refusal(self, chain: _Chain) -> str | None:
        if not chain.certain:
            return "The state of the audit trail is unknown until its database answers."
        if chain.spool is None:
            return "The audit database is away and there is no reserve."
        away = self._clock.elapsed() - (chain.away_since or 0.0)
        if not chain.full and away >= self._outage_grace:
            return "The audit database has been away for longer than the grace."
        return None

    def _take(self) -> list[_Ticket]:
        with self._mutex:
            taken, self._waiting = self._waiting[:_BATCH_LIMIT], self._waiting[_BATCH_LIMIT:]
        return taken

    def _rows(self, chain: _Chain, tickets: Sequence[_Ticket]) -> list[Row]:
        at = int(self._clock.timestamp() * 1_000_000)
        writer, n, mac = chain.writer.id, chain.n, chain.mac
        rows = []
        for texts in (texts for ticket in tickets for texts in ticket.texts):
            n += 1
            mac = self._keys.mac(mac, Row(writer, n, at, *texts, b""))
            rows.append(Row(writer, n, at, *texts, mac))
        return rows

    def _new_chain(self) -> _Chain:
        chain = self._chain_with(None)
        try:
            chain.spool = Spool.create(self._state_dir, chain.writer.id, reserve=self._reserve)
        except OSError as error:
            log(Event.AUDIT_UNAVAILABLE, reason=f"No reserve: {error.strerror}.")
        return chain

    def _chain_with(self, spool: Spool | None) -> _Chain:
        started = int(self._clock.timestamp() * 1_000_000)
        writer = Writer(secrets.token_hex(16), socket.gethostname(), started)
        return _Chain(writer, spool, self._keys.origin(writer.id))

    # ---------------------------------------------------------------------------------- the stored head

    def _watch_head(self) -> None:
        """Under the pen: see to it that somebody moves the head."""
        if (self._keeper is not None and self._keeper.is_alive()) or not (self._left or _behind(self._chain)):
            return
        self._keeper = threading.Thread(target=self._keep_head, name="audit-head", daemon=True)
        try:
            self._keeper.start()
        except RuntimeError as error:  # no more threads; the rows are safe, and the next record tries again
            log(Event.AUDIT_HEAD_STUCK, reason=str(error))

    def _keep_head(self) -> None:
        stopped, idle = self._stopped, 0
        while not self._clock.wait(stopped, _HEAD_EVERY):
            try:
                idle = 0 if self._move_head() else idle + 1
            except Exception as error:  # noqa: BLE001 - of any kind: this thread must not end while the head is behind
                self._tell_stuck(error)
                continue
            self._stuck_since, self._told_stuck = None, False
            if idle >= _IDLE_ROUNDS:
                with self._pen:
                    if not (self._left or _behind(self._chain)):
                        self._keeper = None  # whoever records next starts another one
                        return

    def _move_head(self) -> bool:
        """Bring the stored heads up to the rows; whether there was anything to bring. Raises `DatabaseUnavailable`."""
        with self._heads:
            with self._pen:
                chain, behind = self._chain, list(self._left)
                left = {writer for writer, _, _ in behind}
                if chain is not None and _behind(chain):
                    behind.append((chain.writer, chain.n, chain.mac))
            for writer, n, mac in behind:
                self._ledger.raise_head(writer, n, mac)
                if writer in left:
                    self._ledger.mark(writer.id, n, mac)
                with self._pen:
                    self._left = [left for left in self._left if left[0] != writer]
                    if chain is not None and chain.writer == writer:
                        chain.head_n = max(chain.head_n, n)
            return bool(behind)

    def _mark_now_and_then(self) -> None:
        """Note in the register once an hour how far this chain has come: it cannot be put back behind that."""
        with self._pen:
            chain = self._chain
            if chain is None or chain.away_since is not None:
                return
            n, mac, now = chain.n, chain.mac, self._clock.elapsed()
            if now < chain.mark_at:
                return
            chain.mark_at = now + _MARK_EVERY
        self._ledger.mark(chain.writer.id, n, mac)

    def _tell_stuck(self, error: Exception) -> None:
        now = self._clock.elapsed()
        if self._stuck_since is None:
            self._stuck_since = now
        if now - self._stuck_since > _HEAD_LATE and not self._told_stuck:
            self._told_stuck = True
            if isinstance(error, DatabaseUnavailable):
                log(Event.AUDIT_HEAD_STUCK, reason=error.detail)
            else:
                log(Event.AUDIT_HEAD_STUCK, exc_info=error)

    def _leave(self, chain: _Chain) -> None:
        """Under the pen: begin a new chain; the head of this one still has to be brought up to its last known row."""
        if chain.n:
            self._left.append((chain.writer, chain.n, chain.mac))
        self._chain = self._chain_with(chain.spool)
        self._watch_head()

    # --------------------------------------------------------------------------------------- returning

    def _start_reviver(self) -> None:
        if self._reviver is None or not self._reviver.is_alive():
            self._reviver = threading.Thread(target=self._revive, name="audit-return", daemon=True)
            self._reviver.start()

    def _revive(self) -> None:
        stopped, chain = self._stopped, self._chain
        while chain is not None and not self._clock.wait(stopped, _REVIVE_EVERY):
            if self._return(chain, stopped):
                return

    def _return(self, chain: _Chain, stopped: threading.Event) -> bool:
        """Bring the spool in and go online again; false when it has to be tried once more."""
        try:
            done = self._deliver(chain.spool, 0)  # the bulk, while others go on spooling
            with self._pen:
                if stopped.is_set():
                    return True
                done = self._deliver(chain.spool, done)
                if chain.spool is not None and done < chain.spool.end:
                    self._set_aside(chain.spool, self._lost(chain.spool, done))
                    self._chain = self._reviver = None  # whoever records next begins a chain, and a file
                    return True
                if not chain.certain:
                    # There may have been nothing to deliver: does it answer?
                    self._ledger.writer(chain.writer.id)
                spooled = chain.back()
                self._reviver = None  # under the pen: who finds the database away next starts another one
                if not chain.certain:
                    self._leave(chain)
        except (DatabaseUnavailable, OSError):
            return False
        log(Event.AUDIT_CAUGHT_UP, entries=spooled)
        return True

    def _deliver(self, spool: Spool | None, start: int) -> int:
        if spool is None:
            return start
        for end, batch in _joined(spool.batches(start)):
            self._ledger.deliver(batch)
            start = end
        return start

    def _lost(self, spool: Spool, end: int) -> int:
        """How many rows stand whole behind the last that can be read, and are not in the trail."""
        return sum(len(batch.rows) for batch in spool.behind(end) if not self._ledger.has(batch))

    def _set_aside(self, spool: Spool, entries: int) -> None:
        aside = spool.set_aside()
        log(Event.AUDIT_SPOOL_DAMAGED, file=aside.name, entries=entries)

    def _adopt(self, spool: Spool) -> int:
        rows, writers = 0, {spool.writer}
        try:
            for _, batch in _joined(spool.batches()):
                self._ledger.deliver(batch)
                rows += len(batch.rows)
                writers.add(batch.writer)
            lost = self._lost(spool, spool.end)
            for writer in writers:
                self._ledger.mark_end(writer)
        except BaseException:
            spool.abandon()
            raise
        if lost:
            self._set_aside(spool, lost)
        else:
            spool.remove()
        return rows

    def _part_with(self, spool: Spool) -> bool:
        """Bring it in and remove it; false when it has to be left behind."""
        try:
            done = self._deliver(spool, 0)
            lost = self._lost(spool, done) if done < spool.end else 0
        except DatabaseUnavailable:
            spool.abandon()
            return False
        if done < spool.end:
            self._set_aside(spool, lost)
            return False
        spool.remove()
        return True


def _joined(batches: Iterator[tuple[int, Batch]]) -> Iterator[tuple[int, Batch]]:
    """The same rows in fewer batches, each with the offset behind it.

    Every batch is a transaction. A minute of hand-outs leaves thousands of them, and past the grace nothing is handed out
    before all are in, although the database is back.
    """
    first: Batch | None = None
    rows: list[Row] = []
    end = 0
    for offset, batch in batches:
        if first is not None and len(rows) + len(batch.rows) > _BATCH_LIMIT:
            yield end, replace(first, rows=rows)
            first, rows = None, []
        first = first or batch
        rows += batch.rows
        end = offset
    if first is not None:
        yield end, replace(first, rows=rows)


def _log_head(head: Head) -> None:
    log(Event.AUDIT_HEAD, writer=head.writer, sequence=head.n, digest=head.mac[:16])


class _Ticket:
    """One thread's rows on their way; `woken` is released when it is settled, or when its thread shall lead."""

    __slots__ = ("failure", "next", "settled", "texts", "woken")

    def __init__(self, texts: Sequence[tuple[str, str, str, str, str | None]]) -> None:
        self.texts = texts
        self.settled = False
        self.failure: str | None = None
        self.next: _Ticket | None = None
        self.woken = threading.Lock()
        self.woken.acquire()

    def wake_next(self) -> None:
        """Pass the news on to whoever shared this ticket's commit and stands behind it."""
        follows, self.next = self.next, None
        if follows is not None:
            follows.woken.release()


class _Chain:
    """The state of this process start's chain; touched only by who holds the pen."""

    __slots__ = (
        "away_since",
        "certain",
        "full",
        "head_n",
        "mac",
        "mark_at",
        "n",
        "registered",
        "spool",
        "spooled",
        "told",
        "writer",
    )

    def __init__(self, writer: Writer, spool: Spool | None, origin: bytes) -> None:
        self.writer = writer
        self.spool = spool
        self.n = 0
        self.mac = origin
        self.registered = False
        self.mark_at = 0.0  # elapsed seconds at which the register shall hear of it again
        self.head_n = 0  # what the database holds as head
        self.certain = True
        self.away_since: float | None = None
        self.full = False
        self.spooled = 0
        self.told = False  # the log knows that nothing can be recorded

    def advance(self, rows: Sequence[Row]) -> None:
        self.n, self.mac = rows[-1].n, rows[-1].mac

    def away(self, now: float, *, full: bool) -> None:
        self.away_since, self.full = now, full

    def back(self) -> int:
        if self.spool is not None and not self.spool.empty:
            self.spool.clear()
        spooled, self.spooled = self.spooled, 0
        if spooled:  # bringing them in registered the writer and raised its head
            self.registered, self.head_n = True, self.n
        self.away_since, self.full, self.told = None, False, False
        return spooled

    def tell_once(self, refusal: str) -> None:
        if not self.told:
            log(Event.AUDIT_UNAVAILABLE, reason=refusal)
        self.told = True

    def write_spool(self, rows: Sequence[Row]) -> None:
        assert self.spool is not None
        writer = self.writer
        self.spool.append(Batch(writer.id, writer.host, writer.started, self.n, self.mac, rows))
        self.advance(rows)
        self.spooled += len(rows)


def _behind(chain: _Chain | None) -> bool:
    return chain is not None and chain.away_since is None and chain.head_n != chain.n


def _settle(tickets: Sequence[_Ticket], failure: str | None) -> None:
    """Tell everybody in a commit how it ended.

    Only the first is woken here, and each wakes the next: threads that woke all at once would only queue for the
    interpreter's lock, which measured at a sixth of the whole request.
    """
    follows: _Ticket | None = None
    for ticket in reversed(tickets):
        ticket.failure = failure
        ticket.settled = True
        ticket.next, follows = follows, ticket
    if follows is not None:
        follows.woken.release()


@lru_cache(maxsize=4096)  # the same few words make up nearly all entries
def _check_words(actor: str, action: str, outcome: str) -> None:
    for pattern, word in ((_ACTOR, actor), (_ACTION, action), (_OUTCOME, outcome)):
        if pattern.fullmatch(word) is None:
            raise ValueError("actor, action and outcome of an audit entry are words of ours")


def _is_full(error: DatabaseUnavailable) -> bool:
    """Whether the disk is full, below us or below the server (SQLITE_FULL; PostgreSQL Appendix A, 53100
    disk_full).
    """
    cause = error.__cause__
    origin = cause.orig if isinstance(cause, DBAPIError) else None
    code = getattr(origin, "sqlite_errorcode", 0) or 0
    return code & 0xFF == sqlite3.SQLITE_FULL or getattr(origin, "sqlstate", None) == "53100"


def _detail_text(detail: Mapping[str, Detail] | None) -> str | None:
    if detail is None:
        return None
    for key, value in detail.items():
        if _KEY.fullmatch(key) is None:
            raise ValueError("the keys of an audit detail are words of ours")
        if not isinstance(value, (int, float, type(None))):
            return _dump({name: _clean(item) for name, item in detail.items()})
    return _dump(detail)


def _clean(value: Detail) -> Detail:
    if value is None or isinstance(value, (int, float)):
        return value
    if isinstance(value, str):
        return value if _HARMLESS.fullmatch(value) or _PERMISSION.fullmatch(value) else _REDACTED
    return [str(_clean(item)) for item in value]


def _shown(row: Row) -> dict[str, Any]:
    found = _found(row)
    return {
        "writer": found.writer,
        "n": found.n,
        "at": found.at.isoformat(timespec="microseconds"),
        "actor": found.actor,
        "action": found.action,
        "target": found.target,
        "outcome": found.outcome,
        "detail": found.detail,
    }


def _found(row: Row) -> Found:
    at = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=row.at)
    detail = None if row.detail is None else json.loads(row.detail)
    return Found(row.writer, row.n, at, row.actor, row.action, row.target, row.outcome, detail)


def _position(cursor: str | None) -> tuple[int, str, int] | None:
    if cursor is None:
        return None
    at, writer, n = cursor.split(".")
    return int(at), writer, int(n)


def _call_after_fork(trail: Trail) -> None:
    reference = weakref.ref(trail)

    def in_child() -> None:
        survivor = reference()
        if survivor is not None:
            survivor._begin()

    os.register_at_fork(after_in_child=in_child)
