"""Connections over the API: listed, shown, switched, refreshed, taken away; never a token."""

from __future__ import annotations

import pytest

from app.secret import Secret
from tests.web_stage import Stage

ALL = "/v1/connections"


@pytest.fixture
def names(stage: Stage) -> list[str]:
    """Give the names of two portals and an org."""
    for account, name in (("101", "acme"), ("102", "globex")):
        stage.connect(account=account, name=name)
    stage.connect("salesforce", name="org")
    return ["acme", "globex", "org"]


def test_pages_follow_one_another_by_name(stage: Stage, names: list[str]) -> None:
    """`next` of one page is `after` of the following; the last has none."""
    first = stage.ask(f"{ALL}?limit=2").json
    assert [row["name"] for row in first["connections"]] == ["acme", "globex"]
    second = stage.ask(f"{ALL}?limit=2&after={first['next']}").json
    assert [row["name"] for row in second["connections"]] == ["org"]
    assert second["next"] is None


def test_a_list_holds_only_what_the_caller_may_see(stage: Stage, names: list[str]) -> None:
    """By pattern; a caller that may see none at all is refused."""
    stage.add_caller("some", "connection:read@o*", "token:issue@*")
    stage.add_caller("none", "token:issue@*")
    assert [row["name"] for row in stage.ask(ALL, caller="some").json["connections"]] == ["org"]
    refused = stage.ask(ALL, caller="none")
    assert (refused.status, refused.code) == (403, "forbidden")
    assert stage.ask(f"{ALL}/acme", caller="some").status == 403


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=501",
        "limit=1_0",
        "limit=+5",
        "limit=x",
        "after=UPPER",
        "after=",
        "limit=1&limit=1",
        "page=2",
    ],
)
def test_a_wrong_page_is_400(stage: Stage, query: str) -> None:
    """Unknown, repeated and impossible parameters are refused."""
    answer = stage.ask(f"{ALL}?{query}")
    assert (answer.status, answer.code) == (400, "invalid_request")


def test_no_answer_holds_a_token(stage: Stage, names: list[str]) -> None:
    """Neither list nor single answers, nor the console."""
    found = [stage.services.store.read_with_tokens(name) for name in names]
    secrets = [
        secret.reveal()
        for pair in found
        if pair
        for secret in (pair[1].access_token, pair[1].refresh_token)
        if secret is not None
    ]
    assert len(secrets) == 6
    texts = [stage.ask(ALL).text, stage.ask("/health").text]
    texts += [stage.ask(f"{ALL}/{name}").text for name in names]
    texts += [stage.signed_in().get("/admin").get_data(as_text=True)]
    assert not [secret for secret in secrets for text in texts if secret in text]


def test_one_connection_tells_its_state(stage: Stage, names: list[str]) -> None:
    """State, expiry, scopes wanted and granted, last refresh, last error."""
    row = stage.ask(f"{ALL}/acme").json
    assert row["state"] == "healthy"
    assert row["app"] == "hubspot/default"
    assert set(row["scopes_wanted"]) >= {"oauth", "contacts"}
    assert set(row["scopes_granted"]) >= {"oauth", "contacts"}
    assert row["expires_at"] is not None
    assert row["last_error"] is None


def test_nobody_unknown_learns_anything(stage: Stage) -> None:
    """Without a credential everything under /v1 is 401, wrong parameters included."""
    for path, method in (
        (ALL, "GET"),
        (f"{ALL}?limit=x", "GET"),
        (f"{ALL}/acme", "GET"),
        (f"{ALL}/acme", "DELETE"),
        (f"{ALL}/acme/refresh", "POST"),
        (f"{ALL}/acme/disable", "POST"),
        (f"{ALL}/acme/enable", "POST"),
        (f"{ALL}/acme/token", "GET"),
        (f"{ALL}/acme/token", "POST"),
    ):
        answer = stage.ask(path, method=method, caller=None)
        assert (answer.status, answer.code) == (401, "unauthenticated"), (method, path)


def test_disable_and_enable_switch_and_are_on_record(stage: Stage, names: list[str]) -> None:
    """By whom, and twice does no harm."""
    for verb, state in (("disable", "disabled"), ("disable", "disabled"), ("enable", "healthy")):
        answer = stage.ask(f"{ALL}/acme/{verb}", method="POST")
        assert (answer.status, answer.json["state"]) == (200, state)
    rows = stage.services.trail.search(target="acme", actor="caller:caller").rows
    assert {row.action for row in rows} == {"broker:connection:disabled", "broker:connection:enabled"}


def test_managing_needs_its_own_permission(stage: Stage, names: list[str]) -> None:
    """connection:read does not switch anything."""
    stage.add_caller("reader", "connection:read@*")
    for path, method in (("acme", "DELETE"), ("acme/disable", "POST"), ("acme/refresh", "POST")):
        assert stage.ask(f"{ALL}/{path}", method=method, caller="reader").code == "forbidden"
    assert stage.services.store.named("acme").state == "healthy"


def test_a_forced_refresh_is_made_once_in_thirty_seconds(stage: Stage, names: list[str]) -> None:
    """The second is 503 with Retry-After; thirty seconds later it works again."""
    first = stage.ask(f"{ALL}/org/refresh", method="POST")
    assert (first.status, first.json["generation"]) == (200, 2)
    second = stage.ask(f"{ALL}/org/refresh", method="POST")
    assert (second.status, second.code) == (503, "refresh_in_progress")
    assert second.raw.headers["Retry-After"] == "30"
    stage.clock.jump(31)
    assert stage.ask(f"{ALL}/org/refresh", method="POST").json["generation"] == 3
    rows = stage.services.trail.search(target="org", action="broker:refresh:ended").rows
    assert [(row.actor, row.outcome) for row in rows] == [("caller:caller", "refreshed")] * 2


def test_a_disabled_connection_is_not_refreshed(stage: Stage, names: list[str]) -> None:
    """409 tells the caller who must act."""
    stage.ask(f"{ALL}/acme/disable", method="POST")
    assert stage.ask(f"{ALL}/acme/refresh", method="POST").code == "connection_disabled"


def test_disconnecting_is_202_and_nothing_is_handed_out_any_more(stage: Stage, names: list[str]) -> None:
    """At once here, and for good once the worker has given the grant back."""
    answer = stage.ask(f"{ALL}/acme", method="DELETE")
    assert (answer.status, answer.json["state"]) == (202, "disconnecting")
    stage.clock.jump(1)
    assert stage.ask(f"{ALL}/acme/token").code == "connection_disabled"
    connection = stage.services.store.named("acme")
    assert stage.services.revoker.carry_out(connection.id)
    stage.clock.jump(1)
    assert stage.ask(f"{ALL}/acme/token").code == "not_found"
    assert stage.ask(f"{ALL}/acme").code == "not_found"


def test_uninstall_is_only_where_the_provider_has_it(stage: Stage, names: list[str]) -> None:
    """HubSpot can, Salesforce cannot; other spellings of true are refused."""
    assert stage.ask(f"{ALL}/org?uninstall=true", method="DELETE").code == "invalid_request"
    assert stage.ask(f"{ALL}/acme?uninstall=yes", method="DELETE").code == "invalid_request"
    assert stage.ask(f"{ALL}/acme?uninstall=true", method="DELETE").status == 202
    assert stage.services.store.named("org").state == "healthy"


def test_a_body_where_none_is_taken_is_400(stage: Stage, names: list[str]) -> None:
    """Somebody who sends one expects it to mean something."""
    answer = stage.ask(f"{ALL}/acme/disable", method="POST", json={"for": "10 minutes"})
    assert (answer.status, answer.code) == (400, "invalid_request")
    assert stage.services.store.named("acme").state == "healthy"


def test_a_bearer_token_carries_only_the_scopes_it_was_made_for(stage: Stage, names: list[str]) -> None:
    """A token for token:issue reads no connection."""
    made = stage.ask(
        "/oauth/token", method="POST", data={"grant_type": "client_credentials", "scope": "token:issue"}
    )
    bearer = {"Authorization": f"Bearer {made.json['access_token']}"}
    assert stage.ask(f"{ALL}/acme/token", headers=bearer).status == 200
    assert stage.ask(f"{ALL}/acme", headers=bearer).code == "forbidden"
    assert stage.ask(ALL, headers=bearer).code == "forbidden"
    garbled = {"Authorization": f"Bearer {Secret(made.json['access_token']).sha256()}"}
    assert stage.ask(f"{ALL}/acme/token", headers=garbled).code == "unauthenticated"
