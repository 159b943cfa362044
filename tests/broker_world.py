"""A broker whose time can be moved: several hosts, their database and both vendors on one clock that jumps.

One installation serves many tests, because making one costs more than most tests; between two tests every connection is
removed, every fault lifted and every breaker closed.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import sqlalchemy as sa

from app.access.callers import Caller
from app.access.permissions import Permission
from app.bootstrap import Services, prepare_database
from app.broker import findings
from app.broker.connection import Connection
from app.broker.issue import HandOut
from app.broker.refresh import Ending
from app.clock import Clock
from app.db.engine import Database
from app.db.schema import apps, attempts, connections, notices
from app.db.schema import findings as findings_table
from app.errors import DatabaseUnavailable
from app.secret import Secret
from emulator import GrantTruth, Minted, SeenRequest, VendorControl
from tests.installation import HUBSPOT, SALESFORCE, Installation, installation
from tests.waiting import PATIENCE, until

CLIENTS = {"hubspot": HUBSPOT, "salesforce": SALESFORCE}
LEASE = 13.0
T = TypeVar("T")

# `db_now` asks for clock_timestamp() without a schema; ours is found before PostgreSQL's.
_SHIFTED_POSTGRESQL = """
CREATE SCHEMA shifted;
CREATE TABLE shifted.clock_shift (seconds double precision NOT NULL);
INSERT INTO shifted.clock_shift VALUES (0);
CREATE FUNCTION shifted.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS
$$ SELECT pg_catalog.clock_timestamp() + (SELECT seconds FROM shifted.clock_shift) * interval '1 second' $$;
"""


@dataclass
class Shift:
    """How far time was moved, in seconds; whoever moves it holds the lock until the database knows of it, too."""

    seconds: float = 0.0
    settled_at: float = 0.0  # local time at which the last move was over
    lock: threading.Lock = field(default_factory=threading.Lock)


class JumpingClock(Clock):
    """The real clock moved forward, wall time and elapsed time alike; waiting takes real time."""

    def __init__(self, shift: Shift) -> None:
        super().__init__()
        self._shift = shift

    def local(self) -> float:
        """This machine's time, moved."""
        return super().local() + self._shift.seconds

    def elapsed(self) -> float:
        """Elapsed seconds, moved."""
        return super().elapsed() + self._shift.seconds

    def agree(self, *, database: float, asked: float, answered: float) -> None:
        """Adopt the database's clock, unless it was read before or while time was moved.

        Hosts look at it by themselves: one that read it in the middle of a move would be hours behind.
        """
        with self._shift.lock:
            if asked >= self._shift.settled_at:
                super().agree(database=database, asked=asked, answered=answered)


@dataclass
class World:
    """One installation with two web hosts `one` and `two` on the same moving clock."""

    made: Installation
    shift: Shift
    hosts: list[Services] = field(default_factory=list)
    _names: Iterator[int] = field(default_factory=itertools.count)

    @property
    def one(self) -> Services:
        """The first host."""
        return self.hosts[0]

    @property
    def two(self) -> Services:
        """The second host."""
        return self.hosts[1]

    @property
    def salesforce(self) -> VendorControl:
        """The emulated Salesforce."""
        return self.made.emulator.control.salesforce

    @property
    def hubspot(self) -> VendorControl:
        """The emulated HubSpot."""
        return self.made.emulator.control.hubspot

    def vendor(self, provider: str) -> VendorControl:
        """The emulated vendor of this name."""
        return self.made.emulator.control.vendor(provider)

    def host(self, **overrides: str) -> Services:
        """Start one more host on the same clock."""
        host = self.made.host(clock=JumpingClock(self.shift), **overrides)
        self.hosts.append(host)
        return host

    def jump(self, seconds: float) -> None:
        """Move time forward for every host, the database and both vendors."""
        with self.shift.lock:
            self.shift.seconds += seconds
            self.made.emulator.control.advance(seconds)
            if self.one.database.dialect == "postgresql":
                url = self.made.database_url.replace("postgresql+psycopg", "postgresql")
                with psycopg.connect(url, autocommit=True) as connection:
                    connection.execute("UPDATE shifted.clock_shift SET seconds = %s", (self.shift.seconds,))
            self.shift.settled_at = self.one.clock.local()
        for host in self.hosts:
            host.database.sample_clock()

    def name(self) -> str:
        """A connection name nobody has used."""
        return f"c{next(self._names)}"

    def connected(self, provider: str, *, name: str | None = None) -> Connection:
        """An account connected through the browser; its token lives as long as the vendor says."""
        control = self.vendor(provider)
        account = control.add_account(users=[{"name": "ada"}])
        name = name or self.name()
        return connect_account(self.one, self.made, provider, name=name, account=account["id"])

    def imported(self, provider: str, count: int, *, living: bool = False) -> list[Connection]:
        """Connections brought in from elsewhere, each of an account of its own; without a token unless `living`."""
        grants = self.vendor(provider).grant_many(CLIENTS[provider], count)
        lines = [import_line(provider, grant, living=living, name=self.name()) for grant in grants]
        results = list(self.one.transfer.import_lines(lines))
        assert [result.outcome for result in results] == ["added"] * count, results
        return [self.one.store.named(result.name or "") for result in results]

    def expired(self, provider: str) -> Connection:
        """A connected account whose access token has run out."""
        connection = self.connected(provider)
        assert connection.life_seconds is not None
        self.jump(connection.life_seconds + 1)
        return connection

    def refresh(self, connection: Connection, *, host: Services | None = None) -> Ending:
        """Refresh it once as the worker would, and wait for the end."""
        host = host or self.one
        return host.refresher.ask(host.store.named(connection.name)).result(PATIENCE)

    def now(self, connection: Connection) -> Connection:
        """The connection as it is in the database now."""
        found = self.one.store.get(connection.id)
        assert found is not None
        return found

    def caller(self, host: Services | None = None, *permissions: str) -> Caller:
        """A caller that may have every token, or what the permissions say."""
        allow = [Permission.parse(text) for text in permissions or ("token:issue@*",)]
        return (host or self.one).callers.add(f"caller-{self.name()}", allow=allow).caller

    def issue(self, connection: Connection, **asked: Any) -> HandOut:
        """Hand its token out on the first host."""
        return self.one.issuer.issue(self.caller(), connection.name, **asked)

    def grant_of(self, connection: Connection) -> GrantTruth:
        """The vendor's newest grant of this account."""
        control = self.made.emulator.control
        return control.grants(vendor=connection.provider, account=connection.account_id)[-1]

    def revoke_upstream(self, connection: Connection, *, access_tokens: bool = True) -> None:
        """Have the vendor revoke the account's grant, as its owner would."""
        self.made.emulator.control.revoke(self.grant_of(connection).id, access_tokens=access_tokens)

    def refreshes(self, provider: str, connection: Connection | None = None) -> list[SeenRequest]:
        """The refresh requests the vendor has seen, of one account or all, since the test began."""
        return [
            request
            for request in self.vendor(provider).requests()
            if request.grant_type == "refresh_token"
            and (connection is None or request.account == connection.account_id)
        ]

    def findings(self) -> list[str]:
        """The kinds of all open findings."""
        return [found.kind for found in findings.open_findings(self.one.database)]

    def notices(self) -> list[tuple[str, str]]:
        """Event and connection of every notice there is, the oldest first."""
        query = sa.select(notices.c.event, notices.c.body).order_by(notices.c.created_at)
        with self.one.database.read() as transaction:
            return [(row.event, row.body["connection"]) for row in transaction.execute(query)]

    def attempts(self, connection: Connection) -> list[tuple[str | None, str | None]]:
        """Outcome and code of every attempt, in order."""
        query = (
            sa.select(attempts.c.outcome, attempts.c.code)
            .where(attempts.c.connection_id == connection.id)
            .order_by(attempts.c.started_at)
        )
        with self.one.database.read() as transaction:
            return [(row.outcome, row.code) for row in transaction.execute(query)]

    def clear(self) -> None:
        """Make room for the next test."""
        for vendor in (self.hubspot, self.salesforce):
            vendor.behave()
        self.made.emulator.control.reset("counters")
        with self.one.database.write() as transaction:
            for table in (connections, attempts, findings_table, notices):
                transaction.execute(sa.delete(table))
            transaction.execute(sa.update(apps).values(failures=0, open_until=None, open_reason=None))
        # So that they look again: one may still think that the database is gone which a test before took away.
        self.jump(1)
        until(lambda: all(_knows_the_epoch(host) for host in self.hosts))


@contextmanager
def world(database_url: str, directory: Path, **environ: str) -> Iterator[World]:
    """A world with two hosts; leases of 12 s, a second for each request to a provider unless `environ` says otherwise."""
    settings = {"LEASE_SECONDS": str(LEASE), "PROVIDER_TIMEOUT_SECONDS": "2", "WEB_THREADS": "64"} | environ
    with installation(database_url, directory, **settings) as made:
        prepare_database(made.settings())
        if database_url.startswith("postgresql"):
            _shift_postgresql(database_url)
        opened = World(made, Shift())
        opened.host()
        opened.host()
        yield opened


def _knows_the_epoch(host: Services) -> bool:
    try:
        host.watch.look()
    except DatabaseUnavailable:
        return False
    return True


def _shift_postgresql(database_url: str) -> None:
    """Let this one database's clock be moved."""
    url = database_url.replace("postgresql+psycopg", "postgresql")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(_SHIFTED_POSTGRESQL)
        name = connection.info.dbname
        connection.execute(f'ALTER DATABASE "{name}" SET search_path = public, shifted, pg_catalog')


def connect_account(
    host: Services, made: Installation, provider: str, *, name: str, account: str
) -> Connection:
    """Connect this very account through the browser; an existing connection of the name is connected again."""
    existing = host.store.by_name(name)
    start = host.connect.start(
        host.apps.find(provider),
        started_by="admin:cli",
        name=None if existing else name,
        connection=existing,
    )
    consent = made.emulator.control.vendor(provider).consent(start.url, account=account)
    code = consent.answer("code")
    assert code is not None, consent.body
    state = consent.answer("state")
    done = host.connect.finish(provider, state=state, code=Secret(code), error=None, browser=start.browser)
    return done.connection


def import_line(provider: str, grant: Minted, *, living: bool, **changes: object) -> str:
    """A line for `connection import` that brings this grant in."""
    line: dict[str, object] = {
        "provider": provider,
        "account_id": grant.account,
        "user_id": grant.user,
        "refresh_token": grant.refresh_token,
    }
    if living:
        line["access_token"] = grant.access_token
        line["expires_at"] = datetime.fromtimestamp(grant.expires_at, UTC).isoformat()
    if provider == "salesforce":
        line["instance_url"] = grant.instance_url
    return json.dumps(line | changes)


def together(count: int, work: Callable[[int], T]) -> list[T]:
    """Do something in so many threads that begin at the same moment; their results."""
    barrier = threading.Barrier(count)

    def begin(number: int) -> T:
        barrier.wait(PATIENCE)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


@dataclass
class Pause:
    """A method that stops at its beginning until it is let go."""

    reached: threading.Event = field(default_factory=threading.Event)
    _go: threading.Event = field(default_factory=threading.Event)

    def let_go(self) -> None:
        """Go on."""
        self._go.set()

    def wait(self) -> None:
        """Return when somebody has arrived there."""
        assert self.reached.wait(PATIENCE), "nobody came to the place"

    def arrive(self) -> None:
        """Stop here."""
        self.reached.set()
        assert self._go.wait(PATIENCE), "nobody let it go"


@contextmanager
def paused(owner: object, method: str) -> Iterator[Pause]:
    """Freeze whoever calls a method of this one object, as a suspended process would freeze there."""
    real = getattr(owner, method)
    pause = Pause()

    def frozen(*arguments: Any, **options: Any) -> Any:
        pause.arrive()
        return real(*arguments, **options)

    setattr(owner, method, frozen)
    try:
        yield pause
    finally:
        setattr(owner, method, real)
        pause.let_go()


def write_direct(database: Database, connection: Connection, **values: Mapping[str, Any] | object) -> None:
    """Change columns of a row past the broker, as a fault or another version might have."""
    with database.write() as transaction:
        transaction.execute(sa.update(connections).where(connections.c.id == connection.id).values(**values))
