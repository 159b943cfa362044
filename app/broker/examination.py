"""Collecting what `doctor` judges by: rows, attempts, findings, processes, the disk; and telling findings in its words.

Everything is read, nothing is changed, and no provider is asked. Many connections are looked at with as many queries as
one: what concerns an app or the whole installation is read once and shared.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from app.broker import alarms, findings, installation
from app.broker.adoption import Adoption
from app.broker.apps import Apps
from app.broker.connection import Connection
from app.broker.doctor import (
    AppFacts,
    Diagnosis,
    Facts,
    HouseFacts,
    Try,
    Vitals,
    approvals_of,
    diagnose,
    diagnose_finding,
    vitals,
)
from app.broker.findings import Finding, FindingKind
from app.broker.installation import ProcessRow
from app.broker.store import Store
from app.clock import Clock
from app.crypto.keyring import Keyring
from app.db.engine import Database
from app.db.schema import apps, attempts, connections
from app.db.schema import installation as installation_table
from app.errors import NotFound, ProviderMisconfigured, Unopenable
from app.oauth2.provider import Provider

__all__ = ["Examiner", "Told"]

_LATELY: Final = timedelta(minutes=10)
_LARGEST_SKEW: Final = 5.0  # seconds; the same as /health warns of
_MOST_TRIES: Final = 200
_AT_ONCE: Final = 500  # ids in one IN list
_PROBE: Final = bytes(4096)  # one block: less may fit into a file system that is full
_NOT_REACHED: Final = ("dns", "refused", "unreachable", "connect_timeout", "tls", "tls_untrusted", "reset")
_ANSWERED: Final = ("granted", "refused", "unavailable")
# A newer version that runs beside this one may know more kinds.
_KINDS: Final[Mapping[str, FindingKind]] = {kind.value: kind for kind in FindingKind}
# The finding that stops an app most comes first.
_GRAVEST: Final = (FindingKind.APP_MISCONFIGURED, FindingKind.PROVIDER_DOWN, FindingKind.MASS_REFUSAL)


class _Gone(Provider):
    """Stands for a provider whose file is not here any more."""

    name = "unknown"
    title = "the provider"


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """An open finding in the doctor's words."""

    finding: Finding
    diagnosis: Diagnosis


@dataclass(frozen=True, slots=True, kw_only=True)
class _AppLook:
    """What one app's row, findings and connections say."""

    defined: bool
    open: Mapping[FindingKind, str | None]
    total: int
    newest: datetime | None  # when any of them was last refreshed
    failing: Sequence[tuple[str, datetime]]  # error and time of each that fails

    def facts(self, connection: Connection) -> AppFacts:
        """As they concern this connection."""
        failed_at = connection.refused_at or connection.last_error_at
        kind = next((kind for kind in _GRAVEST if kind in self.open), None)
        alike = 1
        if failed_at is not None:
            alike = sum(
                error == connection.last_error and abs(at - failed_at) <= _LATELY
                for error, at in self.failing
            )
        return AppFacts(
            defined=self.defined,
            finding=kind,
            finding_error=None if kind is None else self.open[kind],
            alike=max(alike, 1),
            total=max(self.total, alike, 1),
            granted_since=failed_at is not None and self.newest is not None and self.newest > failed_at,
        )


class Examiner:
    """Looks at connections and findings for whoever asks: command line, API, status page."""

    def __init__(
        self,
        database: Database,
        store: Store,
        *,
        apps: Apps,
        adoption: Adoption,
        keyring: Keyring,
        clock: Clock,
        host: str,
        state_dir: Path,
    ) -> None:
        self._database = database
        self._store = store
        self._apps = apps
        self._adoption = adoption
        self._keyring = keyring
        self._clock = clock
        self._host = host
        self._state_dir = state_dir

    def examine(self, connection: Connection) -> Diagnosis:
        """What is the matter with this connection, this host's disk included."""
        return self._diagnoses([connection], disk=self._disk())[0]

    def tell(self, opened: Sequence[Finding]) -> list[Told]:
        """Open findings with what the doctor says of each."""
        wanted = [finding.connection_id for finding in opened if finding.connection_id]
        rows = list(self._store.these(wanted).values())
        found: dict[str | None, Diagnosis] = dict(
            zip((row.id for row in rows), self._diagnoses(rows), strict=True)
        )
        providers = {row.id: row.provider for row in self._apps.list()} if opened else {}
        now = self._clock.now()
        traffic = self._traffic(now) if any(map(_unreached, (one.code for one in opened))) else []

        def of(finding: Finding) -> Diagnosis:
            if finding.connection_id in found:
                return found[finding.connection_id]
            vendor = self._vendor(providers.get(finding.app_id or "", ""))
            house = _reach(HouseFacts(), vendor.name, tries=(), traffic=traffic)
            kind = _KINDS.get(finding.kind)
            return diagnose_finding(vendor, kind, finding.code or "", now=now, house=house)

        return [Told(finding=finding, diagnosis=of(finding)) for finding in opened]

    def vitals(self, rows: Sequence[Connection]) -> dict[str, Vitals]:
        """Facts of each connection's grant, by the connection's id."""
        now, counted = self._clock.now(), self._approvals(rows)
        return {
            row.id: vitals(row, self._vendor(row.provider), now=now, approvals=counted.get(row.id))
            for row in rows
        }

    def lapse(self) -> int:
        """Close findings on whole apps that nothing has confirmed for long; how many."""
        now, lapsed = self._clock.now(), 0
        providers = {row.id: row.provider for row in self._apps.list()}
        for finding in findings.open_findings(self._database):
            kind = _KINDS.get(finding.kind)
            if kind not in alarms.APP_WIDE or finding.app_id is None:
                continue
            vendor = self._vendor(providers.get(finding.app_id, ""))
            with self._database.write() as transaction:
                lapsed += alarms.lapse(transaction, kind, app_id=finding.app_id, vendor=vendor, now=now)
        return lapsed

    # Collecting

    def _diagnoses(self, rows: Sequence[Connection], *, disk: str | None = None) -> list[Diagnosis]:
        if not rows:
            return []
        now = self._clock.now()
        disagreement = self._adoption.disagreement()
        alive = installation.alive(self._database, now=now)
        keyless = self._keyless(rows, alive)
        looks = {app_id: self._look(app_id) for app_id in {row.app_id for row in rows}}
        tries, counted = self._tries(rows), self._approvals(rows)
        house = _house(alive, held=None if disagreement is None else disagreement.says, disk=disk)
        traffic = self._traffic(now) if any(map(_unreached, (row.last_error for row in rows))) else []
        return [
            diagnose(
                Facts(
                    connection=row,
                    vendor=self._vendor(row.provider),
                    now=now,
                    tries=tries.get(row.id, ()),
                    approvals=counted.get(row.id),
                    app=looks[row.app_id].facts(row),
                    house=_reach(
                        replace(house, keyless=keyless.get(row.id, ())),
                        row.provider,
                        tries=tries.get(row.id, ()),
                        traffic=traffic,
                    ),
                )
            )
            for row in rows
        ]

    def _vendor(self, name: str) -> Provider:
        return self._apps.providers.get(name) or _Gone()

    def _disk(self) -> str | None:
        """What this host's STATE_DIR says to a block of bytes, None when it takes them; nothing stays there."""
        try:
            self._state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._state_dir, buffering=0) as file:
                file.write(_PROBE)
                os.fsync(file.fileno())
        except OSError as fault:
            return fault.strerror or "unknown error"
        return None

    def _keyless(self, rows: Iterable[Connection], alive: Iterable[ProcessRow]) -> dict[str, tuple[str, ...]]:
        """The hosts of living processes, ours included, that lack a key a connection needs."""
        held = [(self._host, frozenset(self._keyring.ids))]
        held += [(process.host, frozenset(process.kek_ids)) for process in alive]
        with self._database.read() as transaction:
            active = transaction.execute(sa.select(installation_table.c.active_kek)).scalar_one()
            needed = {
                row.id: {row.kek_id, active} - {None}
                for some in _portions([row.id for row in rows])
                for row in transaction.execute(
                    sa.select(connections.c.id, connections.c.kek_id).where(connections.c.id.in_(some))
                )
            }
        return {
            identifier: tuple(dict.fromkeys(host for host, ids in held if not keys <= ids))
            for identifier, keys in needed.items()
        }

    def _look(self, app_id: str) -> _AppLook:
        mine = connections.c.app_id == app_id
        numbers = sa.select(
            sa.func.count().filter(connections.c.admin_state == "enabled").label("total"),
            sa.func.max(connections.c.last_refresh_at).label("newest"),
        ).where(mine)
        failing = sa.select(
            connections.c.last_error, connections.c.refused_at, connections.c.last_error_at
        ).where(mine, connections.c.last_error.is_not(None), connections.c.admin_state == "enabled")
        with self._database.read() as transaction:
            counted = transaction.execute(numbers).one()
            rows = transaction.execute(failing).all()
            opened = findings.of_app(transaction, app_id)
        times = ((row.last_error, row.refused_at or row.last_error_at) for row in rows)
        return _AppLook(
            defined=self._defined(app_id),
            open={kind: finding.code for finding in opened if (kind := _KINDS.get(finding.kind))},
            total=counted.total,
            newest=counted.newest,
            failing=[(error, at) for error, at in times if at is not None],
        )

    def _defined(self, app_id: str) -> bool:
        """Whether the app's client and its provider file are there; secrets that do not open are the keyring's matter."""
        try:
            self._apps.open(app_id)
        except (ProviderMisconfigured, NotFound):
            return False
        except Unopenable:
            return True
        return True

    def _tries(self, rows: Sequence[Connection]) -> dict[str, tuple[Try, ...]]:
        """The attempts on the present tokens of each, the newest first; of many only those that count."""
        telling = attempts.c.outcome.in_(("unknown", "refused")) | attempts.c.finished_at.is_(None)
        found: dict[str, list[Try]] = {}
        with self._database.read() as transaction:
            for some in _portions([row.id for row in rows]):
                query = (
                    sa.select(attempts)
                    .join(connections, connections.c.id == attempts.c.connection_id)
                    .where(connections.c.id.in_(some), attempts.c.generation == connections.c.generation)
                    .order_by(attempts.c.started_at.desc())
                )
                queries = [query.where(telling)]
                if len(rows) == 1:
                    queries.append(query.limit(_MOST_TRIES))
                for row in {row.id: row for each in queries for row in transaction.execute(each)}.values():
                    found.setdefault(row.connection_id, []).append(_try(row))
        return {
            identifier: tuple(sorted(tries, key=lambda each: each.began, reverse=True))
            for identifier, tries in found.items()
        }

    def _approvals(self, rows: Sequence[Connection]) -> dict[str, int]:
        """How many approvals of each one's user and client are known over all rows, whatever app row they go through."""
        limited = {row.id: row for row in rows if self._vendor(row.provider).approvals_limit is not None}
        same, same_app = connections.alias(), apps.alias()
        counted: dict[str, int] = {}
        with self._database.read() as transaction:
            for some in _portions(list(limited)):
                query = (
                    sa.select(connections.c.id, same.c.grant_type, same.c.details)
                    .join(apps, apps.c.id == connections.c.app_id)
                    .join(same, same.c.identity == connections.c.identity)
                    .join(same_app, same_app.c.id == same.c.app_id)
                    .where(
                        connections.c.id.in_(some),
                        same_app.c.provider == apps.c.provider,
                        same_app.c.client_id == apps.c.client_id,
                    )
                )
                for row in transaction.execute(query):
                    counted[row.id] = counted.get(row.id, 0) + approvals_of(row.grant_type, row.details)
        return counted

    def _traffic(self, now: datetime) -> list[_Traffic]:
        """Where and how the attempts of the last ten minutes ended."""
        providers = {row.id: row.provider for row in self._apps.list()}
        by = (attempts.c.app_id, attempts.c.host, attempts.c.outcome, attempts.c.code)
        lately = attempts.c.app_id.in_(list(providers)) & (attempts.c.finished_at >= now - _LATELY)
        query = sa.select(*by, sa.func.count().label("times")).where(lately).group_by(*by)
        with self._database.read() as transaction:
            return [
                _Traffic(
                    provider=providers[row.app_id],
                    host=row.host,
                    answered=row.outcome in _ANSWERED,
                    missed=row.outcome == "not_sent" and row.code in _NOT_REACHED,
                    times=row.times,
                )
                for row in transaction.execute(query)
            ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Traffic:
    """How often attempts on a provider from a host ended like this."""

    provider: str
    host: str
    answered: bool
    missed: bool
    times: int


def _house(alive: Sequence[ProcessRow], *, held: str | None, disk: str | None) -> HouseFacts:
    """What holds for every connection alike."""
    skewed = {process.host: process.skew_seconds for process in alive}
    return HouseFacts(
        held=held,
        disk=disk,
        skewed=tuple((host, by) for host, by in sorted(skewed.items()) if abs(by) > _LARGEST_SKEW),
        worker=any(process.kind == "worker" for process in alive),
    )


def _reach(
    house: HouseFacts, provider: str, *, tries: Sequence[Try], traffic: Sequence[_Traffic]
) -> HouseFacts:
    """The same, and who was reached of late: other providers, and this one from other hosts than the last try's."""
    others = [each for each in traffic if each.provider != provider]
    reached = {each.host for each in traffic if each.provider == provider and each.answered}
    return replace(
        house,
        elsewhere_failed=sum(each.times for each in others if each.missed),
        elsewhere_answered=sum(each.times for each in others if each.answered),
        reached_from=tuple(sorted(reached - {tries[0].host})) if tries else (),
    )


def _unreached(error: str | None) -> bool:
    return (error or "").startswith("not_sent:")


def _try(row: sa.Row[Any]) -> Try:
    return Try(
        began=row.started_at,
        ended=row.finished_at,
        generation=row.generation,
        host=row.host,
        process=row.process_id,
        journal=row.journal,
        outcome=row.outcome,
        code=row.code,
    )


def _portions(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """So many ids at a time as one IN list takes."""
    for start in range(0, len(ids), _AT_ONCE):
        yield ids[start : start + _AT_ONCE]
