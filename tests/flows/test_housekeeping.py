"""What the worker removes, and what it leaves."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from app.access.audit import Entry
from app.bootstrap import Services
from app.broker.store import new_id
from app.db.schema import (
    admin_logins,
    admin_sessions,
    attempts,
    connect_links,
    connections,
    findings,
    handshakes,
    notices,
)
from app.jobs.housekeeping import Tidying, prune_trail
from tests.access_stage import JumpingClock
from tests.installation import connect, installation

TABLES = (attempts, handshakes, connect_links, admin_logins, admin_sessions, findings, notices)


def fill(host: Services, app_id: str, *, days_ago: float) -> None:
    """One row in every table, of which each ended so long ago."""
    then = host.clock.now() - timedelta(days=days_ago)
    end = {"created_at": then, "expires_at": then}
    hashed = {"token_hash": new_id()}
    attempt = {"id": new_id(), "connection_id": new_id(), "app_id": app_id, "generation": 1, "host": "h"}
    trip = {"state_hash": new_id(), "browser_hash": "b", "provider": "hubspot", "app_id": app_id}
    finding = {"id": new_id(), "kind": "k", "opened_at": then, "seen_at": then, "count": 1, "closed_at": then}
    notice = {"id": new_id(), "event": "e", "body": {}, "created_at": then, "tries": 1, "delivered_at": then}
    rows: tuple[tuple[sa.Table, dict[str, Any]], ...] = (
        (attempts, attempt | {"process_id": "p", "journal": "j", "started_at": then, "finished_at": then}),
        (handshakes, end | trip | {"redirect_uri": "r", "started_by": "admin:cli"}),
        (connect_links, end | hashed | {"app_id": app_id}),
        (admin_logins, end | hashed),
        (admin_sessions, end | {"id_hash": new_id(), "csrf_hash": "c", "seen_at": then}),
        (findings, finding),
        (notices, notice),
    )
    with host.database.write() as transaction:
        for table, row in rows:
            transaction.execute(sa.insert(table).values(**row))


def counts(host: Services) -> dict[str, int]:
    """How many rows there are in each table."""
    with host.database.read() as transaction:
        return {
            table.name: int(transaction.scalar(sa.select(sa.func.count()).select_from(table)) or 0)
            for table in TABLES
        }


def test_old_rows_go_and_young_ones_stay(database_url: str, tmp_path: Path) -> None:
    """Of a row that ended long ago and one that ends in an hour, each table keeps the second, however many there are."""
    with installation(database_url, tmp_path) as made:
        host = made.host()
        app_id = host.apps.find("hubspot").id
        for _ in range(3):
            fill(host, app_id, days_ago=400)
        fill(host, app_id, days_ago=-1 / 24)
        tidying = Tidying(host.database, host.clock)
        assert tidying.run() == 3 * len(TABLES)
        assert set(counts(host).values()) == {1}
        assert tidying.run() == 0


def test_what_is_still_open_stays_however_old(database_url: str, tmp_path: Path) -> None:
    """An attempt a connection still names, an open finding and an undelivered notice are never removed by age."""
    with installation(database_url, tmp_path) as made:
        host = made.host()
        connection = connect(host, made, "hubspot", name="acme")
        long_ago = host.clock.now() - timedelta(days=400)
        attempt = {
            "id": new_id(),
            "connection_id": connection.id,
            "app_id": connection.app_id,
            "generation": 1,
        }
        forgotten = attempt | {"id": new_id(), "connection_id": new_id()}
        begun = {"host": "h", "process_id": "p", "journal": "j", "started_at": long_ago}
        with host.database.write() as transaction:
            transaction.execute(sa.insert(attempts), [attempt | begun, forgotten | begun])
            transaction.execute(
                sa.update(connections)
                .where(connections.c.id == connection.id)
                .values(open_attempt=attempt["id"])
            )
            transaction.execute(
                sa.insert(findings).values(
                    id=new_id(), kind="k", opened_at=long_ago, seen_at=long_ago, count=1
                )
            )
            transaction.execute(
                sa.insert(notices).values(
                    id=new_id(), event="e", body={}, created_at=long_ago, next_try_at=long_ago, tries=1
                )
            )
        Tidying(host.database, host.clock).run()
        left = counts(host)
        assert (left["attempts"], left["findings"], left["notices"]) == (1, 1, 1)


def test_the_oldest_worker_prunes_the_trail_and_it_stays_sound(tmp_path: Path) -> None:
    """Rows past the retention go, by one worker alone; what is left verifies."""
    clock = JumpingClock()
    with installation(f"sqlite:///{tmp_path / 'd.db'}", tmp_path, AUDIT_RETENTION_DAYS="1") as made:
        first, second = (made.host("worker", clock=clock) for _ in range(2))
        for number in range(5):
            first.trail.record(Entry("worker", "broker:connection:enabled", f"c{number}"))
        clock.jump(2 * 86_400)
        for host in (first, second):
            host.presence.beat()
        first.trail.record(Entry("worker", "broker:connection:enabled", "young"))
        assert prune_trail(second) == 0
        assert prune_trail(first) == 5
        verdict = first.trail.verify()
        assert (verdict.sound, verdict.rows) == (True, 1)
