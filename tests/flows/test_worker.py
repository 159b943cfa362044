"""The worker over real databases and emulated providers: in time, in measure, together, and ending well."""

import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import sqlalchemy as sa

from app.broker.connection import Health
from app.db.schema import apps, attempts
from app.errors import DatabaseUnavailable
from app.jobs.worker import RATE_OPTION
from app.secret import Secret
from tests.flows.worker_stage import bring_in, connections_of, working
from tests.installation import HUBSPOT, connect, installation
from tests.waiting import until

ROOT = Path(__file__).parents[2]


def test_tokens_are_renewed_before_the_ones_before_them_expire(database_url: str, tmp_path: Path) -> None:
    """Every account has a living access token at every moment, over several of their lives."""
    with installation(database_url, tmp_path) as made:
        made.emulator.control.hubspot.settings(token_lifetime=10)
        host = made.host()
        bring_in(host, made, "hubspot", count=20)
        with working(made) as running:
            until(lambda: all(one.generation >= 3 for one in connections_of(running.services)))
        grants = made.emulator.control.grants(vendor="hubspot", app=HUBSPOT)
    assert len(grants) == 20
    for grant in grants:
        # The first came with the import, before there was a worker to keep it.
        lives = sorted((token.issued_at, token.expires_at) for token in grant.access)[1:]
        gaps = [later[0] - earlier[1] for earlier, later in pairwise(lives)]
        assert max(gaps) < 0, f"a gap of {max(gaps)} s without a living token"


def test_workers_share_the_work_and_never_refresh_twice(database_url: str, tmp_path: Path) -> None:
    """Two workers over rotating grants present no refresh token twice, and either goes on when the other ends."""
    app = {"token_lifetime": 5, "reuse_revokes": True}
    with installation(database_url, tmp_path, salesforce_app=app) as made:
        host = made.host()
        bring_in(host, made, "salesforce", count=24)
        control = made.emulator.control
        with working(made, host="worker1") as first, working(made, host="worker2") as second:
            until(lambda: all(one.generation >= 3 for one in connections_of(second.services)))
            first.stop()
            reached = {one.id: one.generation for one in connections_of(second.services)}
            until(lambda: all(one.generation > reached[one.id] for one in connections_of(second.services)))
            assert {one.health for one in connections_of(second.services)} == {Health.HEALTHY}
        totals = control.salesforce.totals()
        assert totals.reuses == 0
        assert all(grant.live for grant in control.grants(vendor="salesforce"))


def test_an_app_is_held_to_its_own_rate(database_url: str, tmp_path: Path) -> None:
    """With four refreshes a second allowed, no second sees more than those four and the one a full bucket gives."""
    with installation(database_url, tmp_path) as made:
        host = made.host()
        default = host.apps.find("hubspot")
        slow = host.apps.add(
            "hubspot",
            "slow",
            client_id=HUBSPOT,
            secrets=[Secret("hubspot-secret")],
            scopes=default.scopes,
            options=default.options,
        )
        with host.database.write() as transaction:
            options = dict(slow.options) | {RATE_OPTION: 4}
            transaction.execute(sa.update(apps).where(apps.c.id == slow.id).values(options=options))
        bring_in(host, made, "hubspot", count=12, app="slow")
        with working(made) as running:
            until(lambda: all(one.generation >= 2 for one in connections_of(running.services)))
        sent = sorted(seen.at for seen in made.emulator.control.hubspot.requests())
    assert len(sent) == 12
    assert max(sum(begin <= at < begin + 1 for at in sent) for begin in sent) <= 5


def test_a_failing_provider_is_left_alone_and_others_are_not_held_up(
    database_url: str, tmp_path: Path
) -> None:
    """While HubSpot answers 503 it gets a handful of requests, Salesforce goes on, and all recover by themselves."""
    with installation(database_url, tmp_path) as made:
        control = made.emulator.control
        host = made.host()
        bring_in(host, made, "hubspot", count=60)
        bring_in(host, made, "salesforce", count=5)
        control.hubspot.misbehave("status", status=503)
        with working(made) as running:

            def health(provider: str) -> list[tuple[int, str | None]]:
                rows = connections_of(running.services)
                return [(row.generation, row.last_error) for row in rows if row.provider == provider]

            until(lambda: all(generation == 2 for generation, _ in health("salesforce")))
            default = running.services.apps.find("hubspot")
            until(lambda: running.services.apps.breaker(default.id) is not None)
            asked = len(control.hubspot.requests())
            assert asked < 30  # five to open the breaker, and those that were already under way
            assert all(one.health is not Health.NEEDS_RECONNECT for one in connections_of(running.services))
            control.hubspot.behave()
            until(lambda: all(generation == 2 for generation, _ in health("hubspot")))
            assert running.services.apps.breaker(default.id) is None


def test_sigterm_lets_a_running_refresh_finish(database_url: str, tmp_path: Path) -> None:
    """A worker process that is told to stop twice in the middle of a refresh stores its answer and exits with 0."""
    with installation(database_url, tmp_path) as made:
        control = made.emulator.control
        host = made.host()
        before = connect(host, made, "salesforce", name="slow")
        control.salesforce.misbehave("latency", delay=4, grant_type="refresh_token")
        host.revoker.disable("slow")
        host.revoker.enable("slow")  # which makes it due
        environment = os.environ | made.environment(host="process") | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "app", "worker"]
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            until(lambda: control.salesforce.totals().open > 0)
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=60)
        assert process.returncode == 0, log
        after, tokens = host.store.tokens_of(before.id) or (None, None)
        assert after is not None
        assert tokens is not None
        assert after.generation == before.generation + 1
        assert after.open_attempt is None
        [grant] = control.grants(vendor="salesforce")
        assert tokens.refresh_token is not None
        assert grant.refresh_sha256 == tokens.refresh_token.sha256()
        assert "program:process:stopped" in log


def test_what_was_disconnected_is_given_back(database_url: str, tmp_path: Path) -> None:
    """The worker revokes a disconnected grant at the provider and the row goes with its keys."""
    with installation(database_url, tmp_path) as made:
        host = made.host()
        connect(host, made, "hubspot", name="leaving")
        host.revoker.disconnect("leaving")
        with working(made) as running:
            until(lambda: running.services.store.by_name("leaving") is None)
        [grant] = made.emulator.control.grants(vendor="hubspot")
        assert not grant.live


def test_a_database_that_goes_away_stops_nothing_for_good(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the database refuses, the worker waits; when it is back, refreshing goes on by itself."""
    with installation(database_url, tmp_path) as made:
        host = made.host()
        with working(made) as running:
            claims: list[int] = []

            def refuse(**_: object) -> list[object]:
                claims.append(1)
                raise DatabaseUnavailable("gone for a moment")

            with monkeypatch.context() as away:
                away.setattr(running.services.store, "claim_due", refuse)
                bring_in(host, made, "hubspot", count=3)
                until(lambda: len(claims) >= 3)
                assert all(one.generation == 1 for one in connections_of(host))
            until(lambda: all(one.generation == 2 for one in connections_of(host)))


def test_nothing_is_refreshed_from_a_copied_database(database_url: str, tmp_path: Path) -> None:
    """A worker whose PUBLIC_URL is not the database's refreshes nothing until somebody adopts it."""
    with installation(database_url, tmp_path) as made:
        host = made.host()
        bring_in(host, made, "hubspot", count=3)
        elsewhere = {"PUBLIC_URL": "http://localhost:9999"}
        with working(made, host="copy", **elsewhere) as running:
            until(lambda: running.worker.held is not None)
            assert made.emulator.control.hubspot.requests() == []
            running.services.adoption.adopt()
            until(lambda: all(one.generation == 2 for one in connections_of(running.services)))
        with host.database.read() as transaction:
            assert transaction.scalar(sa.select(sa.func.count()).select_from(attempts)) == 3
