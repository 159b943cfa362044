"""Hosts with their processes, callers, admins, the operator, and what befalls them."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import patch
from urllib.parse import parse_qs, urlsplit

from app.access.callers import Caller, CallerId
from app.broker import adoption as adoption_module
from app.broker import connect as connect_module
from app.broker import issue as issue_module
from app.broker import journal as journal_module
from app.broker import refresh as refresh_module
from app.broker import store as store_module
from app.broker.issue import HandOut
from app.broker.store import place_of
from app.clock import Clock
from app.crypto.envelope import open_
from app.crypto.keyring import Keyring
from app.db import engine as engine_module
from app.db import epoch as epoch_module
from app.errors import DrawbridgeError
from app.jobs import lane as lane_module
from app.jobs import schedule as schedule_module
from app.jobs import worker as worker_module
from app.oauth2 import handshake as handshake_module
from app.secret import Secret
from app.telemetry import Event, logs
from tests.simulation.checks import Checks, Request, Row
from tests.simulation.database import SimulatedSqlite, database_fault
from tests.simulation.disk import Disk, Locks
from tests.simulation.host import AHEAD, Place, Process
from tests.simulation.provider import Account, Family, SimulatedProvider
from tests.simulation.schedule import Scheduler, Signal, Task, threading_for
from tests.simulation.template import EPOCH, LEASE, TIMEOUT, Template

__all__ = ["Place", "Process", "World"]

_DATABASEAHEAD: Final = 0.7  # seconds the database's clock is ahead of the true time
_WAITERS: Final = 4


class World:
    """All there is, from one seed."""

    def __init__(
        self, template: Template, directory: Path, *, seed: int, keep_all_steps: bool = False
    ) -> None:
        self.template = template
        self.directory = directory
        self.scheduler = Scheduler(seed, keep_all_steps=keep_all_steps)
        self.random = self.scheduler.random
        self.keyring: Keyring = template.keyring
        self.lease, self.timeout, self.waiters = LEASE, TIMEOUT, _WAITERS
        self.database_file = directory / "drawbridge.db"
        self.url = f"sqlite:///{self.database_file}"
        self.written = Signal(self.scheduler)
        self.audit_fails_until = 0.0
        self.accounts: dict[str, Account] = {}
        self.issued: set[str] = set()
        self.processes: list[Process] = []
        self.places: list[Place] = []
        self.faults: Counter[str] = Counter()
        self.healing = False
        self.checks = Checks(self)
        self.provider = SimulatedProvider(self, life=900.0, names_life=True)
        self.backup: tuple[bytes, int] | None = None
        self._refused_once: set[tuple[int, str]] = set()
        self._traps: dict[str, list[list[Any]]] = {}
        self._ids = 0

    # Time

    def true_time(self, moment: float) -> float:
        """Seconds since 1970 at a moment of virtual time."""
        return EPOCH + moment

    def database_time(self) -> float:
        """What the database's clock shows."""
        return EPOCH + self.scheduler.now + _DATABASEAHEAD

    def worth_a_look(self) -> bool:
        """Whether a worker should claim now; most of the looks that would find nothing are spared."""
        return self._next_due() <= self.database_time() or self.random.random() < 0.02

    def next_look(self) -> float:
        """How long a worker sleeps: until something may be due, so that idle time costs nothing."""
        most = self.provider.life / 3
        until = min(self._next_due() - self.database_time(), most)
        return max(0.3, until) + self.random.choice((1.0, 6.0, 20.0)) * self.random.random()

    def _next_due(self) -> float:
        due = [self._due(row) for row in self.checks.rows.values()]
        return min(due, default=inf)

    def _due(self, row: Row) -> float:
        """When a look at this row may find something to do, by the database's clock in seconds."""
        if row.admin_state == "disconnecting":
            return (row.retry_at or 0) / 1e6
        if row.refresh_at is None or row.admin_state != "enabled":
            return inf
        moments = [row.refresh_at]
        if row.open_attempt is not None:
            moments += [row.lease_until or 0, 0 if row.rotation == "not_seen" else row.expires_at or 0]
        return max(moments) / 1e6

    # Beginning and end of a schedule

    @contextmanager
    def running(self) -> Iterator[World]:
        """The database in place, the seams installed; afterwards nothing of it is left."""
        if self.directory.exists():
            shutil.rmtree(self.directory)
        self.directory.mkdir(parents=True)
        shutil.copyfile(self.template.file, self.database_file)
        with ExitStack() as stack:
            for target, name, value in self._seams():
                stack.enter_context(patch.object(target, name, value))
            self.scheduler.at_point = self._at_point
            self.scheduler.crashed = self._crashed
            self.scheduler.begins_to_wait = self.checks.waits
            self.scheduler.ends_waiting = self.checks.waited
            try:
                yield self
            finally:
                for process in self.processes:
                    self._drop(process)
                self.scheduler.stop()
                self.checks.close()

    def _seams(self) -> list[tuple[Any, str, Any]]:
        threads, pool = threading_for(self.scheduler)
        disk, files = Disk(self), Locks(self)
        secrets = SimpleNamespace(token_hex=self._token, token_urlsafe=self._token, token_bytes=os.urandom)
        jitter = SimpleNamespace(random=self.random.random, uniform=self.random.uniform)
        threaded: tuple[Any, ...] = (refresh_module, issue_module, journal_module, adoption_module)
        threaded += (lane_module, worker_module, schedule_module)
        return [
            *((module, "threading", threads) for module in threaded),
            (refresh_module, "ThreadPoolExecutor", pool),
            (worker_module, "chores", lambda services: []),  # a process here does its chores in its own loop
            (worker_module, "_RENEW", 1e9),  # how fast an app may go is not in question here
            (refresh_module, "random", jitter),
            (schedule_module, "random", jitter),
            (refresh_module, "log", self._heard),
            (journal_module, "os", disk),
            (journal_module, "fcntl", files),
            (adoption_module, "os", disk),
            (engine_module, "_kind_for", self._kind),
            (engine_module, "_follow_forks", lambda database: None),
            # The guard against writing in `read()`: no protocol depends on it, and it doubles the price of a statement.
            (engine_module, "event", SimpleNamespace(listen=lambda *_: None)),
            (epoch_module, "_call_after_fork", lambda watch: None),
            (store_module, "secrets", secrets),
            (connect_module, "secrets", secrets),
            (handshake_module, "secrets", secrets),
            (logs._stream, "threshold", 100),
        ]

    def _token(self, size: int = 16) -> str:
        self._ids += 1
        return f"{self._ids:0{2 * size}x}"

    def _kind(self, url: Any, clock: Clock, _directory: Path, _threads: int) -> SimulatedSqlite:
        return SimulatedSqlite(url, clock, process=self.here())

    def here(self) -> Process:
        """The process whose code is running."""
        task = self.scheduler.current
        assert task is not None
        assert isinstance(task.owner, Process)
        return task.owner

    def _heard(self, event: Event, **_: object) -> None:
        if event is Event.REFRESH_CRASHED:
            self.checks.violated("crash", "a refresh ended with an exception nobody expected")

    def _crashed(self, task: Task, fault: BaseException) -> None:
        raise fault

    # Accounts

    def add_account(self, name: str, number: int, *, age: float) -> None:
        """An account of the template, whose access token is so many seconds old."""
        provider, rotating, minted = self.template.kinds[name]
        account = Account(provider, name, number, rotating, minted)
        self.accounts[name] = account
        family = self.provider.family(account)
        family.count = 1
        life = self.provider.life
        access, refresh = self.template.tokens[name]
        family.access[access] = self.scheduler.now + life - age
        self.provider.by_access[access] = family
        if not minted:
            family.current = refresh
            family.refresh_tokens.add(refresh)
            self.provider.by_refresh[refresh] = family
        self._fit_row(name, life=life, age=age)

    @contextmanager
    def behind_the_back(self) -> Iterator[sqlite3.Connection]:
        """The database as whoever prepares a schedule opens it: nothing of this is a step."""
        raw = sqlite3.connect(self.database_file, isolation_level=None)
        try:
            raw.execute("PRAGMA synchronous=OFF")
            yield raw
        finally:
            raw.close()

    def _fit_row(self, name: str, *, life: float, age: float) -> None:
        now = self.database_time()
        with self.behind_the_back() as raw:
            raw.execute(
                "UPDATE connections SET life_seconds = ?, life_known = 1, obtained_at = ?, expires_at = ?,"
                " refresh_at = ?, last_used_at = ?, rotation = ? WHERE name = ?",
                (
                    life,
                    int((now - age) * 1e6),
                    int((now - age + life) * 1e6),
                    int((now - age + life - min(AHEAD, life / 3)) * 1e6),
                    int(now * 1e6),
                    "not_seen"
                    if not self.accounts[name].rotating
                    else self.random.choice(("unknown", "seen")),
                    name,
                ),
            )

    def age_token(self, name: str, *, left: float) -> None:
        """Make the access token the template gave a connection live so many seconds from now."""
        access, _ = self.template.tokens[name]
        self.accounts[name].families[0].access[access] = self.scheduler.now + left
        self._fit_row(name, life=self.provider.life, age=self.provider.life - left)
        self.checks.look()

    def keep_only(self, names: list[str]) -> None:
        """Remove the template's other connections."""
        marks = ",".join("?" * len(names))
        with self.behind_the_back() as raw:
            raw.execute(f"DELETE FROM connections WHERE name NOT IN ({marks})", names)

    def may_refuse_once(self, family: Family | None) -> bool:
        """Whether one untrue refusal now must do no harm: the first of this generation, and not at a last try."""
        if family is None:
            return False
        row = self.checks.rows.get(family.account.name)
        key = (family.number, f"{family.current}/{row.generation if row else 0}")
        if row is None or row.last_try or key in self._refused_once:
            return False
        self._refused_once.add(key)
        return True

    def open_record(self, sealed: bytes, connection: str, generation: int) -> dict[str, str]:
        """What is sealed in a record."""
        clear: dict[str, str] = json.loads(open_(sealed, place_of(connection, generation), self.keyring))
        return clear

    # Processes

    def add_place(self) -> Place:
        """One more machine."""
        place = Place(
            f"host{len(self.places)}",
            self.directory / f"host{len(self.places)}",
            skew=self.random.uniform(-4.0, 4.0),
            boot=self.random.uniform(10.0, 1e6),
        )
        place.directory.mkdir()
        self.places.append(place)
        return place

    def boot(self, place: Place, number: int) -> Process:
        """Start the broker on a place."""
        life = 1 + sum(process.number == number for process in self.processes)
        process = Process(self, place, number, life)
        self.processes.append(process)
        self.scheduler.spawn(f"{process.name}/serve", process, process.serve)
        return process

    def living(self) -> list[Process]:
        """The processes that can be asked something."""
        return [process for process in self.processes if process.serving and not process.dead]

    def kill(self, process: Process, *, back_after: float | None = None) -> None:
        """Kill -9: memory, locks and the open transaction are gone; the disk and what is on the wire are not."""
        if process.dead:
            return
        self.scheduler.note("killed", process.name)
        self.checks.died(process)
        self._drop(process)
        self.scheduler.condemn(process)
        self.written.fire()
        if back_after is not None:
            self.scheduler.call_at(
                self.scheduler.now + back_after, lambda: self.revive(process.place, process.number)
            )

    def _drop(self, process: Process) -> None:
        if process.dead:
            return
        for exchange in process.exchanges:
            exchange.ended_at = self.scheduler.now
        process.exchanges.clear()
        for raw in process.raws:
            raw.abandon()
        process.raws.clear()
        for descriptor in process.descriptors:
            os.close(descriptor)
        process.descriptors.clear()
        process.dead, process.frozen = True, False

    def revive(self, place: Place, number: int) -> None:
        """Start a process again unless it runs."""
        if not any(process.number == number and not process.dead for process in self.processes):
            self.boot(place, number)

    def power_off(self, place: Place, *, back_after: float) -> None:
        """The machine loses power: all its processes, and what its disk was not made to keep."""
        for process in [process for process in self.processes if process.place is place]:
            self.kill(process, back_after=back_after)
        for file in sorted((place.directory / "journal").glob("*.journal")):
            kept, size = place.synced.get(str(file), 0), file.stat().st_size
            if size > kept:
                os.truncate(file, kept + int((size - kept) * self.random.random()))

    def freeze(self, process: Process, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after so long."""
        if process.dead or process.frozen:
            return
        process.frozen = True
        process.disturbances += 1
        self.scheduler.note("frozen", f"{process.name} {seconds:.1f}")

        def go_on() -> None:
            if process.frozen:
                process.frozen = False
                process.disturbances += 1
                self.scheduler.note("thawed", process.name)
                self.scheduler.thaw(process)

        self.scheduler.call_at(self.scheduler.now + seconds, go_on)

    def database_weather(self, process: Process, kind: str) -> bool:
        """Refuse what the database is not to do now; true when a commit is to be done and reported as failed."""
        if process.cut_off_until > self.scheduler.now:
            process.disturbances += 1
            self.scheduler.note("db.unreachable", kind)
            raise database_fault()
        if process.slow_until > self.scheduler.now:
            process.disturbances += 1
            self.scheduler.sleep(2.0 * self.random.random())
        fault = process.next_fault
        if not fault or (fault != "error" and kind != "db.commit"):
            return False
        process.next_fault = ""
        process.disturbances += 1
        self.scheduler.note(f"db.{fault}", kind)
        if fault == "commit_unknown":
            return True
        raise database_fault()

    # Faults that lie in wait at a kind of point

    def trap(self, kind: str, countdown: int, spring: Callable[[Process], None]) -> None:
        """Have something happen to the process that comes to the nth point of a kind."""
        self._traps.setdefault(kind, []).append([countdown, spring])

    def _at_point(self, task: Task, kind: str) -> None:
        traps = self._traps.get(kind)
        if not traps or self.healing or not isinstance(task.owner, Process):
            return
        for trap in list(traps):
            trap[0] -= 1
            if trap[0] == 0:
                traps.remove(trap)
                trap[1](task.owner)

    # Callers and admins

    def ask(
        self,
        process: Process,
        name: str,
        *,
        min_ttl: float | None = None,
        max_wait: float | None = None,
        reject: bool = False,
    ) -> None:
        """Have a caller ask a process for a token."""

        def run() -> None:
            task = self.scheduler.current
            assert task is not None
            row = self.checks.rows.get(name)
            rejected = self._digest(name) if reject else None
            known_for = self.scheduler.now - self.checks.stored_at.get(name, 0.0)
            request = Request(process, name, min_ttl, reject, self.scheduler.now, row, known_for)
            request.faults_before = process.disturbances
            self.checks.requests[task] = request
            try:
                token = self._issued(process, name, min_ttl=min_ttl, max_wait=max_wait, rejected=rejected)
            except DrawbridgeError as error:
                self.scheduler.note("refused", f"{name} {error.code}")
                self.checks.refused(request, error)
            else:
                self.scheduler.note("handed out", f"{name} generation {token.generation}")
                self.checks.handed_out(request, token)
            finally:
                del self.checks.requests[task]

        self.scheduler.spawn(f"{process.name}/ask", process, run)

    def _issued(self, process: Process, name: str, *, min_ttl: float | None, **how: Any) -> HandOut:
        """As the token endpoint does it: what is ready at once, everything else by deciding anew."""
        if how["rejected"] is None:
            ready = process.issuer.ready(_CALLER, name, min_ttl=min_ttl)
            handed = process.issuer.hand_out([ready])[0] if ready is not None else None
            if handed is not None:
                return handed
        return process.issuer.issue(_CALLER, name, min_ttl=min_ttl, **how)

    def _digest(self, name: str) -> str | None:
        stored = self.checks.tokens.get(name)
        return Secret(stored.access).sha256() if stored is not None else None

    def order(self, what: str, work: Callable[[Process], object]) -> None:
        """Have an admin do something on one of the living processes."""
        living = self.living()
        if not living:
            return
        process = self.random.choice(living)

        def run() -> None:
            self.scheduler.note("admin", what)
            try:
                work(process)
            except DrawbridgeError as error:
                self.scheduler.note("admin failed", f"{what}: {error.code}")

        self.scheduler.spawn(f"{process.name}/admin", process, run)

    def reconnect(self, process: Process, name: str) -> None:
        """Connect an account through the browser, again or anew."""
        account = self.accounts[name]
        existing = process.store.by_name(name)
        start = process.connect.start(
            process.apps.find(account.provider),
            started_by="admin:cli",
            name=None if existing else name,
            connection=existing,
        )
        state = parse_qs(urlsplit(start.url).query)["state"][0]
        code = f"code-{self._token()}"
        self.provider.codes[code] = account
        done = process.connect.finish(
            account.provider, state=state, code=Secret(code), error=None, browser=start.browser
        )
        if done.connection.name != name:
            self.checks.violated("rows", f"{name} was connected again as {done.connection.name}")

    def disconnect(self, process: Process, name: str) -> None:
        """Take a connection away; the worker gives the grant back."""
        process.revoker.disconnect(name)

    def bring_in(self, process: Process, name: str) -> None:
        """Import a new grant of an account, as from another program that will not use it any more."""
        account = self.accounts[name]
        family = self.provider.family(account)
        answer = self.provider.issue(family)
        ends = datetime.fromtimestamp(self.true_time(self.scheduler.now + self.provider.life - 1.0), UTC)
        line = {
            "provider": account.provider,
            "account_id": account.org,
            "user_id": account.user,
            "refresh_token": family.current,
            "access_token": answer["access_token"],
            "expires_at": ends.isoformat(),
            "name": name,
        }
        list(process.transfer.import_lines([json.dumps(line)], replace=True))

    def export(self, process: Process, name: str) -> None:
        """Move a connection to another installation."""
        process.transfer.export(name, public_key_pem=self.template.public_key, deliver=lambda _: None)

    def rekey(self, process: Process) -> None:
        """Make the other key the active one, and re-wrap everything."""
        active = next(row.id for row in process.keys.list() if row.active)
        other = next(kek for kek in self.keyring.ids if kek != active)
        for _ in process.keys.rotate(other):
            self.scheduler.point("rekey")

    # The operator's backups

    def take_backup(self) -> None:
        """Copy the database as it is committed now."""
        with sqlite3.connect(self.database_file, isolation_level=None) as raw:
            memory = sqlite3.connect(":memory:")
            raw.backup(memory)
            epoch = memory.execute("SELECT value FROM epochs WHERE name = 'connections'").fetchone()[0]
            self.backup = (memory.serialize(), epoch)
            memory.close()
        raw.close()
        self.scheduler.note("backup", f"epoch {epoch}")

    def restore(self) -> None:
        """Stop all hosts, put the backup in place, and start them again; the chore that keeps the mark has run before."""
        for process in self.living():
            self.scheduler.spawn(f"{process.name}/mark", process, process.keep_the_mark)
        self.scheduler.call_at(self.scheduler.now + 3.0, self._put_back)

    def _put_back(self) -> None:
        """Put the backup in place where every place must have put a later mark on its disk: a place that was down since
        before the backup, or for a second after a change, cannot know; that is the price the product names.
        """
        if self.backup is None or any(place.promised <= self.backup[1] for place in self.places):
            return
        self.faults["restore"] += 1
        for process in list(self.processes):
            self.kill(process, back_after=1.0 + 5.0 * self.random.random())
        self.checks.close()
        for suffix in ("", "-wal", "-shm"):
            self.database_file.with_name(self.database_file.name + suffix).unlink(missing_ok=True)
        self.database_file.write_bytes(self.backup[0])
        self.scheduler.note("restored", f"epoch {self.backup[1]}")
        self.backup = None
        self.checks.restored()

    def adopt_everywhere(self) -> None:
        """The operator says of each place that complains that this database is ours."""
        self.checks.unadopted = False
        for place in self.places:
            process = next((one for one in self.living() if one.place is place), None)
            if process is not None:
                self.scheduler.spawn(f"{process.name}/adopt", process, partial(_adopt, process))


def _adopt(process: Process) -> None:
    with suppress(DrawbridgeError):
        if process.adoption.disagreement() is not None:
            process.adoption.adopt()


_CALLER: Final = Caller(
    id=CallerId("c" * 32),
    name="reader",
    client_id="reader",
    enabled=True,
    rate=None,
    allow_ips=(),
    permissions=(),
    version=1,
)
