"""The promises, held to what the simulation knows and the broker cannot.

    P1  a rotating refresh token is presented by one holder at a time, and never once a newer one is stored
    P2  while the stored access token lives for what was asked, nobody waits for a provider, and nobody is refused
    P3  what is handed out lives, at the provider and by true time
    P6  what is switched off is handed out no more
    P9  only a grant that is dead at its provider becomes needs_reconnect

and what the protocol promises beside them: tokens change with their generation and only by one, an answer is journaled
before it is committed and never thrown away, no transaction is open while a provider is asked, no open attempt of a living
rotating token is overtaken, a restored database refreshes nothing before it is adopted, and in the end everything whose
grant lives is fresh again.

Three windows are known and counted: a process frozen between its last look at the clock and the first byte, a process
killed between reading an answer and the journal's fsync, and the late answer of an attempt that was taken over with its
token dead, saved between the last look at the row and the first byte of the last try. A step is excused by the first only
if it was late by more than the lease leaves; nothing is excused by the second but the loss of that answer. And a place that
was down while a restored database grew past its mark cannot know that it was restored; that is counted too.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from app.broker.issue import HandOut
from app.broker.journal import Entry
from app.broker.store import place_of
from app.crypto.envelope import open_
from app.errors import (
    ConnectionDisabled,
    DatabaseUnavailable,
    DrawbridgeError,
    InvalidRequest,
    NotFound,
    Overloaded,
)
from tests.simulation.provider import Account, Exchange, Family
from tests.simulation.schedule import Task

if TYPE_CHECKING:
    from tests.simulation.host import Process
    from tests.simulation.world import World

__all__ = ["Checks", "Request", "Row", "Violation"]

# Processes agree on the database's time by asking it, half a round trip of a second at most off.
TOLERANCE: Final = 1.0
# How long a waiter may go on waiting after a token is there: it looks again at least once a second.
PATIENCE: Final = 2.5

_COLUMNS: Final = (
    "id, name, generation, sealed, kek_id, health, admin_state, expires_at, life_seconds, open_attempt, last_try,"
    " lease_until, refresh_at, retry_at, life_known, rotation, grant_type, exported_at, last_error"
)

_EVERYTHING: Final = f"SELECT {_COLUMNS} FROM connections ORDER BY name"


class Row(NamedTuple):
    """A connection as it is committed; times in microseconds of the database's clock."""

    id: str
    name: str
    generation: int
    sealed: bytes | None
    kek_id: str | None
    health: str
    admin_state: str
    expires_at: int | None
    life_seconds: float | None
    open_attempt: str | None
    last_try: int
    lease_until: int | None
    refresh_at: int | None
    retry_at: int | None
    life_known: int
    rotation: str
    grant_type: str
    exported_at: int | None
    last_error: str | None


class Stored(NamedTuple):
    """The tokens in a row."""

    access: str
    refresh: str


class Violation(BaseException):
    """A promise was broken; nothing of the product may catch it."""


@dataclass(eq=False)
class Request:
    """One caller asking one process for one token."""

    process: Process
    name: str
    min_ttl: float | None
    rejected: bool
    began_at: float
    before: Row | None
    known_for: float  # seconds the present tokens had been stored when it began
    could_have: float | None = None  # since when what it asks for has been stored while it waits
    faults_before: int = 0


class Checks:
    """Watches every commit, every request to a provider and every hand-out."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.rows: dict[str, Row] = {}
        self.tokens: dict[str, Stored] = {}
        self.windows: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.requests: dict[Task, Request] = {}
        self.unadopted = False
        self.rolled_back: set[int] = set()
        self.violations: list[str] = []
        self.stored_at: dict[str, float] = {}
        self.switched_at: dict[str, float] = {}
        self.exported: set[int] = set()
        self._ever_stored: dict[int, list[str]] = {}
        self._written: dict[str, tuple[Entry, Process]] = {}
        self._journaled: dict[str, Entry] = {}
        self._observer: sqlite3.Connection | None = None

    # What went wrong

    def violated(self, promise: str, sentence: str) -> None:
        """A promise is broken: the schedule ends here."""
        where = self._world.scheduler
        text = f"{promise}: {sentence}"
        where.note("VIOLATION", text)
        self.violations.append(text)
        raise Violation(text)

    # The database

    def look(self) -> None:
        """Open the observer's own eyes on the database, or open them again after a restore."""
        if self._observer is not None:
            self._observer.close()
        self._observer = sqlite3.connect(self._world.database_file, isolation_level=None)
        self.rows, self.tokens = {}, {}
        self.committed(None)

    def close(self) -> None:
        """Look no more."""
        if self._observer is not None:
            self._observer.close()
            self._observer = None

    def committed(self, process: Process | None) -> None:
        """Something was committed: compare every connection with what it was."""
        assert self._observer is not None
        rows = {row[1]: Row._make(row) for row in self._observer.execute(_EVERYTHING)}
        self.counts["commits"] += 1
        for name in self.rows.keys() - rows.keys():
            if self.rows[name].admin_state != "disconnecting":
                self.violated("rows", f"{name} has vanished")
        for name, row in rows.items():
            before = self.rows.get(name)
            if before is not None and before.id != row.id:
                before = None
            if before == row:
                continue
            self._moved(before, row, process)
        self.rows = rows
        self._look_at_waiters()

    def _moved(self, before: Row | None, row: Row, process: Process | None) -> None:
        if before is None or before.generation != row.generation or before.sealed != row.sealed:
            self._resealed(before, row, process)
        if before is None:
            return
        if row.admin_state != before.admin_state:
            self.switched_at[row.name] = self._world.scheduler.now
        if row.exported_at is not None and before.exported_at is None:
            family = self._world.provider.by_refresh.get(self.tokens[row.name].refresh)
            self.exported |= {family.number} if family is not None else set()
        if row.health == "needs_reconnect" and before.health != "needs_reconnect":
            self._lost(row)
        overtaken = (
            row.generation == before.generation
            and before.open_attempt is not None
            and row.open_attempt not in (None, before.open_attempt)
        )
        if overtaken and row.rotation != "not_seen" and row.grant_type == "authorization_code":
            self.counts["overtaken"] += 1
            if before.expires_at is not None and before.expires_at > (self._database_now() + TOLERANCE) * 1e6:
                self.violated("P1", f"an open attempt of {row.name} was overtaken while its token lives")

    def _resealed(self, before: Row | None, row: Row, process: Process | None) -> None:
        if before is not None:
            if row.generation not in (before.generation, before.generation + 1):
                self.violated(
                    "fence", f"{row.name} went from generation {before.generation} to {row.generation}"
                )
            if row.generation == before.generation and row.kek_id == before.kek_id:
                self.violated("fence", f"the tokens of {row.name} changed within generation {row.generation}")
        stored = self._opened(row)
        if before is not None and row.generation > before.generation and before.sealed is not None:
            self._must_not_open(before, row.generation)
        if before is not None and row.generation == before.generation and stored != self.tokens[row.name]:
            self.violated("fence", f"re-wrapping changed the tokens of {row.name}")
        self.tokens[row.name] = stored
        if before is None or before.generation != row.generation:
            self.stored_at[row.name] = self._world.scheduler.now
        family = self._world.provider.by_refresh.get(stored.refresh)
        if family is None:
            return
        known = stored.refresh in self._ever_stored.get(family.number, ())
        new = not known and (before is None or row.generation > before.generation)
        self._ever_stored.setdefault(family.number, []).append(stored.refresh)
        if (
            process is not None
            and new
            and stored.refresh in self._world.issued
            and not process.place.was_full
        ):
            self._journal_first(row, stored.refresh, process)

    def _journal_first(self, row: Row, token: str, process: Process) -> None:
        _, writer = self._written.get(token, (None, process))
        # What a killed process wrote and did not sync may still be there for whoever adopts its journal.
        if token not in self._journaled and writer is process:
            self.violated(
                "journal", f"the new refresh token of {row.name} was committed before it was journaled"
            )

    def _opened(self, row: Row) -> Stored:
        if row.sealed is None:
            return Stored("", "")
        clear = self._world.open_record(row.sealed, row.id, row.generation)
        return Stored(clear.get("access_token", ""), clear.get("refresh_token", ""))

    def _must_not_open(self, before: Row, generation: int) -> None:
        """A record of another generation must be of no use in this one (it could be put back from a backup)."""
        assert before.sealed is not None
        try:
            open_(before.sealed, place_of(before.id, generation), self._world.keyring)
        except DrawbridgeError:
            return
        self.violated("P4", f"a record of {before.name} opens at another generation than its own")

    def _lost(self, row: Row) -> None:
        stored = self.tokens[row.name]
        family = self._world.provider.by_refresh.get(stored.refresh)
        self.counts["needs_reconnect"] += 1
        self._world.scheduler.note("lost", f"{row.name}: {row.last_error}")
        if family is not None and family.alive and family.current == stored.refresh:
            self.violated("P9", f"{row.name} needs a reconnect ({row.last_error}) though its grant lives")

    def _database_now(self) -> float:
        return self._world.database_time()

    # The provider

    def calls(self, exchange: Exchange) -> None:
        """A request is about to be made."""
        if exchange.task.facts.get("writes") is not None:
            self.violated("P1", f"a transaction is open while {exchange.what} is asked of a provider")

    def presented(self, exchange: Exchange) -> None:
        """The first byte of a body leaves."""
        self.counts[exchange.what] += 1
        self.counts[f"fate {exchange.fate}"] += 1
        if exchange.what in ("refresh", "mint") and self.unadopted:
            if exchange.process.could_not_know:
                self.windows["restored_unseen"] += 1
                self.unadopted = False  # from here on the clone is at work, and what it spends is spent
                self.rolled_back |= {family.number for family in self._world.provider.families}
                return
            self.violated("adopt", "a restored database was refreshed from before it was adopted")
        family = exchange.family
        if exchange.what != "refresh" or family is None:
            return
        row = self.rows.get(family.account.name)
        if family.number in self.exported and not self._froze(exchange):
            self.violated("export", f"{family.account.name} was refreshed here after it was moved elsewhere")
        stored = self.tokens.get(family.account.name)
        if row is not None and stored is not None and stored.access:
            over = row.expires_at is None or row.expires_at <= (self._database_now() + TOLERANCE) * 1e6
            # Where nobody told the life, the assumed one counts: after it the token is handed out to nobody.
            dead = over if not row.life_known else not self._alive_at_provider(stored.access)
            exchange.form["dead"] = "yes" if dead else ""
        self._alone(exchange, family)
        if family.account.rotating:
            self._newest(exchange, family)

    def _alive_at_provider(self, access: str) -> bool:
        family = self._world.provider.by_access.get(access)
        # A life counts from the sending of the request, so the provider's token may live a time-out longer; it is learned
        # in whole seconds, rounded down; and the clocks agree within the tolerance.
        slack = self._world.timeout + 1.0 + TOLERANCE
        return family is not None and family.access[access] > self._world.scheduler.now + slack

    def _alone(self, exchange: Exchange, family: Family) -> None:
        """Nobody else may be presenting a token of this family: not whoever holds the lease, and where it rotates not
        even a request whose sender has given up while the provider still works on it."""
        now = self._world.scheduler.now
        others = [
            other
            for process in self._world.processes
            for other in process.exchanges
            # Of the same generation: whoever saves a late answer ends every lease on the generation before.
            if other.what == "refresh" and other.family is family and other.generation == exchange.generation
            if other is not exchange
        ]
        for other in others:
            stopped = other.process.disturbances != other.disturbances
            holds = now - other.began_at < self._world.lease - TOLERANCE or not stopped
            if holds and not self._froze(exchange):
                self.violated(
                    "P1", f"two hold a lease on {family.account.name}: #{other.number}, #{exchange.number}"
                )
        if not family.account.rotating:
            return
        working = [
            one for one in self._world.provider.open if one.token == exchange.token and one is not exchange
        ]
        if working and not self._froze(exchange) and not self._froze(working[0]):
            began = working[0].written_at or 0.0
            self.counts["overlaps"] += 1
            if now - began < self._world.lease:
                self.violated(
                    "P1",
                    f"#{exchange.number} presents a token of {family.account.name} while the provider works on"
                    f" #{working[0].number} sent {now - began:.1f} s ago",
                )

    def _newest(self, exchange: Exchange, family: Family) -> None:
        stored = self._ever_stored.get(family.number, [])
        newer = exchange.token in stored and stored[-1] != exchange.token
        if not newer or family.number in self.rolled_back:
            return
        if self._froze(exchange):
            self.windows["frozen_before_write"] += 1
            return
        if self.stored_at[family.account.name] >= exchange.looked_at:
            # The answer of the attempt it took over was saved after its last look at the row.
            self.windows["answer_came_before_write"] += 1
            return
        self.violated("P1", f"#{exchange.number} presents {exchange.token} though {stored[-1]} is stored")

    def looked_at_the_clock(self, exchange: Exchange) -> None:
        """The last look at the clock before the first byte has been passed."""
        stored = self.tokens.get(exchange.family.account.name) if exchange.family is not None else None
        exchange.access_then = stored.access if stored is not None else ""
        row = self.rows.get(exchange.family.account.name) if exchange.family is not None else None
        exchange.generation = row.generation if row is not None else 0

    def _froze(self, exchange: Exchange) -> bool:
        """Whether it was late between its last look at the clock and its first byte: by more than its lease had left,
        and where the refresh token rotates until the access token of then was dead."""
        rotates = exchange.family is not None and exchange.family.account.rotating
        if exchange.written_at is None or (rotates and self._alive_at_provider(exchange.access_then)):
            return False
        return exchange.written_at - exchange.checked_at > self._world.timeout - TOLERANCE

    def worked(self, exchange: Exchange) -> None:
        """The provider carries a refresh out."""
        family = exchange.family
        if family is None or not family.alive or exchange.token == family.current:
            return
        self.counts["reuse"] += 1
        if family.number in self.rolled_back:
            return
        if self._froze(exchange):
            self.windows["frozen_before_write"] += 1
        elif exchange.form.get("dead"):
            self.counts["last_tries"] += 1
        else:
            self.violated(
                "P1", f"#{exchange.number} made the provider revoke the family of {family.account.name}"
            )

    # The journal

    def written(self, entry: Entry, process: Process) -> None:
        """An answer was given to the system to write."""
        clear = self._world.open_record(entry.sealed.blob, entry.connection, entry.generation)
        self._written[clear.get("refresh_token", "")] = entry, process

    def journaled(self, entry: Entry) -> None:
        """An answer is on the disk."""
        for token, (written, _) in self._written.items():
            if written is entry:
                self._journaled[token] = entry
        self.counts["journaled"] += 1

    def dropped(self, attempt: str) -> None:
        """An answer is forgotten: it must be stored, or the connection must have moved on or be gone."""
        for token, entry in self._journaled.items():
            if entry.attempt != attempt:
                continue
            row = next((row for row in self.rows.values() if row.id == entry.connection), None)
            if row is not None and row.generation < entry.generation:
                self.violated(
                    "journal",
                    f"the answer {token} for {row.name} was thrown away, and nothing newer is stored",
                )

    def died(self, process: Process) -> None:
        """A process was killed: an answer it had read and not yet put on the disk is lost, which is a known window."""
        stored = {token for tokens in self._ever_stored.values() for token in tokens}
        for token in process.read_answers:
            if token not in self._journaled and token not in stored:
                self.windows["killed_before_fsync"] += 1

    # Callers

    def waits(self, task: Task) -> None:
        """A caller begins to wait for a refresh."""
        request = self.requests.get(task)
        if request is None:
            return
        others = [one for one in self.requests.items() if one[1].process is request.process]
        waiting = sum("waits_since" in one.facts for one, _ in others)
        if waiting > self._world.waiters:
            self.violated(
                "P2", f"{waiting} callers of {request.process.name} wait, {self._world.waiters} may"
            )
        self._look_at(request)

    def _look_at_waiters(self) -> None:
        for task, request in self.requests.items():
            if "waits_since" in task.facts:
                self._look_at(request)

    def _look_at(self, request: Request) -> None:
        if self._could_have(self.rows.get(request.name), request):
            request.could_have = request.could_have or self._world.scheduler.now
        else:
            request.could_have = None

    def waited(self, task: Task) -> None:
        """A caller's wait for a refresh is over."""
        request = self.requests.get(task)
        if request is None or request.could_have is None:
            return
        late = self._world.scheduler.now - request.could_have
        request.could_have = None
        if late > PATIENCE and not self._disturbed(request):
            self.violated(
                "P2",
                f"a caller waited {late:.1f} s for a provider though {request.name} had what it asked for",
            )

    def _could_have(self, row: Row | None, request: Request) -> bool:
        if row is None or request.rejected or row.expires_at is None:
            return False
        if row.admin_state != "enabled" or row.exported_at is not None or not self.tokens[row.name].access:
            return False
        left = row.expires_at / 1e6 - self._database_now()
        return left >= self._needed(row, request) + TOLERANCE

    def _needed(self, row: Row, request: Request) -> float:
        if request.min_ttl is None:
            return min(60.0, (row.life_seconds or 900.0) / 4)
        return request.min_ttl

    def _disturbed(self, request: Request) -> bool:
        return request.process.disturbances != request.faults_before

    def handed_out(self, request: Request, token: HandOut) -> None:
        """A caller gets a token."""
        self.counts["hand_outs"] += 1
        access = token.access_token.reveal() if token.access_token is not None else ""
        provider, now = self._world.provider, self._world.scheduler.now
        family = provider.by_access.get(access)
        if family is None:
            self.violated("P3", f"{request.name} was handed out with a token no provider gave")
            return
        needed = request.min_ttl if request.min_ttl is not None else min(60.0, token.life / 4)
        left = family.access[access] - now
        if left < needed - TOLERANCE:
            self.violated(
                "P3", f"{request.name} was handed out {left:.1f} s before its end, {needed:.1f} s were asked"
            )
        if family.died_of == "reuse":
            self.counts["handed_out_revoked"] += 1
        row = self.rows.get(request.name)
        off = row is not None and row.admin_state != "enabled"
        if off and not self._disturbed(request) and now - self.switched_at.get(request.name, now) > PATIENCE:
            self.violated("P6", f"{request.name} was handed out {PATIENCE} s after it was switched off")

    def refused(self, request: Request, error: DrawbridgeError) -> None:
        """A caller gets none."""
        self.counts["refusals"] += 1
        if self._disturbed(request) or isinstance(error, DatabaseUnavailable):
            return
        row = self.rows.get(request.name)
        same = row is not None and request.before is not None and request.before.generation == row.generation
        # A process may be 750 ms behind; until it has looked, it may have no place left to wait.
        same = same and request.known_for > TOLERANCE
        if not same or not self._could_have(row, request) or not self._could_have(request.before, request):
            return
        assert row is not None
        if isinstance(error, InvalidRequest) and (request.min_ttl or 0) > (row.life_seconds or 900.0) / 2:
            return
        if isinstance(error, Overloaded | NotFound | ConnectionDisabled):
            # Shutting down, or the row was made, switched on or renamed within the second others take to notice.
            return
        self.violated("P2", f"{request.name} was refused ({error.code}) though its token lives long enough")

    # The operator

    def could_not_know(self, process: Process) -> bool:
        """Whether a process started on a restored database that has, by now, grown past its place's mark, before any
        process of that place had seen it."""
        if not self.unadopted:
            return False
        assert self._observer is not None
        epoch = self._observer.execute("SELECT value FROM epochs WHERE name = 'connections'").fetchone()[0]
        return bool(epoch >= process.place.promised) and not process.place.notes_a_restore()

    def restored(self) -> None:
        """An older copy of the database was put in place."""
        self.look()
        self.unadopted = True
        self.exported.clear()  # what was moved since is not known any more; that is why it must be adopted
        self.counts["restores"] += 1
        for name, stored in self.tokens.items():
            for family in self._world.accounts[name].families if name in self._world.accounts else ():
                if stored.refresh in family.refresh_tokens and family.current != stored.refresh:
                    self.rolled_back.add(family.number)

    # The end

    def unsettled(self) -> str | None:
        """What is not yet as it must be once all faults are over, None when everything is."""
        for name, account in self._world.accounts.items():
            problem = self._unsettled(name, account)
            if problem is not None:
                return problem
        return None

    def _unsettled(self, name: str, account: Account) -> str | None:
        row = self.rows.get(name)
        if row is None:
            return None  # disconnected, or not yet made when the backup was
        if row.admin_state == "disconnecting":
            return f"still being disconnected: {name}"
        if row.admin_state == "disabled" or row.exported_at is not None:
            return None
        stored = self.tokens[name]
        family = self._world.provider.by_refresh.get(stored.refresh)
        if account.minted:
            family = account.families[-1]
        lives = family is not None and family.alive and (account.minted or family.current == stored.refresh)
        if row.health == "needs_reconnect":
            if family is not None and family.alive and self._kept_on_disk(family):
                return f"needs a reconnect though {family.current} was journaled: {name}"
            return f"needs a reconnect though its grant lives: {name}" if lives else None
        if not lives:
            return f"{row.health} though its grant is dead: {name}"
        if row.open_attempt is not None:
            return f"has an open attempt: {name}"
        if not self._world.provider.lives(stored.access, self._world.scheduler.now + 1.0):
            return f"not fresh: {name}"
        return None

    def _kept_on_disk(self, family: Family) -> bool:
        """Whether the answer with the good refresh token reached a disk and no row."""
        token = family.current
        stored = token in self._ever_stored.get(family.number, ())
        return token in self._journaled and not stored and family.number not in self.rolled_back
