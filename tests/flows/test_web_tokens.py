"""GET and POST /v1/connections/{name}/token over the whole program."""

from __future__ import annotations

import base64
from datetime import datetime
from typing import Any

import pytest

from app.access.permissions import Permission
from app.broker.connection import AdminState, Health
from app.errors import (
    AccountMismatch,
    AuditUnavailable,
    DatabaseUnavailable,
    DrawbridgeError,
    NeedsReconnect,
    ProviderMisconfigured,
    ProviderRateLimited,
    ProviderUnavailable,
    RefreshHeld,
)
from app.secret import Secret
from tests.web_stage import SECRET, Stage

TOKEN = "/v1/connections/{}/token"


@pytest.fixture
def path(stage: Stage) -> str:
    """Give the path of a connected HubSpot account's token."""
    return TOKEN.format(stage.connect(account="101", name="acme").name)


def test_a_caller_gets_a_living_token(either_stage: Stage) -> None:
    """The answer has every field of the contract, and the provider accepts the token."""
    name = either_stage.connect(account="101").name
    answer = either_stage.ask(f"{TOKEN.format(name)}?min_ttl=60")
    body = answer.json
    assert answer.status == 200
    assert answer.raw.headers["Cache-Control"] == "no-store"
    assert list(body) == [
        "access_token",
        "token_type",
        "expires_at",
        "expires_in",
        "scopes",
        "connection",
        "provider",
        "account_id",
        "generation",
    ]
    assert (body["connection"], body["provider"], body["account_id"]) == (name, "hubspot", "101")
    assert body["token_type"] == "Bearer"
    assert body["generation"] == 1
    assert 1790 <= body["expires_in"] <= 1800
    expires_at = datetime.fromisoformat(body["expires_at"])
    assert abs(expires_at.timestamp() - either_stage.clock.timestamp() - body["expires_in"]) < 2
    grant = either_stage.emulator.control.grants(vendor="hubspot")[0]
    digest = either_stage.services.store.read_with_tokens(name)
    assert digest is not None
    assert digest[1].access_token is not None
    assert digest[1].access_token.reveal() == body["access_token"]
    assert digest[1].access_token.sha256() in {
        access.sha256 for access in grant.access if access.state == "live"
    }


def test_a_salesforce_token_says_where_its_org_is(stage: Stage) -> None:
    """`instance_url` is there where the provider has one."""
    stage.connect("salesforce", name="org")
    body = stage.ask(TOKEN.format("org")).json
    assert body["instance_url"] == stage.services.store.named("org").instance_url


def test_get_and_post_give_the_same_token(stage: Stage, path: str) -> None:
    """A body with wishes is as good as a query with them."""
    first = stage.ask(f"{path}?min_ttl=60&max_wait=0").json
    second = stage.ask(path, method="POST", json={"min_ttl": 60, "max_wait": 0}).json
    assert first["access_token"] == second["access_token"]


def test_a_token_that_lives_too_short_is_refreshed_first(stage: Stage, path: str) -> None:
    """Past expiry the next caller waits for a new one and gets it."""
    old = stage.ask(path).json
    stage.clock.jump(1790)
    stage.emulator.control.advance(1790)
    new = stage.ask(f"{path}?min_ttl=60").json
    assert new["access_token"] != old["access_token"]
    assert new["generation"] == 2


def test_expires_in_counts_down(stage: Stage, path: str) -> None:
    """The composed answer is not a frozen one."""
    before = stage.ask(path).json
    stage.clock.jump(100)
    after = stage.ask(path).json
    assert after["access_token"] == before["access_token"]
    assert before["expires_in"] - after["expires_in"] in (100, 101)


def test_a_refused_token_is_refreshed_away_once(stage: Stage, path: str) -> None:
    """`rejected` brings another token; said again of the old one it brings the same; twice in 30 seconds it is 503."""
    old = stage.ask(path).json["access_token"]
    digest = Secret(old).sha256()
    new = stage.ask(path, method="POST", json={"rejected": digest}).json
    assert new["access_token"] != old
    assert new["generation"] == 2
    assert stage.ask(path, method="POST", json={"rejected": digest}).json["generation"] == 2
    again = stage.ask(path, method="POST", json={"rejected": Secret(new["access_token"]).sha256()})
    assert again.status == 503
    assert again.code == "refresh_in_progress"
    assert 1 <= int(again.raw.headers["Retry-After"]) <= 30


def test_more_than_half_a_life_is_400_and_names_the_most(stage: Stage, path: str) -> None:
    """HubSpot's tokens live 1800 s, so 900 s is the most that can be promised."""
    answer = stage.ask(f"{path}?min_ttl=901")
    assert answer.code == "invalid_request"
    assert answer.status == 400
    assert "900" in answer.json["detail"]
    assert stage.ask(f"{path}?min_ttl=900").status == 200


@pytest.mark.parametrize(
    "query", ["min_ttl=nan", "min_ttl=-1", "min_ttl=1&min_ttl=2", "unknown=1", "max_wait=abc", "min_ttl=%ff"]
)
def test_a_bad_query_is_400(stage: Stage, path: str, query: str) -> None:
    """What is unknown, repeated or no number is refused with a problem."""
    answer = stage.ask(f"{path}?{query}")
    assert (answer.status, answer.code) == (400, "invalid_request")


def test_bad_bodies_have_a_status_of_their_own(stage: Stage, path: str) -> None:
    """400 for what cannot be read or is not known, 413 for too much, 415 for another format."""
    cases: list[tuple[bytes, str, int, str]] = [
        (b"{", "application/json", 400, "invalid_request"),
        (b"[]", "application/json", 400, "invalid_request"),
        (b'{"min_ttl":"x"}', "application/json", 400, "invalid_request"),
        (b'{"unknown":1}', "application/json", 400, "invalid_request"),
        (b'{"min_ttl":1,"min_ttl":1}', "application/json", 400, "invalid_request"),
        (b'"\xff"', "application/json", 400, "invalid_request"),
        (b"{}", "text/plain", 415, "invalid_request"),
        (b" " * 70_000, "application/json", 413, "too_large"),
    ]
    for body, kind, status, code in cases:
        answer = stage.ask(path, method="POST", data=body, content_type=kind)
        assert (answer.status, answer.code) == (status, code), body[:20]


def test_who_cannot_prove_to_be_a_caller_gets_401(stage: Stage, path: str) -> None:
    """Missing, unknown, wrong, malformed, foreign and oversized credentials look the same, challenges included."""
    client_id = stage.callers["caller"].caller.client_id
    wrong = base64.b64encode(f"{client_id}:wrong".encode()).decode()
    latin = base64.b64encode(f"{client_id}:p\xe4ss".encode("latin-1")).decode()
    headers = [
        None,
        f"Basic {wrong}",
        f"Basic {latin}",
        "Basic !!!",
        "Basic",
        "Bearer abc.def.ghi",
        "Bearer " + "a" * 9000,
        "Digest x",
        f"{stage.basic('caller')}, {stage.basic('caller')}",
    ]
    details = set()
    for header in headers:
        answer = stage.ask(path, caller=None, headers={"Authorization": header} if header else {})
        assert (answer.status, answer.code) == (401, "unauthenticated"), header
        schemes = [value.partition(" ")[0] for value in answer.raw.headers.getlist("WWW-Authenticate")]
        assert schemes == ["Basic", "Bearer"]
        details.add(answer.json["detail"])
    assert len(details) == 1


def test_without_the_permission_it_is_403_whether_the_connection_exists_or_not(
    stage: Stage, path: str
) -> None:
    """A denial tells nothing about names."""
    stage.add_caller("other", "token:issue@other-*", "connection:read@*")
    there = stage.ask(path, caller="other")
    not_there = stage.ask(TOKEN.format("nothing-here"), caller="other")
    assert (there.status, there.code) == (403, "forbidden") == (not_there.status, not_there.code)
    same = ("type", "title", "detail", "hint", "retryable")
    assert [there.json[key] for key in same] == [not_there.json[key] for key in same]


def test_an_unknown_connection_is_404(stage: Stage) -> None:
    """A name that could be one, and one that could not."""
    for name in ("nothing-here", "UPPER", "a" * 64, "%00"):
        answer = stage.ask(TOKEN.format(name))
        assert (answer.status, answer.code) == (404, "not_found")


def test_taking_permission_caller_or_connection_away_acts_at_once(stage: Stage, path: str) -> None:
    """No later than one second, and here at once, because the change was made in this process."""
    stage.add_caller("passing", "token:issue@*")
    assert stage.ask(path, caller="passing").status == 200
    stage.services.callers.deny("passing", Permission.parse("token:issue@*"))
    stage.clock.jump(1)
    assert stage.ask(path, caller="passing").status == 403
    stage.services.callers.disable("passing")
    stage.clock.jump(1)
    assert stage.ask(path, caller="passing").status == 401
    stage.services.revoker.disable("acme")
    stage.clock.jump(1)
    assert stage.ask(path).code == "connection_disabled"


def test_a_rate_is_held_and_says_when_to_come_back(stage: Stage, path: str) -> None:
    """429 carries Retry-After."""
    stage.add_caller("slow", "token:issue@*", rate=1)
    codes = [stage.ask(path, caller="slow") for _ in range(3)]
    last = codes[-1]
    assert codes[0].status == 200
    assert (last.status, last.code) == (429, "rate_limited")
    assert last.json["retryable"] is True
    assert int(last.raw.headers["Retry-After"]) == last.json["retry_after_seconds"] >= 1


def test_a_dead_grant_is_409_and_names_who_must_act(stage: Stage, path: str) -> None:
    """needs_reconnect, once no living token is left."""
    with stage.services.database.write() as transaction:
        connection = stage.services.store.named("acme")
        stage.services.store.change(
            transaction,
            connection.id,
            health=Health.NEEDS_RECONNECT.value,
            expires_at=stage.clock.now(),
        )
    stage.clock.jump(2)
    answer = stage.ask(path)
    assert (answer.status, answer.code) == (409, "needs_reconnect")
    assert answer.json["retryable"] is False


def test_a_provider_that_is_away_is_503_and_never_4xx(stage: Stage, path: str) -> None:
    """An outage is nobody's fault here; a rate limit and a wrong client secret say what they are."""
    control = stage.emulator.control.hubspot
    faults: list[tuple[Any, str]] = [
        (lambda: control.misbehave("status", status=503), "provider_unavailable"),
        (lambda: control.misbehave("status", status=429, retry_after=7), "provider_rate_limited"),
        (lambda: control.set_secrets("hub-client", ["another"]), "provider_misconfigured"),
    ]
    stage.clock.jump(1800)
    stage.emulator.control.advance(1800)
    for misbehave, code in faults:
        control.behave()
        control.set_secrets("hub-client", [SECRET])
        misbehave()
        stage.clock.jump(120)
        stage.emulator.control.advance(120)
        answer = stage.ask(path)
        assert (answer.status, answer.code) == (503, code)
        assert int(answer.raw.headers["Retry-After"]) >= 1
    assert stage.services.store.named("acme").admin_state is AdminState.ENABLED
    assert stage.services.store.named("acme").health is not Health.NEEDS_RECONNECT


def test_a_caller_that_will_not_wait_is_told_to_come_back(stage: Stage, path: str) -> None:
    """max_wait=0 with a refresh under way is refresh_in_progress."""
    stage.clock.jump(1800)
    stage.emulator.control.advance(1800)
    stage.emulator.control.hubspot.misbehave("latency", delay=1.0)
    answer = stage.ask(f"{path}?max_wait=0")
    assert (answer.status, answer.code) == (503, "refresh_in_progress")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (NeedsReconnect(), 409, "needs_reconnect"),
        (AccountMismatch(), 409, "account_mismatch"),
        (ProviderUnavailable(), 503, "provider_unavailable"),
        (ProviderRateLimited(retry_after=12.3), 503, "provider_rate_limited"),
        (ProviderMisconfigured(), 503, "provider_misconfigured"),
        (RefreshHeld(), 503, "overloaded"),
        (DatabaseUnavailable(), 503, "overloaded"),
        (AuditUnavailable(), 503, "overloaded"),
    ],
)
def test_each_error_has_its_status_and_code_on_the_wire(
    stage: Stage, error: DrawbridgeError, status: int, code: str
) -> None:
    """One body for all: type, title, status, detail, instance, code, hint, retryable."""
    stage.app.view_functions["docs.show_docs"] = _raising(error)
    answer = stage.ask("/docs")
    assert (answer.status, answer.code) == (status, code)
    body = answer.json
    assert body["type"] == f"/problems/{code}"
    assert body["instance"] == f"/docs#{answer.raw.headers['X-Request-ID']}"
    assert body["detail"]
    assert body["hint"]
    assert body["retryable"] is error.retryable
    assert ("Retry-After" in answer.raw.headers) is (status == 503)
    if error.retry_after == 12.3:
        assert answer.raw.headers["Retry-After"] == "13"


def _raising(error: Exception) -> Any:
    def view() -> str:
        raise error

    return view


def test_an_unexpected_exception_is_500_with_an_incident_and_nothing_of_itself(
    stage: Stage, path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the hand-out path too: the answer holds the id of the log line, neither holds the message."""
    leaky = RuntimeError("refresh_token=very-secret-value")
    monkeypatch.setattr(type(stage.services.issuer), "_current", _failing(leaky))
    answer = stage.ask(path)
    assert (answer.status, answer.code) == (500, "internal")
    assert "very-secret-value" not in answer.text
    log = capsys.readouterr().err
    assert answer.raw.headers["X-Request-ID"] in log
    assert "very-secret-value" not in log


def _failing(error: Exception) -> Any:
    def fail(*_: Any) -> None:
        raise error

    return fail


def test_a_head_takes_no_token(stage: Stage, path: str) -> None:
    """Nothing would arrive of what was recorded."""
    before = len(stage.services.trail.search(action="broker:token:issued").rows)
    assert stage.ask(path, method="HEAD").status == 405
    assert len(stage.services.trail.search(action="broker:token:issued").rows) == before


def test_every_hand_out_is_on_record_once(stage: Stage, path: str) -> None:
    """By GET, by POST and by a request that failed first."""
    stage.ask(path)
    stage.ask(path, method="POST", json={})
    stage.ask(f"{path}?bad=1")
    rows = stage.services.trail.search(action="broker:token:issued").rows
    assert [(row.actor, row.target, row.outcome) for row in rows] == [("caller:caller", "acme", "issued")] * 2


def test_only_the_addresses_of_a_caller_are_let_in(stage: Stage, path: str) -> None:
    """Forwarded headers say nothing where no proxy is trusted."""
    stage.add_caller("homely", "token:issue@*", allow_ips=["192.0.2.0/24"])
    refused = stage.ask(path, caller="homely", headers={"X-Forwarded-For": "192.0.2.1"})
    assert (refused.status, refused.code) == (403, "forbidden")
    client_address = {"REMOTE_ADDR": "192.0.2.9"}
    assert stage.ask(path, caller="homely", environ_base=client_address).status == 200
