"""Each misbehaviour that can be asked of the emulated vendors, seen from the wire."""

import json
import socket
import threading
import time
from collections.abc import Callable
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from requests.exceptions import ChunkedEncodingError

from emulator import ControlError
from tests.contract.emulated import TIMEOUT, Force, Hub

MAINTENANCE = {"status": 503, "retry_after": 7, "body": {"status": "error", "message": "later"}}


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_status_is_answered_with_a_complete_body(hub: Hub, status: int) -> None:
    """The request is not processed, and the next one finds the vendor well."""
    minted = hub.control.grant(hub.client_id)
    hub.control.misbehave("status", status=status, count=1)
    answer = hub.refresh(minted.refresh_token)
    assert (answer.status_code, "Retry-After" in answer.headers) == (status, False)
    assert answer.json()["status"] == "error"
    assert hub.refresh(minted.refresh_token).status_code == 200
    assert [(seen.processed, seen.outcome) for seen in hub.control.requests()] == [
        (False, "fault:status"),
        (True, "granted"),
    ]


def test_a_status_may_say_when_to_come_back(hub: Hub) -> None:
    """Retry-After, body and headers are free to choose."""
    hub.control.misbehave("status", **MAINTENANCE, headers={"X-Seen": "yes"})
    answer = hub.refresh("any")
    assert (answer.headers["Retry-After"], answer.headers["X-Seen"]) == ("7", "yes")
    assert answer.json()["message"] == "later"


@pytest.mark.parametrize("status", [200, 502])
def test_html_instead_of_json(hub: Hub, status: int) -> None:
    """A maintenance page may even come with 200."""
    hub.control.misbehave("html", status=status)
    answer = hub.refresh("any")
    assert (answer.status_code, answer.headers["Content-Type"][:9]) == (status, "text/html")
    assert "<html>" in answer.text


def test_less_body_than_promised(force: Force) -> None:
    """Content-Length promises more than is sent, after the rotation has happened."""
    force.control.change_app(force.client_id, rotation=True)
    minted = force.control.grant(force.client_id)
    force.control.misbehave("truncated", count=1)
    with pytest.raises((ChunkedEncodingError, requests.ConnectionError)):
        force.refresh(minted.refresh_token)
    assert force.whole.grant(minted.grant_id).rotations == 1


def test_json_cut_in_half(force: Force) -> None:
    """A complete answer whose JSON is broken."""
    minted = force.control.grant(force.client_id)
    force.control.misbehave("truncated", mode="json", count=1)
    answer = force.refresh(minted.refresh_token)
    assert answer.status_code == 200
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer.text)


def test_a_success_without_an_access_token(force: Force) -> None:
    """200 and good JSON, but the token is not in it."""
    minted = force.control.grant(force.client_id)
    force.control.misbehave("no_access_token")
    answer = force.refresh(minted.refresh_token)
    assert (answer.status_code, "access_token" in answer.json(), "id" in answer.json()) == (200, False, True)


def test_fields_changed_and_left_out(hub: Hub) -> None:
    """Wrong types and missing fields: expires_in as text, or not at all; scopes cut down."""
    minted = hub.control.grant(hub.client_id)
    hub.control.misbehave("edit", set={"expires_in": "1800", "scopes": ["oauth"]}, count=1)
    hub.control.misbehave("edit", omit=["expires_in"])
    first, second = (hub.refresh(minted.refresh_token).json() for _ in range(2))
    assert "expires_in" not in first
    assert (first["scopes"], "expires_in" in second) == (["oauth"], False)
    hub.control.behave()
    assert hub.refresh(minted.refresh_token).json()["expires_in"] == 1800


def test_a_dropped_connection_before_anything_happened(force: Force) -> None:
    """The client gets nothing and nothing was done."""
    force.control.change_app(force.client_id, rotation=True)
    minted = force.control.grant(force.client_id)
    force.control.misbehave("drop", count=1)
    with pytest.raises(requests.ConnectionError):
        force.refresh(minted.refresh_token)
    assert force.whole.grant(minted.grant_id).rotations == 0
    assert [(seen.processed, seen.status) for seen in force.control.requests()] == [(False, None)]
    assert force.refresh(minted.refresh_token).status_code == 200


def test_a_dropped_connection_after_the_rotation(force: Force) -> None:
    """The answer is lost though the token is spent: trying again is a reuse that ends the grant."""
    force.control.change_app(force.client_id, rotation=True)
    minted = force.control.grant(force.client_id)
    force.control.misbehave("drop", when="after", count=1)
    with pytest.raises(requests.ConnectionError):
        force.refresh(minted.refresh_token)
    truth = force.whole.grant(minted.grant_id)
    assert (truth.rotations, truth.live) == (1, True)
    assert truth.refresh_sha256 != sha256((minted.refresh_token or "").encode()).hexdigest()
    assert force.refresh(minted.refresh_token).json()["error"] == "invalid_grant"
    assert force.whole.grant(minted.grant_id).revoked == "reuse"


def test_an_error_after_the_rotation(force: Force) -> None:
    """Any answering fault may strike after the work: a 500 whose rotation has happened."""
    force.control.change_app(force.client_id, rotation=True)
    minted = force.control.grant(force.client_id)
    force.control.misbehave("status", status=500, when="after", count=1)
    assert force.refresh(minted.refresh_token).status_code == 500
    assert force.whole.grant(minted.grant_id).rotations == 1


def in_background(work: Callable[[], object]) -> tuple[threading.Thread, list[Any]]:
    seen: list[Any] = []

    def run() -> None:
        try:
            seen.append(work())
        except requests.RequestException as error:
            seen.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, seen


def wait_until(true: Callable[[], object]) -> None:
    for _ in range(2000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("did not come true within 20 s")


def test_a_hang_lasts_until_it_is_released(force: Force) -> None:
    """A hanging request is open until the fault is lifted, then the connection closes unprocessed."""
    minted = force.control.grant(force.client_id)
    fault = force.control.misbehave("hang")
    thread, seen = in_background(lambda: force.refresh(minted.refresh_token))
    wait_until(lambda: force.control.totals().open == 1)
    assert not seen
    force.control.behave(fault)
    thread.join(TIMEOUT)
    assert isinstance(seen[0], requests.ConnectionError)
    assert [each.processed for each in force.control.requests()] == [False]


def test_a_hang_may_end_by_itself_and_follow_the_rotation(force: Force) -> None:
    """With a delay it ends alone; with `after` the rotation has happened when the silence begins."""
    force.control.change_app(force.client_id, rotation=True)
    minted = force.control.grant(force.client_id)
    force.control.misbehave("hang", when="after", delay=0.05)
    with pytest.raises(requests.ConnectionError):
        force.refresh(minted.refresh_token)
    assert force.whole.grant(minted.grant_id).rotations == 1


def test_a_client_may_give_up_on_a_hang(hub: Hub) -> None:
    """A client with a deadline of its own sees a timeout."""
    hub.control.misbehave("hang")
    with pytest.raises(requests.Timeout):
        requests.post(f"{hub.url}/oauth/2026-09/token", data={}, timeout=0.2)


def test_latency_delays_and_then_answers(hub: Hub) -> None:
    """The request is in hand for as long as the latency lasts, and is answered well afterwards."""
    minted = hub.control.grant(hub.client_id)
    hub.control.misbehave("latency", delay=TIMEOUT)
    thread, seen = in_background(lambda: hub.refresh(minted.refresh_token).status_code)
    wait_until(lambda: [each.outcome for each in hub.control.requests()] == ["processing"])
    assert not seen
    hub.control.behave()
    thread.join(TIMEOUT)
    assert seen == [200]


def test_a_slow_drip_is_complete_in_the_end(hub: Hub) -> None:
    """The body comes byte by byte; a client that waits gets all of it."""
    minted = hub.control.grant(hub.client_id)
    hub.control.misbehave("drip", delay=TIMEOUT)
    thread, seen = in_background(lambda: hub.refresh(minted.refresh_token).json())
    wait_until(lambda: [each.outcome for each in hub.control.requests()] == ["granted"])
    assert not seen
    hub.control.behave()
    thread.join(TIMEOUT)
    assert [answer["refresh_token"] for answer in seen] == [minted.refresh_token]


def test_an_oversized_body_is_valid_and_large(hub: Hub) -> None:
    """The answer is good JSON of the size that was asked for."""
    minted = hub.control.grant(hub.client_id)
    hub.control.misbehave("oversized", size=3_000_000)
    answer = hub.refresh(minted.refresh_token)
    assert len(answer.content) > 3_000_000
    assert answer.json()["refresh_token"] == minted.refresh_token


@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_points_at_a_trap(hub: Hub, status: int) -> None:
    """Whoever follows is counted at /elsewhere."""
    hub.control.misbehave("redirect", status=status)
    answer = hub.refresh("any")
    assert (answer.status_code, answer.headers["Location"]) == (status, f"{hub.url}/elsewhere")
    assert "elsewhere" not in hub.control.totals().endpoints
    requests.post(answer.headers["Location"], data={"client_secret": "leaked"}, timeout=TIMEOUT)
    assert hub.control.totals().endpoints["elsewhere"] == 1


@pytest.mark.parametrize(
    ("name", "status", "error"),
    [
        ("BAD_HUB", 400, "access_denied"),
        ("MISMATCH_REFRESH_TOKEN_CLIENT", 400, "invalid_grant"),
        ("BAD_REFRESH_TOKEN", 400, "invalid_grant"),
        ("RATE_LIMIT", 429, "rate_limited"),
    ],
)
def test_hubspots_own_errors_by_name(hub: Hub, name: str, status: int, error: str) -> None:
    """A named error is answered though the grant is well, as in the transient glitches that were reported."""
    minted = hub.control.grant(hub.client_id)
    hub.control.misbehave("error", error=name, count=1)
    answer = hub.refresh(minted.refresh_token)
    assert (answer.status_code, answer.json()["error"]) == (status, error)
    assert hub.refresh(minted.refresh_token).status_code == 200


@pytest.mark.parametrize(
    ("name", "error", "description"),
    [
        ("busy", "invalid_grant", "token request is already being processed"),
        ("busy_2024", "invalid_grant", "expired authorization code"),
        ("expired", "invalid_grant", "expired access/refresh token"),
        ("authentication_failure", "invalid_grant", "authentication failure"),
        ("inactive_user", "invalid_grant", "inactive user"),
        ("ip_restricted", "invalid_grant", "ip restricted"),
        ("invalid_client", "invalid_client", "invalid client credentials"),
        ("unsupported_grant_type", "unsupported_grant_type", "grant type not supported"),
    ],
)
def test_salesforces_own_errors_by_name(force: Force, name: str, error: str, description: str) -> None:
    """Each documented refusal can be had on demand."""
    force.control.misbehave("error", error=name)
    answer = force.refresh("any")
    assert (answer.status_code, answer.json()) == (400, {"error": error, "error_description": description})


def test_the_rest_api_can_fail_too(hub: Hub, force: Force) -> None:
    """Protected resources have errors of their own."""
    force.control.misbehave("error", endpoint="api", error="REQUEST_LIMIT_EXCEEDED")
    answer = force.call(force.control.grant(force.client_id).access_token)
    assert (answer.status_code, answer.json()[0]["errorCode"]) == (403, "REQUEST_LIMIT_EXCEEDED")
    hub.control.misbehave("error", endpoint="api", error="API_RATE_LIMIT")
    answer = hub.call(hub.control.grant(hub.client_id).access_token)
    assert (answer.status_code, answer.json()["errorType"]) == (429, "RATE_LIMIT")


def test_introspection_may_deny_a_live_token(force: Force) -> None:
    """active=false is no proof of death: the token goes on working."""
    minted = force.control.grant(force.client_id)
    force.control.misbehave("inactive", endpoint="introspect")
    assert force.ask("introspect", minted.access_token).json() == {"active": False}
    assert force.call(minted.access_token).status_code == 200


def test_revocation_may_fail(hub: Hub) -> None:
    """The revoke endpoint misbehaves like any other."""
    minted = hub.control.grant(hub.client_id)
    hub.control.misbehave("status", endpoint="revoke", status=503, count=1)
    assert hub.ask("revoke", minted.refresh_token).status_code == 503
    assert hub.refresh(minted.refresh_token).status_code == 200


def test_another_account_may_be_chosen_at_consent(hub: Hub) -> None:
    """The user ends up in a different account than the one that was expected."""
    hub.control.misbehave("other_account", account="102", user="22", count=1)
    body = hub.exchange(hub.consent(account="101").answer("code")).json()
    assert (body["hub_id"], body["user_id"]) == (101, 11)
    hub.control.behave()
    hub.control.misbehave("other_account", account="102", user="22")
    body = hub.exchange(hub.consent(account="101").answer("code")).json()
    assert (body["hub_id"], body["user_id"]) == (102, 22)


def test_a_denied_consent_may_be_reported(hub: Hub) -> None:
    """HubSpot can be made to send the documented error redirect once."""
    hub.control.misbehave("deny_redirect")
    assert hub.consent(approve=False).answer("error") == "access_denied"


def test_a_wrong_secret_is_a_matter_of_set_up(hub: Hub) -> None:
    """Replacing the app's secrets refuses everybody until the old one is back."""
    minted = hub.control.grant(hub.client_id)
    hub.control.set_secrets(hub.client_id, ["other"])
    assert hub.refresh(minted.refresh_token).json()["error"] == "invalid_client"
    hub.control.set_secrets(hub.client_id, ["other", "first-secret"])
    assert hub.refresh(minted.refresh_token).status_code == 200


def test_a_grant_can_be_revoked_behind_the_clients_back(force: Force) -> None:
    """Revoking by control kills the refresh token and, if wanted, spares live access tokens."""
    first, second = force.control.grant_many(force.client_id, 2)
    force.whole.revoke(first.grant_id)
    force.whole.revoke(second.grant_id, reason="test", access_tokens=False)
    assert [force.call(each.access_token).status_code for each in (first, second)] == [401, 200]
    assert [force.refresh(each.refresh_token).status_code for each in (first, second)] == [400, 400]
    assert [each["reason"] for each in force.control.totals().revocations] == ["revoked by control", "test"]


def test_a_fault_can_be_meant_for_one_account_or_grant(hub: Hub) -> None:
    """Filters on account, grant and grant type leave everybody else alone."""
    first, second, third = hub.control.grant_many(hub.client_id, 3)
    hub.control.misbehave("status", status=500, account=first.account)
    hub.control.misbehave("status", status=502, grant_id=second.grant_id)
    hub.control.misbehave("status", status=503, grant_type="authorization_code")
    statuses = [hub.refresh(each.refresh_token).status_code for each in (first, second, third)]
    assert statuses == [500, 502, 200]
    assert hub.exchange("any").status_code == 503


def test_a_fault_can_be_limited_in_time(hub: Hub) -> None:
    """Seconds run on the emulator's clock."""
    minted = hub.control.grant(hub.client_id)
    hub.control.misbehave("status", status=500, seconds=60)
    assert hub.refresh(minted.refresh_token).status_code == 500
    hub.whole.advance(61)
    assert hub.refresh(minted.refresh_token).status_code == 200
    assert hub.control.faults() == []


def test_faults_are_counted(hub: Hub) -> None:
    """Each fault tells how often it struck, also when it is used up."""
    hub.control.misbehave("status", status=500, count=2)
    for _ in range(3):
        hub.refresh("any")
    assert [(fault["hits"], fault["count"]) for fault in hub.control.faults()] == [(2, 0)]


def test_latency_goes_together_with_another_fault(hub: Hub) -> None:
    """A slow 503 is two faults."""
    latency = hub.control.misbehave("latency", delay=TIMEOUT)
    hub.control.misbehave("status", status=503)
    thread, seen = in_background(lambda: hub.refresh("any").status_code)
    wait_until(lambda: hub.control.totals().open == 1)
    assert not seen
    hub.control.behave(latency)
    thread.join(TIMEOUT)
    assert seen == [503]


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("explode", {}, "unknown kind"),
        ("drop", {"endpoint": "kitchen"}, "unknown endpoint"),
        ("drop", {"colour": "green"}, "not \\['colour'\\]"),
        ("drop", {"when": "later"}, "when is"),
        ("edit", {"when": "before"}, "cannot strike before"),
        ("error", {"error": "NO_SUCH"}, "has no error"),
    ],
)
def test_a_fault_that_makes_no_sense_is_refused(
    hub: Hub, kind: str, options: dict[str, str], says: str
) -> None:
    """A misspelt misbehaviour fails when it is asked for, not by never striking."""
    with pytest.raises(ControlError, match=says):
        hub.control.misbehave(kind, **options)


def test_the_ledger_never_holds_a_token(hub: Hub) -> None:
    """Requests are recorded with the SHA-256 of the presented refresh token only."""
    minted = hub.control.grant(hub.client_id, account="101", user="11")
    hub.refresh(minted.refresh_token)
    (seen,) = hub.control.requests()
    assert seen.refresh_sha256 == sha256((minted.refresh_token or "").encode()).hexdigest()
    assert (seen.grant_type, seen.app, seen.account, seen.user) == (
        "refresh_token",
        hub.client_id,
        "101",
        "11",
    )
    assert (seen.path, seen.status, seen.secret_index) == ("/oauth/2026-09/token", 200, 0)
    told = repr(hub.whole.grants()) + repr(hub.control.requests()) + repr(hub.control.totals()) + repr(minted)
    assert (minted.refresh_token or "") not in told
    assert minted.access_token not in told


def test_requests_can_be_read_on_from_the_last(hub: Hub) -> None:
    """`since` returns what came after, and a reset forgets all of it."""
    for _ in range(3):
        hub.refresh("any")
    first, *_ = hub.control.requests()
    assert len(hub.control.requests(since=first.id)) == 2
    hub.whole.reset("counters")
    assert hub.control.requests() == []
    assert hub.control.totals().endpoints == {}


def test_the_truth_about_grants_follows_each_token(force: Force) -> None:
    """Every access token is listed with its expiry and state; grants can be looked up by account."""
    minted = force.control.grant(force.client_id)
    force.control.grant(force.client_id)
    force.refresh(minted.refresh_token)
    (truth,) = force.whole.grants(vendor="salesforce", account=minted.account)
    assert [each.state for each in truth.access] == ["live", "live"]
    assert truth.access[0].sha256 == sha256(minted.access_token.encode()).hexdigest()
    force.whole.advance(7201)
    assert [each.state for each in force.whole.grant(minted.grant_id).access] == ["expired", "expired"]


def test_a_broken_client_does_not_disturb_the_server(hub: Hub) -> None:
    """A connection that sends half a request and leaves is nobody else's problem."""
    parts = urlsplit(hub.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=5) as raw:
        raw.sendall(b"POST /oauth/2026-09/token HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\nhalf")
    assert hub.refresh("any").status_code == 400


def test_an_answer_may_come_late_after_the_work_is_done(force: Force) -> None:
    """Latency with `after` finds the rotation done while the client still waits."""
    force.control.change_app(force.client_id, rotation=True)
    minted = force.control.grant(force.client_id)
    force.control.misbehave("latency", when="after", delay=TIMEOUT)
    thread, seen = in_background(lambda: force.refresh(minted.refresh_token).status_code)
    wait_until(lambda: force.whole.grant(minted.grant_id).rotations == 1)
    assert not seen
    force.control.behave()
    thread.join(TIMEOUT)
    assert seen == [200]
