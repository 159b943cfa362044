"""One installation under attack: emulated providers, hosts, and connections that are brought in anew each round."""

from __future__ import annotations

import base64
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from app.access.permissions import Permission
from app.bootstrap import Services
from app.broker.connection import Connection, Health
from app.db.schema import attempts, connections
from emulator import Minted
from emulator.model import VendorName
from tests.chaos.hosts import Host, Kind
from tests.chaos.probing import Probers
from tests.chaos.profiles import Pace
from tests.chaos.tally import Tally
from tests.installation import HUBSPOT, SALESFORCE, Installation, installation
from tests.postgres import PostgresServer

__all__ = ["Link", "Run", "Stage", "staged"]

_WARM_UPS: Final = 8  # times that a connection is brought in before it is given up
_CLIENTS: Final[Mapping[VendorName, str]] = {"hubspot": HUBSPOT, "salesforce": SALESFORCE}


@dataclass(frozen=True, slots=True)
class Run:
    """What a scenario is given: its pace and dice, where it may work, and what it counts into."""

    pace: Pace
    dice: random.Random
    seed: int
    database_url: str
    directory: Path
    tally: Tally
    server: PostgresServer | None = None
    broken_rule: str | None = None

    def say(self, text: str) -> None:
        """Progress, on stderr."""
        when = time.strftime("%H:%M:%S", time.gmtime())
        print(f"{when} {self.tally.scenario} on {self.tally.database}: {text}", file=sys.stderr, flush=True)

    def rounds(self) -> Iterator[int]:
        """The numbers of the rounds, counted into the tally as each ends."""
        for number in range(1, self.pace.rounds + 1):
            began = time.monotonic()
            yield number
            self.tally.rounds += 1
            self.say(f"round {number}/{self.pace.rounds} done in {time.monotonic() - began:.0f} s")


@dataclass(frozen=True, slots=True)
class Link:
    """A connection as one round brought it in: a fresh grant, and when that was."""

    name: str
    vendor: VendorName
    connection_id: str
    grant_id: str
    brought_at: datetime


@dataclass(slots=True)
class Stage:
    """The installation with its hosts; `command` is a process of the product's own that no fault touches: this one."""

    run: Run
    made: Installation
    command: Services
    credentials: str
    hosts: list[Host] = field(default_factory=list)
    last_at_rest: list[str] = field(default_factory=list)
    _people: dict[str, tuple[str, str]] = field(default_factory=dict)

    def host(self, name: str, kind: Kind, *, state: str | None = None, **settings: str) -> Host:
        """Make a host, not started; `state` names a state folder shared with other processes of one machine."""
        values = {"LOG_LEVEL": "INFO", "WEB_WORKERS": "1", **settings}
        chaos = {key: text for key, text in values.items() if key.startswith("CHAOS_")}
        drawbridge = {key: text for key, text in values.items() if not key.startswith("CHAOS_")}
        environ = self.made.environment(host=state or name, **drawbridge) | chaos
        if self.run.broken_rule:
            environ["CHAOS_BREAK"] = self.run.broken_rule
        host = Host(name, kind, environ, log=self.run.directory / f"{name}.log")
        self.hosts.append(host)
        return host

    def start(self, hosts: Sequence[Host]) -> None:
        """Start hosts side by side and wait until they serve."""
        for host in hosts:
            host.launch()
        for host in hosts:
            host.wait_until_serving()
        self.run.say(f"{', '.join(host.name for host in hosts)} up")

    @property
    def webs(self) -> list[Host]:
        """The hosts that can be asked for tokens."""
        return [host for host in self.hosts if host.kind == "web"]

    def probers(self, names: Sequence[str], *, min_ttl: float, **options: float) -> Probers:
        """Callers that ask all web hosts for these connections."""
        return Probers(
            self.webs,
            names,
            self.credentials,
            min_ttl=min_ttl,
            seed=self.run.seed,
            **options,  # type: ignore[arg-type]
        )

    # Connections

    def bring(self, names: Sequence[str], vendor: VendorName = "salesforce") -> list[Link]:
        """Give each connection a fresh grant at the provider and store it; the workers refresh it at once."""
        brought_at = self.command.clock.now()
        minted = [(name, self._mint(name, vendor)) for name in names]
        for name, grant in minted:
            self._import(_line(name, vendor, grant))
        rows = self.rows()
        return [Link(name, vendor, rows[name].id, grant.grant_id, brought_at) for name, grant in minted]

    def _import(self, line: str) -> None:
        """As an operator would: once more when the connection changed at that very moment."""
        for _ in range(10):
            (result,) = self.command.transfer.import_lines([line], replace=True)
            if result.problem is None:
                return
            time.sleep(0.1)
        raise RuntimeError(f"import failed: {result.problem}")

    def misbehave(self, kind: str, name: str, *, vendor: VendorName = "salesforce", **options: Any) -> None:
        """Let the provider misbehave towards one connection."""
        account, _ = self._people[name]
        self.made.emulator.control.vendor(vendor).misbehave(kind, account=account, **options)
        self.run.tally.faults += 1

    def issued(self) -> dict[str, list[float]]:
        """When the provider issued access tokens for each connection, in order."""
        names = {account: name for name, (account, _) in self._people.items()}
        moments: dict[str, list[float]] = {}
        for grant in self.made.emulator.control.grants():
            moments.setdefault(names[grant.account], []).extend(access.issued_at for access in grant.access)
        return {name: sorted(some) for name, some in moments.items()}

    def leases_of(self, host: Host) -> int:
        """How many refreshes this host has begun and not ended, by the database's word."""
        mine = sa.select(sa.func.count()).where(
            attempts.c.host == host.name, attempts.c.finished_at.is_(None)
        )
        still = attempts.c.id.in_(sa.select(connections.c.open_attempt))
        with self.command.database.read() as transaction:
            return int(transaction.scalar(mine.where(still)) or 0)

    def rows(self) -> dict[str, Connection]:
        """Every connection as the database has it, by name."""
        return {row.name: row for row in self.command.store.page(limit=10_000)}

    def warm_up(self, names: Sequence[str], vendor: VendorName = "salesforce") -> None:
        """Bring the connections in and return when all are refreshed and the life of their tokens is known.

        A life that nobody has told yet is taken for a quarter of an hour, the shortest Salesforce offers; these live for
        seconds. Asking for it is tried once a refresh, so whoever did not get to know it is brought in again.
        """
        for _ in range(_WARM_UPS):
            links = self.bring(names, vendor)
            self.wait_until_settled(links, within=20.0)
            time.sleep(0.5)
            rows = self.rows()
            names = [link.name for link in links if not rows[link.name].life_known]
            if not names:
                self.run.say("connections ready")
                return
        raise RuntimeError(f"the connections did not become ready: {names}")

    def wait_until_settled(self, links: Sequence[Link], *, within: float) -> list[Link]:
        """Wait until each was refreshed or is known to be lost, be it refreshed again later; those that were not."""
        until = time.monotonic() + within
        waiting = list(links)
        while waiting and time.monotonic() < until:
            rows = self.rows()
            waiting = [link for link in waiting if not _settled(rows[link.name], link)]
            if waiting:
                self.last_at_rest = [f"{link.name} {_state(rows[link.name])}" for link in waiting]
                time.sleep(0.2)
        return waiting

    def _mint(self, name: str, vendor: VendorName) -> Minted:
        control = self.made.emulator.control.vendor(vendor)
        if name not in self._people:
            grant = control.grant(_CLIENTS[vendor])
            self._people[name] = (grant.account, grant.user)
            return grant
        account, user = self._people[name]
        return control.grant(_CLIENTS[vendor], account=account, user=user)


def _settled(row: Connection, link: Link) -> bool:
    if row.health is Health.NEEDS_RECONNECT:
        return True
    refreshed = row.last_refresh_at is not None and row.last_refresh_at > link.brought_at
    return refreshed and row.health is Health.HEALTHY and row.open_attempt is None


def _state(row: Connection) -> str:
    attempt = (
        f", attempt open, lease until {row.lease_until:%H:%M:%S}"
        if row.open_attempt and row.lease_until
        else ""
    )
    return f"({row.health.value}{attempt})"


def _line(name: str, vendor: VendorName, grant: Minted) -> str:
    values = {
        "name": name,
        "provider": vendor,
        "account_id": grant.account,
        "access_token": grant.access_token,
        "refresh_token": grant.refresh_token,
        "expires_at": grant.expires_at,
    }
    return json.dumps(values | ({"user_id": grant.user} if vendor == "salesforce" else {}))


@contextmanager
def staged(run: Run, *, directory: Path | None = None, **settings: str) -> Iterator[Stage]:
    """An installation in the run's directory or the given one; `settings` are those of all hosts.

    Everything is gone afterwards.
    """
    pace = run.pace
    common = {
        "PROVIDER_TIMEOUT_SECONDS": f"{pace.timeout:g}",
        "LEASE_SECONDS": f"{pace.lease:g}",
        "LOG_LEVEL": "INFO",
        **settings,
    }
    life = {"token_lifetime": pace.life}
    place = directory or run.directory
    url = f"sqlite:///{place / 'drawbridge.db'}" if run.tally.database == "sqlite" else run.database_url
    with installation(url, place, hubspot_app=life, salesforce_app=life, **common) as made:
        # Every round is one more approval of the same user.
        made.emulator.control.salesforce.settings(approval_cap=None)
        command = made.host("command")
        added = command.callers.add("prober", allow=_ALLOWED, rate=100_000.0)
        assert added.client_secret is not None
        pair = f"{added.caller.client_id}:{added.client_secret.reveal()}"
        stage = Stage(run, made, command, base64.b64encode(pair.encode()).decode())
        try:
            yield stage
        finally:
            for host in stage.hosts:
                host.close()


_ALLOWED: Final = [Permission.parse("token:issue@*"), Permission.parse("connection:manage@*")]
