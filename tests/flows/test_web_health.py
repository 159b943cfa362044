"""Liveness, readiness, health, metrics, and what every answer carries."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from app.access.audit import Entry
from app.db.epoch import bump
from app.db.schema import keks
from app.errors import AuditUnavailable, DatabaseUnavailable
from app.settings import load
from app.web.asking import client_address
from emulator import Emulator
from tests.contract.audit_outage import bring_back, take_away
from tests.web_stage import Stage, environment, staged


def _take_away(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the database be gone for the rest of the test."""

    def gone(*_: object, **__: object) -> None:
        raise DatabaseUnavailable

    monkeypatch.setattr(stage.services.database, "read", gone)
    monkeypatch.setattr(stage.services.database, "write", gone)


def test_live_and_ready_say_nothing_but_yes(either_stage: Stage) -> None:
    """200 without a body, for anybody."""
    for path in ("/livez", "/readyz"):
        answer = either_stage.ask(path, caller=None)
        assert (answer.status, answer.text) == (200, "")


def test_ready_outlives_the_database_for_the_grace(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 while living tokens are handed out, 503 with Retry-After afterwards; the process lives on."""
    name = stage.connect(account="101").name
    token = f"/v1/connections/{name}/token"
    assert stage.ask(token).status == 200
    assert stage.ask("/readyz").status == 200
    _take_away(stage, monkeypatch)
    stage.clock.jump(30)
    assert stage.ask("/readyz").status == 200
    assert stage.ask(token).status == 200
    stage.clock.jump(31)
    gone = stage.ask("/readyz", caller=None)
    assert (gone.status, gone.text) == (503, "")
    assert int(gone.raw.headers["Retry-After"]) >= 1
    refused = stage.ask(token)
    assert (refused.status, refused.code) == (503, "overloaded")
    assert stage.ask("/livez").status == 200


def test_ready_needs_the_keys_that_open_the_data(stage: Stage) -> None:
    """A KEK the keyring lacks makes it 503 once keys have changed."""
    assert stage.ask("/readyz").status == 200
    with stage.services.database.write() as transaction:
        bump(transaction, "access")
        transaction.execute(
            sa.insert(keks).values(id="foreign", canary=b"nonsense", created_at=datetime.now(UTC))
        )
    stage.clock.jump(1)
    assert stage.ask("/readyz").status == 503
    report = stage.ask("/health")
    assert (report.status, report.raw.mimetype) == (503, "application/health+json")
    assert report.json["status"] == "fail"


def test_health_is_for_admins_and_readers(stage: Stage) -> None:
    """Others get 401 or 403; nothing in it names an account or a connection."""
    stage.connect(account="101", name="acme")
    stage.add_caller("issuer", "token:issue@*")
    assert stage.ask("/health", caller=None).code == "unauthenticated"
    assert stage.ask("/health", caller="issuer").code == "forbidden"
    answer = stage.ask("/health")
    assert answer.raw.mimetype == "application/health+json"
    assert stage.signed_in().get("/health").status_code == 200
    checks = answer.json["checks"]
    assert set(checks) == {
        "database",
        "processes",
        "worker",
        "connections",
        "findings",
        "refreshing",
        "audit",
    }
    assert checks["connections"] == [
        {
            "componentType": "hubspot",
            "componentId": "healthy",
            "observedValue": 1,
            "observedUnit": "connections",
            "status": "pass",
        }
    ]
    assert "acme" not in answer.text
    assert '"101"' not in answer.text


def test_health_warns_of_a_wrong_clock(stage: Stage) -> None:
    """More than five seconds beside the database's."""
    stage.services.clock._offset = 7.0
    stage.services.presence.beat()
    report = stage.ask("/health").json
    assert report["checks"]["processes"][0]["status"] == "warn"
    assert report["status"] == "warn"


def test_health_warns_during_the_grace_and_is_503_after_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A known caller still learns that the database is away; once the grace is over nobody can be known."""
    stage.clock.jump(1)  # what was set up a moment ago is known before the database goes
    assert stage.ask("/health").status == 200
    _take_away(stage, monkeypatch)
    stage.clock.jump(10)
    report = stage.ask("/health")
    assert (report.status, report.json["status"]) == (200, "warn")
    stage.clock.jump(60)
    gone = stage.ask("/health")
    assert (gone.status, gone.code) == (503, "overloaded")


def test_health_says_whether_the_trail_still_takes_rows(stage: Stage) -> None:
    """Entries that go to the reserve are a warning; when nothing can be recorded, nothing is handed out: a failure."""
    trail, database = stage.services.trail, stage.services.audit_database
    entry = Entry("admin:cli", "broker:token:issued")
    trail.record(entry)
    assert stage.ask("/health").json["checks"]["audit"] == [{"status": "pass"}]
    take_away(database)
    try:
        trail.record(entry)
        (audit,) = stage.ask("/health").json["checks"]["audit"]
        assert (audit["status"], "go to the reserve" in audit["output"]) == ("warn", True)
        stage.clock.jump(61)
        with pytest.raises(AuditUnavailable):
            trail.record(entry)
        (audit,) = stage.ask("/health").json["checks"]["audit"]
        assert (audit["status"], "nothing is handed out" in audit["output"]) == ("fail", True)
    finally:
        bring_back(database)


def test_metrics_are_there_only_for_their_token(vendors: Emulator, tmp_path: Path) -> None:
    """404 where no token is set; 401 with another; the text format with the right one."""
    folder = tmp_path
    with staged(vendors, f"sqlite:///{folder}/a.db", folder / "a") as closed:
        assert closed.ask("/metrics").status == 404
    token = "a-long-enough-metrics-token"
    url = f"sqlite:///{folder}/b.db"
    with staged(vendors, url, folder / "b", METRICS_TOKEN=token) as stage:
        assert stage.ask("/metrics").status == 401
        answer = stage.ask("/metrics", headers={"Authorization": f"Bearer {token}"})
        assert answer.status == 200
        assert "drawbridge_" in answer.text


def test_every_answer_carries_an_id_and_the_headers(stage: Stage) -> None:
    """Also errors, files and answers before any route; the id is never the client's."""
    ids = set()
    for path in ("/livez", "/nothing", "/v1/connections", "/static/drawbridge.css", "/docs", "/oauth/jwks"):
        answer = stage.ask(path, caller=None, headers={"X-Request-ID": "mine"})
        headers = answer.raw.headers
        ids.add(headers["X-Request-ID"])
        names = ["X-Content-Type-Options", "Content-Security-Policy"]
        if not path.startswith("/v1/"):  # what only holds browsers to something stands where browsers go
            names += ["Referrer-Policy", "X-Frame-Options", "Strict-Transport-Security"]
        for name in names:
            assert len(headers.getlist(name)) == 1, (path, name)
    assert len(ids) == 6
    assert "mine" not in ids


def test_too_large_a_body_is_413_everywhere(stage: Stage) -> None:
    """Each in the shape of its path."""
    body = b"a=" + b"x" * 70_000
    form = "application/x-www-form-urlencoded"
    assert (
        stage.ask("/oauth/token", method="POST", data=body, content_type=form).json["error"]
        == "invalid_request"
    )
    for path in ("/oauth/token", "/admin/login", "/connect/hubspot"):
        assert stage.ask(path, method="POST", data=body, content_type=form).status == 413


def test_a_second_spelling_of_a_path_is_no_path(stage: Stage) -> None:
    """Neither doubled nor trailing slashes, nor other letters, lead anywhere."""
    for path in (
        "//v1/connections",
        "/v1//connections",
        "/v1/connections/",
        "/V1/connections",
        "/livez/",
        "/ADMIN",
    ):
        assert stage.ask(path).status == 404, path


@pytest.mark.parametrize(
    ("trusted", "peer", "forwarded", "seen"),
    [
        ("", "192.0.2.1", "203.0.113.9", "192.0.2.1"),
        ("10.0.0.0/8", "192.0.2.1", "203.0.113.9", "192.0.2.1"),
        ("10.0.0.0/8", "10.0.0.1", "203.0.113.9", "203.0.113.9"),
        ("10.0.0.0/8", "10.0.0.1", "6.6.6.6, 203.0.113.9", "203.0.113.9"),
        ("10.0.0.0/8", "10.0.0.1", "6.6.6.6, 203.0.113.9, 10.1.1.1", "203.0.113.9"),
        ("10.0.0.0/8", "::ffff:10.0.0.1", "203.0.113.9:4711", "203.0.113.9"),
        ("10.0.0.0/8", "10.0.0.1", "[2001:db8::1]:443", "2001:db8::1"),
        ("10.0.0.0/8", "10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.0/8", "10.0.0.1", "10.2.2.2", "10.2.2.2"),
        ("10.0.0.0/8", "10.0.0.1", "rubbish", "rubbish"),
    ],
)
def test_the_client_is_the_right_most_that_is_no_trusted_proxy(
    vendors: Emulator, tmp_path: Path, trusted: str, peer: str, forwarded: str, seen: str
) -> None:
    """What stands further left was written by the client; without trusted proxies nothing is believed."""
    given = environment(vendors, "sqlite:////tmp/none.db", tmp_path, TRUSTED_PROXIES=trusted)
    settings = load(given, config_file=None)
    environ = {"REMOTE_ADDR": peer, "HTTP_X_FORWARDED_FOR": forwarded}
    assert client_address(environ, settings) == seen
