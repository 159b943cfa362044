"""What a serving installation tells an operator: requests, hand-outs and refreshes in numbers, trouble in lines."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from flask import Response

from app.bootstrap import bootstrap, prepare_database
from app.broker.connection import Health
from app.broker.refresh import EndingKind
from app.broker.upkeep import Chore
from app.db.schema import keks
from app.errors import DatabaseMismatch, DatabaseUnavailable, KeyringFault
from app.settings import load
from app.telemetry import Event
from app.web.application import create_app
from app.web.tokens import EXPRESS, PATH
from emulator import Emulator
from tests.broker_world import LEASE, World, paused
from tests.telling import Heard, counted, listening
from tests.waiting import PATIENCE, until
from tests.web_stage import Stage, environment


@pytest.fixture
def heard() -> Iterator[Heard]:
    """Give the log of the test."""
    with listening() as heard:
        yield heard


# Requests


def test_requests_are_counted_by_route_and_status(stage: Stage) -> None:
    """Each once, under the template of its path: names of customers must not become labels."""
    name = stage.connect(account="101", name="acme-secret-name").name
    before = counted("requests_total", route="/v1/connections/<name:name>", status="200")
    stage.ask(f"/v1/connections/{name}")
    stage.ask(f"/v1/connections/{name}")
    stage.ask("/v1/connections/nobody")
    stage.ask("/no/such/path")
    assert counted("requests_total", route="/v1/connections/<name:name>", status="200") == before + 2
    assert counted("requests_total", route="/v1/connections/<name:name>", status="404") == 1
    assert counted("requests_total", route="none", status="404") == 1
    assert counted("request_seconds_count", route="none") == 1
    shown = stage.ask("/metrics", caller=None, headers={"Authorization": "Bearer none"})
    assert shown.status == 404
    assert counted("requests_total", route="/metrics", status="404") == 1


def test_hand_outs_are_counted_as_requests_too(stage: Stage) -> None:
    """Those answered in front of Flask in a moment, refusals and posts at once; none twice."""
    name = stage.connect(account="101").name
    token = f"/v1/connections/{name}/token"
    for _ in range(3):
        assert stage.ask(token).status == 200
    assert stage.ask(token, method="POST", json={}).status == 200
    assert stage.ask(token, caller=None).status == 401
    until(lambda: counted("requests_total", route=PATH, status="200") == 4)
    assert counted("requests_total", route=PATH, status="401") == 1
    until(lambda: counted("hand_out_seconds_count", way="kept") == 4)
    assert counted("hand_outs_total", provider="hubspot", way="kept") == 4
    until(lambda: counted("audit_entries_total", way="database") >= 4)
    assert counted("request_seconds_count", route=PATH) == 0, "how long a hand-out takes is told elsewhere"


def test_what_the_express_lane_answers_is_counted(stage: Stage) -> None:
    """Each answer once, as a request and as a hand-out; what it leaves to the usual way is not its own."""
    name = stage.connect(account="101").name
    token = f"/v1/connections/{name}/token"
    assert stage.ask(token).status == 200
    express = stage.app.extensions[EXPRESS]
    environ = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": token,
        "QUERY_STRING": "",
        "REMOTE_ADDR": "192.0.2.1",
        "HTTP_AUTHORIZATION": stage.basic("caller"),
    }
    until(lambda: express.begin(environ) is not None)  # as soon as this process has looked at the database
    together = [(dict(environ), ready) for ready in (express.begin(environ) for _ in range(5)) if ready]
    handed = [answer for answer in express.finish(together) if answer]
    assert handed, "what is ready is handed out"
    assert express.begin(environ | {"PATH_INFO": "/v1/connections/nobody/token"}) is None
    until(lambda: counted("requests_total", route=PATH, status="200") == 1 + len(handed))
    until(lambda: counted("hand_out_seconds_count", way="kept") == 1 + len(handed))
    assert counted("hand_outs_total", provider="hubspot", way="kept") == 1 + len(handed)


def test_refused_requests_for_tokens_are_counted_by_code(stage: Stage) -> None:
    """By both ways of asking; other refusals are none of it."""
    name = stage.connect(account="101").name
    stage.add_caller("stranger", "token:issue@other-*")
    token = f"/v1/connections/{name}/token"
    stage.ask(token, caller=None)
    stage.ask(token, caller="stranger")
    stage.ask(token, caller="stranger", method="POST", json={})
    stage.ask("/v1/connections/nobody/token")
    stage.ask(f"{token}?min_ttl=nonsense")
    stage.ask("/v1/connections", caller=None)
    assert counted("denials_total", code="unauthenticated") == 1
    assert counted("denials_total", code="forbidden") == 2
    assert counted("denials_total", code="not_found") == 1
    assert counted("denials_total", code="invalid_request") == 1


def test_credentials_are_counted_when_they_are_checked(stage: Stage) -> None:
    """A known one once for as long as it is remembered, a refused one each time."""
    stage.add_caller("somebody", "connection:read@*")

    def is_remembered() -> bool:
        before = counted("authentications_total", way="basic", outcome="accepted")
        assert stage.ask("/v1/connections", caller="somebody").status == 200
        return counted("authentications_total", way="basic", outcome="accepted") == before

    assert not is_remembered()
    until(is_remembered)  # what is known of callers is looked up again once, as soon as the new one is seen
    for _ in range(2):
        stage.ask("/v1/connections", headers={"Authorization": "Basic bm9ib2R5OndhbnRlZA=="})
    assert counted("authentications_total", way="basic", outcome="refused") == 2
    form = {"grant_type": "client_credentials"}
    assert stage.ask("/oauth/token", method="POST", data=form, caller="somebody").status == 200
    assert counted("authentications_total", way="client_secret_basic", outcome="accepted") == 1


def test_a_slow_request_is_told_by_its_route(stage: Stage, heard: Heard) -> None:
    """Which route and how long, never the path; quick ones are not told."""
    app = create_app(stage.services)

    def dawdle(name: str) -> Response:
        stage.clock.jump(8 if name == "slow-customer" else 1)
        return Response(b"")

    app.add_url_rule("/dawdle/<name>", "dawdle", dawdle)
    app.test_client().get("/dawdle/quick-customer")
    app.test_client().get("/dawdle/slow-customer?secret=of-mine")
    (told,) = heard.of(Event.REQUEST_SLOW)
    assert (told["method"], told["route"]) == ("GET", "/dawdle/<name>")
    assert told["seconds"] >= 8
    assert "customer" not in heard.text
    assert counted("request_seconds_count", route="/dawdle/<name>") == 2


# Refreshes


def test_a_breaker_is_told_once_when_it_opens_and_once_when_it_closes(made: World, heard: Heard) -> None:
    """However many connections fail and however often it is tried in between."""
    connections = made.imported("hubspot", 6)
    before = counted("breakers_opened_total", provider="hubspot")
    made.hubspot.misbehave("status", status=503)
    for connection in connections[:4]:
        made.refresh(connection)
    assert heard.of(Event.BREAKER_OPENED) == []
    made.refresh(connections[4])
    for _ in range(3):
        made.jump(70)
        made.refresh(connections[5])
    (opened,) = heard.of(Event.BREAKER_OPENED)
    assert opened == {
        "app": "hubspot/default",
        "provider": "hubspot",
        "reason": "down",
        "failures": 5,
        "seconds": 1.0,
    }
    assert counted("breakers_opened_total", provider="hubspot") == before + 1
    assert heard.of(Event.BREAKER_CLOSED) == []
    made.hubspot.behave()
    made.jump(70)
    for connection in connections[:2]:
        assert made.refresh(connection).kind is EndingKind.REFRESHED
    assert heard.of(Event.BREAKER_CLOSED) == [{"app": "hubspot/default", "provider": "hubspot"}]
    assert made.one.apps.find("hubspot").open_reason is None


def test_a_few_failures_are_no_breaker_that_closes(made: World, heard: Heard) -> None:
    """A grant after two failures closes nothing."""
    first, second, third = made.imported("hubspot", 3)
    made.hubspot.misbehave("status", status=503, count=2)
    made.refresh(first)
    made.refresh(second)
    assert made.refresh(third).kind is EndingKind.REFRESHED
    assert heard.of(Event.BREAKER_OPENED) == heard.of(Event.BREAKER_CLOSED) == []


def test_a_connection_that_is_lost_is_counted(made: World, heard: Heard) -> None:
    """When it is given up, not at each refusal."""
    connection = made.expired("hubspot")
    before = counted("reconnects_needed_total", provider="hubspot")
    made.revoke_upstream(connection)
    made.refresh(connection)
    assert counted("reconnects_needed_total", provider="hubspot") == before
    made.jump(LEASE + 1)
    made.refresh(connection)
    assert made.now(connection).health is Health.NEEDS_RECONNECT
    assert counted("reconnects_needed_total", provider="hubspot") == before + 1
    assert len(heard.of(Event.CONNECTION_LOST)) == 1


def test_a_holder_that_stores_after_its_lease_is_told(made: World, heard: Heard) -> None:
    """By how many seconds; one in time is not."""
    connection = made.connected("salesforce")
    made.refresh(connection)
    assert heard.of(Event.LEASE_OVERRUN) == []
    with paused(made.one.refresher, "_conclude") as pause:
        future = made.one.refresher.ask(made.now(connection))
        pause.wait()
        made.jump(LEASE + 20)
        pause.let_go()
        assert future.result(PATIENCE).kind is EndingKind.REFRESHED
    (told,) = heard.of(Event.LEASE_OVERRUN)
    assert told["connection"] == connection.name
    assert 19 < told["seconds"] < 40


def test_waiters_and_running_refreshes_are_levels(made: World) -> None:
    """They go up while somebody waits and a refresh runs, and down again whatever the end."""
    connection = made.expired("hubspot")
    caller = made.caller()
    before = counted("hand_out_seconds_count", way="waited")
    made.hubspot.misbehave("status", status=503, count=1)
    for failing in (True, False):
        with ThreadPoolExecutor(1) as pool, paused(made.one.refresher, "_present") as pause:
            asked = pool.submit(made.one.issuer.issue, caller, connection.name, max_wait=30.0)
            pause.wait()
            assert counted("waiters") == 1
            assert counted("refreshes_running") == 1
            pause.let_go()
            assert (asked.exception(PATIENCE) is not None) is failing
        until(lambda: counted("refreshes_running") == 0)
        assert counted("waiters") == 0
        made.jump(LEASE + 70)
    until(lambda: counted("hand_out_seconds_count", way="waited") == before + 1)


def test_a_token_of_unknown_life_is_told(made: World, heard: Heard) -> None:
    """Salesforce names no life and, where introspection fails, nobody does."""
    connection = made.expired("salesforce")
    made.salesforce.misbehave("status", status=500, endpoint="introspect")
    assert made.refresh(connection).kind is EndingKind.REFRESHED
    until(lambda: heard.of(Event.LIFE_UNKNOWN) == [{"connection": connection.name}])


# Chores


def test_chores_are_counted_by_their_end(stage: Stage) -> None:
    """One that is added while the others run joins them; one that fails is counted as that and tried again."""
    tries: list[int] = []

    def now_and_then() -> None:
        tries.append(1)
        if len(tries) == 1:
            raise DatabaseUnavailable
        if len(tries) == 2:
            raise ZeroDivisionError

    stage.services.upkeep.add(Chore("now and then", 0.1, now_and_then))
    until(lambda: counted("jobs_total", job="now and then", outcome="done") >= 1)
    assert counted("jobs_total", job="now and then", outcome="failed") == 2
    assert counted("jobs_total", job="hand-outs", outcome="done") >= 1
    assert counted("jobs_total", job="requests", outcome="done") >= 1


# Starting


def test_a_start_that_is_refused_is_told(vendors: Emulator, tmp_path: Path, heard: Heard) -> None:
    """What kind of process, which fault and its sentence: no database yet, then keys that are not its own."""
    given = environment(vendors, f"sqlite:///{tmp_path / 'drawbridge.db'}", tmp_path / "state")
    settings = load(given, config_file=None)
    with pytest.raises(DatabaseMismatch):
        bootstrap(settings, kind="worker")
    prepare_database(settings)
    services = bootstrap(settings, kind="web")
    assert heard.of(Event.KEYRING_LOADED) == [{"source": "file", "ids": ["k1"]}]
    with services.database.write() as transaction:
        transaction.execute(
            sa.insert(keks).values(id="foreign", canary=b"nonsense", created_at=datetime.now(UTC))
        )
    services.close()
    with pytest.raises(KeyringFault):
        bootstrap(replace(settings), kind="web")
    told = heard.of(Event.START_REFUSED)
    assert [(line["kind"], line["code"]) for line in told] == [
        ("worker", "database_mismatch"),
        ("web", "keyring"),
    ]
    assert "drawbridge migrate" in told[0]["reason"]
    assert len(heard.of(Event.CANARY_FAILED)) == 1
