"""The doctor over the API, on the health report and on the admin page."""

from __future__ import annotations

from typing import Any

import pytest

from app.broker.connection import Connection
from tests.web_stage import HUBSPOT_APP, SECRET, Stage

ALL = "/v1/connections"


@pytest.fixture
def misconfigured(either_stage: Stage) -> Connection:
    """A portal whose app's secret was rotated at HubSpot, its token dead."""
    connection = either_stage.connect(account="101", name="acme")
    hubspot = either_stage.emulator.control.hubspot
    hubspot.set_secrets(HUBSPOT_APP, ["another"])
    either_stage.clock.jump((connection.life_seconds or 0) + 1)
    either_stage.services.refresher.ask(connection).result(30)
    hubspot.set_secrets(HUBSPOT_APP, [SECRET])
    return connection


def report_of(stage: Stage, name: str, **more: Any) -> dict[str, Any]:
    """The doctor's report."""
    answer = stage.ask(f"{ALL}/{name}/doctor", **more)
    assert answer.status == 200, answer.text
    found: dict[str, Any] = answer.json
    return found


def test_a_healthy_connection_is_reported_healthy(either_stage: Stage) -> None:
    """With evidence, and without anybody who has to act."""
    either_stage.connect(account="101", name="acme")
    report = report_of(either_stage, "acme")
    assert (report["name"], report["state"], report["healthy"]) == ("acme", "healthy", True)
    assert (report["fault"], report["cause"], report["others"]) == ("none", "healthy", [])
    assert report["evidence"]


def test_the_apps_fault_is_told_with_who_and_how(either_stage: Stage, misconfigured: Connection) -> None:
    """The secret was rotated: an operator acts in the app's settings, and no connection is lost."""
    report = report_of(either_stage, misconfigured.name)
    assert (report["healthy"], report["fault"], report["cause"]) == (False, "app", "client_secret_refused")
    assert report["code"] == "misconfigured:client_secret_refused"
    assert "app's Auth tab" in report["who"]
    assert "drawbridge app rotate" in report["how"]


def test_the_report_needs_the_permission_to_read_the_connection(either_stage: Stage) -> None:
    """As the connection itself does: known callers get the same 403 whether it exists or not."""
    either_stage.connect(account="101", name="acme")
    either_stage.add_caller("reader", "connection:read@acme")
    either_stage.add_caller("issuer", "token:issue@*")
    assert report_of(either_stage, "acme", caller="reader")["healthy"]
    for name in ("acme", "nobody"):
        refused = either_stage.ask(f"{ALL}/{name}/doctor", caller="issuer")
        assert (refused.status, refused.code) == (403, "forbidden")
    assert either_stage.ask(f"{ALL}/acme/doctor", caller=None).status == 401
    assert either_stage.ask(f"{ALL}/nobody/doctor").status == 404
    assert either_stage.ask(f"{ALL}/acme/doctor?deep=1").status == 400


def test_health_and_console_say_the_same_sentence(either_stage: Stage, misconfigured: Connection) -> None:
    """Wherever a finding stands the doctor's words stand with it; /health names no connection."""
    sentence = report_of(either_stage, misconfigured.name)["sentence"]
    (finding,) = either_stage.ask("/health").json["checks"]["findings"]
    assert finding["componentType"] == "app_misconfigured"
    assert finding["output"].startswith(sentence)
    assert misconfigured.name not in finding["output"]
    page = either_stage.signed_in().get("/admin").get_data(as_text=True)
    assert "HubSpot refuses every client secret we have" in page
    assert "drawbridge app rotate" in page


def test_a_connection_tells_the_facts_of_its_grant(either_stage: Stage) -> None:
    """Salesforce's idle days, rotation, life and approvals; HubSpot's rotation and life."""
    either_stage.connect(account="101", name="acme")
    either_stage.connect("salesforce", name="org")
    org = either_stage.ask(f"{ALL}/org").json
    assert (org["rotation"], org["life_measured"], org["idle_days_left"]) == ("unknown", True, 30.0)
    assert org["life_seconds"] > 0
    assert (org["approvals_known"], org["approvals_limit"], org["approvals_warning"]) == (1, 5, None)
    acme = either_stage.ask(f"{ALL}/acme").json
    assert (acme["rotation"], acme["life_measured"], acme["life_seconds"]) == ("not_seen", True, 1800.0)
    assert (acme["idle_days_left"], acme["approvals_known"], acme["approvals_limit"]) == (None, None, None)
    listed = {row["name"]: row for row in either_stage.ask(ALL).json["connections"]}
    assert (listed["org"], listed["acme"]) == (org, acme)
