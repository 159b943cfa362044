"""The emulated HubSpot, spoken to by plain HTTP, held to HubSpot's documented behaviour."""

import re
import uuid

import pytest
import requests

from emulator import ControlError
from tests.contract.emulated import CALLBACK, SECRET, TIMEOUT, VERIFIER, Hub, challenge

VERSIONS = ["v1", "v3", "2026-03", "2026-09"]


def test_consent_sends_code_and_unchanged_state_to_the_callback(hub: Hub) -> None:
    """Approving redirects to the registered URL with a code and the state exactly as it was sent."""
    answer = hub.consent(account="101")
    assert answer.status == 302
    assert answer.location is not None
    assert answer.location.startswith(f"{CALLBACK}?code=na1-")
    assert answer.answer("state") == "s t&te"


def test_the_account_can_be_preselected_in_the_path(hub: Hub) -> None:
    """The form with a hub id offers that account alone, and refuses an unknown one on HubSpot's page."""
    page = requests.get(hub.authorize_url(hub="102"), timeout=TIMEOUT)
    assert "globex.example" in page.text
    assert "acme.example" not in page.text
    assert hub.control.consent(hub.authorize_url(hub="999")).location is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"client_id": "nobody"}, "invalid client id"),
        ({"redirect_uri": "https://evil.example/callback"}, "redirect URL"),
        ({"redirect_uri": f"{CALLBACK}/"}, "redirect URL"),
        ({"scope": "oauth"}, "lacks required scopes"),
        ({"scope": "oauth contacts tickets"}, "not declared"),
        ({"optional_scope": "tickets"}, "not declared"),
        ({"scope": "oauth contacts companies"}, "not declared"),
    ],
)
def test_a_bad_install_url_is_shown_on_the_vendors_page(hub: Hub, changes: dict[str, str], says: str) -> None:
    """Client, redirect and scope errors never reach the callback."""
    answer = hub.control.consent(hub.authorize_url(**changes))
    assert answer.status == 400
    assert answer.location is None
    assert says in answer.body


def test_conditionally_required_scopes_may_be_asked_in_scope(hub: Hub) -> None:
    """A conditionally required scope is allowed in `scope`, not in `optional_scope`."""
    hub.control.change_app(hub.client_id, conditional_scopes=["deals"])
    assert hub.control.consent(hub.authorize_url(scope="oauth contacts deals")).answer("code")
    assert hub.control.consent(hub.authorize_url(optional_scope="deals")).status == 400


def test_an_account_without_a_required_scope_is_kept_on_the_vendors_page(hub: Hub) -> None:
    """Insufficient scopes of the account are no business of the callback."""
    hub.control.change_account("102", scopes=["oauth"])
    answer = hub.consent(account="102")
    assert answer.location is None
    assert "insufficient scopes" in answer.body


def test_optional_scopes_the_account_cannot_have_are_dropped_silently(hub: Hub) -> None:
    """The token tells what was granted; nothing says that leads was left out."""
    code = hub.consent(account="102").answer("code")
    assert hub.exchange(code).json()["scopes"] == ["companies", "contacts", "oauth"]


def test_a_user_without_install_rights_is_kept_on_the_vendors_page(hub: Hub) -> None:
    """Only somebody who may install apps gets as far as a code."""
    hub.control.change_user("102", "22", may_install=False)
    assert hub.consent(account="102", user="22").location is None
    assert hub.consent(account="102", user="21").location is not None


def test_denying_sends_nothing_to_the_callback_unless_told(hub: Hub) -> None:
    """A refusal ends on HubSpot's page; the documented error redirect can be switched on."""
    assert hub.consent(approve=False).location is None
    hub.control.settings(deny_redirects=True)
    answer = hub.consent(approve=False)
    assert (answer.answer("error"), answer.answer("state")) == ("access_denied", "s t&te")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_code_is_exchanged_for_the_documented_fields(hub: Hub, version: str) -> None:
    """The answer is snake_case JSON, marked not to be stored, with the account and user it is for."""
    code = hub.consent(account="102", user="22").answer("code")
    answer = hub.exchange(code, version=version)
    body = answer.json()
    assert answer.headers["Cache-Control"] == "no-store"
    assert body.pop("access_token").startswith("C")
    assert re.fullmatch(r"na1-[0-9a-f-]{36}-\S{50,}", body.pop("refresh_token"))
    assert body == {
        "token_type": "bearer",
        "token_use": "access_token",
        "expires_in": 1800,
        "hub_id": 102,
        "user_id": 22,
        "scopes": ["companies", "contacts", "oauth"],
    }


def test_a_code_serves_once(hub: Hub) -> None:
    """The second exchange of a code is BAD_AUTH_CODE."""
    code = hub.consent().answer("code")
    assert hub.exchange(code).status_code == 200
    again = hub.exchange(code)
    assert (again.status_code, again.json()["status"]) == (400, "BAD_AUTH_CODE")
    assert again.json()["message"] == "missing or unknown auth code"


def test_a_code_expires(hub: Hub) -> None:
    """A late code is EXPIRED_AUTH_CODE."""
    code = hub.consent().answer("code")
    hub.whole.advance(61)
    assert hub.exchange(code).json()["status"] == "EXPIRED_AUTH_CODE"


def test_a_refused_exchange_leaves_the_code_usable(hub: Hub) -> None:
    """Redirect URI and verifier must fit those of the authorize URL; a failed try does not burn the code."""
    url = hub.authorize_url(code_challenge=challenge(), code_challenge_method="S256")
    code = hub.control.consent(url).answer("code")
    assert hub.exchange(code, redirect_uri="https://other.example").json()["status"] == "BAD_REDIRECT_URI"
    assert hub.exchange(code).json()["status"] == "BAD_CODE_VERIFIER"
    assert hub.exchange(code, code_verifier=VERIFIER[:-1] + "1").json()["status"] == "BAD_CODE_VERIFIER"
    assert hub.exchange(code, code_verifier=VERIFIER).status_code == 200


def test_credentials_count_in_the_body_only(hub: Hub) -> None:
    """HTTP Basic is not read, so that a client using it is told its id is missing."""
    token = hub.control.grant(hub.client_id).refresh_token
    answer = requests.post(
        f"{hub.url}/oauth/2026-09/token",
        data={"grant_type": "refresh_token", "refresh_token": token},
        auth=(hub.client_id, SECRET),
        timeout=TIMEOUT,
    )
    assert (answer.status_code, answer.json()["status"]) == (400, "BAD_CLIENT_ID")
    assert answer.json()["message"] == "missing or unknown client id"


def test_only_version_one_reads_the_query(hub: Hub) -> None:
    """Secrets in the query work on v1, which is why it is going away, and nowhere else."""
    fields = {
        "grant_type": "refresh_token",
        "refresh_token": hub.control.grant(hub.client_id).refresh_token,
        "client_id": hub.client_id,
        "client_secret": SECRET,
    }
    statuses = [
        requests.post(f"{hub.url}/oauth/{version}/token", params=fields, timeout=TIMEOUT).status_code
        for version in VERSIONS
    ]
    assert statuses == [200, 400, 400, 400]


def test_refreshing_returns_the_same_refresh_token(hub: Hub) -> None:
    """By default HubSpot does not rotate, and the earlier access token lives on."""
    minted = hub.control.grant(hub.client_id, account="101")
    body = hub.refresh(minted.refresh_token).json()
    assert body["refresh_token"] == minted.refresh_token
    assert body["access_token"] != minted.access_token
    assert hub.call(minted.access_token).status_code == 200
    assert hub.call(body["access_token"]).status_code == 200


def test_a_refresh_token_works_on_every_version(hub: Hub) -> None:
    """A grant is not bound to the version of the endpoint it came from."""
    token = hub.control.grant(hub.client_id).refresh_token
    assert [hub.refresh(token, version=version).status_code for version in VERSIONS] == [200] * 4


def test_rotation_can_be_switched_on_and_reuse_kills_the_grant(hub: Hub) -> None:
    """With rotation each refresh gives a new token; presenting an old one ends the whole grant."""
    hub.control.change_app(hub.client_id, rotation=True)
    minted = hub.control.grant(hub.client_id)
    second = hub.refresh(minted.refresh_token).json()
    assert second["refresh_token"] != minted.refresh_token
    assert hub.refresh(minted.refresh_token).json()["error"] == "invalid_grant"
    assert hub.refresh(second["refresh_token"]).json()["status"] == "BAD_REFRESH_TOKEN"
    assert hub.whole.grant(minted.grant_id).revoked == "reuse"
    assert hub.control.totals().reuses == 1


def test_several_client_secrets_are_valid_at_once(hub: Hub) -> None:
    """During a secret rotation the old and the new secret both work; the ledger tells which was used."""
    hub.control.set_secrets(hub.client_id, ["new-secret", SECRET])
    token = hub.control.grant(hub.client_id).refresh_token
    assert hub.refresh(token).status_code == 200
    assert hub.refresh(token, client_secret="new-secret").status_code == 200
    assert [seen.secret_index for seen in hub.control.requests()] == [1, 0]
    assert hub.refresh(token, client_secret="old").json()["status"] == "BAD_CLIENT_SECRET"


@pytest.mark.parametrize(
    ("fields", "status", "error"),
    [
        ({"client_id": "nobody"}, "BAD_CLIENT_ID", "invalid_client"),
        ({"client_secret": "wrong"}, "BAD_CLIENT_SECRET", "invalid_client"),
        ({"grant_type": "password"}, "BAD_GRANT_TYPE", "unsupported_grant_type"),
        ({"refresh_token": "na1-nothing"}, "BAD_REFRESH_TOKEN", "invalid_grant"),
    ],
)
def test_token_errors_carry_both_styles(hub: Hub, fields: dict[str, str], status: str, error: str) -> None:
    """Current bodies have status and message beside error and error_description."""
    answer = hub.refresh(hub.control.grant(hub.client_id).refresh_token, **fields)
    body = answer.json()
    assert (answer.status_code, body["status"], body["error"]) == (400, status, error)
    assert body["message"] == body["error_description"]
    assert uuid.UUID(body["correlationId"])


def test_the_old_error_style_can_be_chosen(hub: Hub) -> None:
    """Older bodies have status, message and correlationId alone, and a dead hub was a 403."""
    hub.control.settings(error_style="old")
    body = hub.refresh("na1-nothing").json()
    assert set(body) == {"status", "message", "correlationId"}
    assert body["message"] == "missing or invalid refresh token"
    token = hub.control.grant(hub.client_id, account="101").refresh_token
    hub.control.change_account("101", active=False)
    assert hub.refresh(token).status_code == 403


def test_an_unknown_error_style_is_refused(hub: Hub) -> None:
    """Settings are checked when they are set."""
    with pytest.raises(ControlError, match="error_style is one of"):
        hub.control.settings(error_style="older")


def test_a_dead_account_is_bad_hub(hub: Hub) -> None:
    """A refresh for an account that is gone says access_denied and BAD_HUB, until it is back."""
    token = hub.control.grant(hub.client_id, account="101").refresh_token
    hub.control.change_account("101", active=False)
    body = hub.refresh(token).json()
    assert (body["status"], body["error"]) == ("BAD_HUB", "access_denied")
    hub.control.change_account("101", active=True)
    assert hub.refresh(token).status_code == 200


def test_a_token_of_another_app_is_a_mismatch(hub: Hub) -> None:
    """MISMATCH_REFRESH_TOKEN_CLIENT tells a token of another app from a dead one."""
    hub.control.register_app("other", secrets=["o"], scopes=["oauth"])
    token = hub.control.grant(hub.client_id).refresh_token
    answer = hub.refresh(token, client_id="other", client_secret="o")
    assert answer.json()["status"] == "MISMATCH_REFRESH_TOKEN_CLIENT"
    assert hub.refresh(token).status_code == 200


def test_app_level_tokens_come_from_client_credentials(hub: Hub) -> None:
    """The webhooks journal has tokens of the app itself: no refresh token, a token_use of its own."""
    scope = "developer.webhooks_journal.read"
    body = hub.token(grant_type="client_credentials", scope=scope).json()
    assert (body["token_use"], body["scopes"]) == ("client_credentials", [scope])
    assert not {"refresh_token", "hub_id", "user_id"} & set(body)
    assert hub.token(grant_type="client_credentials", scope="oauth").json()["status"] == "BAD_SCOPES"


@pytest.mark.parametrize("version", ["v3", "2026-03", "2026-09"])
def test_introspection_describes_access_and_refresh_tokens(hub: Hub, version: str) -> None:
    """Both kinds are described with account, user, app and scopes; an access token with its rest of life."""
    hub.version = version
    minted = hub.control.grant(hub.client_id, account="102", user="22")
    hub.whole.advance(600)
    access = hub.ask("introspect", minted.access_token, token_type_hint="access_token").json()
    refresh = hub.ask("introspect", minted.refresh_token).json()
    assert access["expires_in"] == pytest.approx(1200, abs=20)
    assert access["signed_access_token"]["expiresAt"] == pytest.approx(minted.expires_at * 1000, abs=2)
    for body, use in ((access, "access_token"), (refresh, "refresh_token")):
        assert (body["active"], body["token_use"], body["token_type"]) == (True, use, "Bearer")
        assert (body["hub_id"], body["user_id"], body["user"]) == (102, 22, "eve@globex.example")
        assert (body["client_id"], body["hub_domain"]) == (hub.client_id, "globex.example")


def test_introspection_of_anything_else_is_just_not_active(hub: Hub) -> None:
    """Unknown, expired and revoked tokens answer 200 with active=false and nothing more."""
    minted = hub.control.grant(hub.client_id)
    hub.ask("revoke", minted.refresh_token)
    hub.whole.advance(1801)
    for token in ("unknown", minted.access_token, minted.refresh_token):
        answer = hub.ask("introspect", token)
        assert (answer.status_code, answer.json()) == (200, {"active": False})


def test_introspection_takes_client_credentials(hub: Hub) -> None:
    """A wrong secret is refused before anything is told about the token."""
    answer = hub.ask("introspect", hub.control.grant(hub.client_id).access_token, client_secret="wrong")
    assert (answer.status_code, answer.json()["status"]) == (400, "BAD_CLIENT_SECRET")


def test_revoking_spares_live_access_tokens(hub: Hub) -> None:
    """Revocation deletes the refresh token; access tokens work until they expire."""
    minted = hub.control.grant(hub.client_id)
    assert hub.ask("revoke", minted.refresh_token).status_code == 200
    assert hub.refresh(minted.refresh_token).json()["status"] == "BAD_REFRESH_TOKEN"
    assert hub.call(minted.access_token).status_code == 200
    hub.whole.advance(1801)
    assert hub.call(minted.access_token).status_code == 401


def test_one_app_cannot_revoke_anothers_token(hub: Hub) -> None:
    """A revocation by a foreign client is answered alike and does nothing."""
    hub.control.register_app("other", secrets=["o"], scopes=["oauth"])
    token = hub.control.grant(hub.client_id).refresh_token
    assert hub.ask("revoke", token, client_id="other", client_secret="o").status_code == 200
    assert hub.refresh(token).status_code == 200


def test_version_one_describes_and_deletes_by_url(hub: Hub) -> None:
    """The metadata endpoints of v1 need nothing but the token in the path."""
    minted = hub.control.grant(hub.client_id, account="101")
    root = f"{hub.url}/oauth/v1"
    access = requests.get(f"{root}/access-tokens/{minted.access_token}", timeout=TIMEOUT).json()
    assert {"app_id", "expires_in", "hub_id", "scopes", "token", "token_type", "user_id"} <= set(access)
    assert (access["token"], access["token_type"]) == (minted.access_token, "access")
    refresh = requests.get(f"{root}/refresh-tokens/{minted.refresh_token}", timeout=TIMEOUT).json()
    assert (refresh["client_id"], refresh["hub_id"]) == (hub.client_id, 101)
    gone = requests.delete(f"{root}/refresh-tokens/{minted.refresh_token}", timeout=TIMEOUT)
    assert gone.status_code == 204
    assert requests.get(f"{root}/refresh-tokens/{minted.refresh_token}", timeout=TIMEOUT).status_code == 404
    assert hub.call(minted.access_token).status_code == 200


def test_uninstalling_ends_the_install_for_all_users(hub: Hub) -> None:
    """One user's uninstall kills the refresh tokens of all users of the account, and of no other account."""
    mine = hub.control.grant(hub.client_id, account="102", user="21")
    theirs = hub.control.grant(hub.client_id, account="102", user="22")
    elsewhere = hub.control.grant(hub.client_id, account="101")
    answer = hub.call(mine.access_token, "/appinstalls/2026-09/external-install", "DELETE")
    assert (answer.status_code, answer.content) == (204, b"")
    assert hub.refresh(theirs.refresh_token).json()["status"] == "BAD_REFRESH_TOKEN"
    assert hub.call(theirs.access_token).status_code == 403
    assert hub.refresh(elsewhere.refresh_token).status_code == 200
    assert hub.whole.grant(theirs.grant_id).revoked == "uninstalled"


def test_access_tokens_may_outlive_an_uninstall_briefly(hub: Hub) -> None:
    """The grace after an uninstall is a setting, because reports differ."""
    hub.control.settings(uninstall_grace=60)
    minted = hub.control.grant(hub.client_id)
    hub.call(minted.access_token, "/appinstalls/v3/external-install", "DELETE")
    assert hub.call(minted.access_token).status_code == 200
    hub.whole.advance(61)
    assert hub.call(minted.access_token).status_code == 403


def test_a_user_level_app_is_installed_per_user(hub: Hub) -> None:
    """For user-level apps one user's uninstall leaves the others alone."""
    hub.control.change_app(hub.client_id, user_level=True)
    mine = hub.control.grant(hub.client_id, account="102", user="21")
    theirs = hub.control.grant(hub.client_id, account="102", user="22")
    hub.call(mine.access_token, "/appinstalls/2026-09/external-install", "DELETE")
    assert hub.refresh(mine.refresh_token).status_code == 400
    assert hub.refresh(theirs.refresh_token).status_code == 200
    signed = hub.ask("introspect", theirs.access_token).json()["signed_access_token"]
    assert signed["isUserLevel"] is True


def test_reauthorising_keeps_earlier_scopes_that_are_still_declared(hub: Hub) -> None:
    """A second consent that asks for less still yields the earlier scopes, but not those the app gave up."""
    hub.exchange(hub.consent(account="101").answer("code"))
    hub.control.change_app(hub.client_id, optional_scopes=["companies"])
    code = hub.control.consent(hub.authorize_url(optional_scope=None), account="101").answer("code")
    assert hub.exchange(code).json()["scopes"] == ["companies", "contacts", "oauth"]


def test_account_details_tell_the_region(hub: Hub) -> None:
    """The account's data centre shows in the UI domain."""
    hub.control.change_account("101", hublet="eu1")
    minted = hub.control.grant(hub.client_id, account="101")
    body = hub.call(minted.access_token, "/account-info/v3/details").json()
    assert (body["portalId"], body["uiDomain"], body["dataHostingLocation"]) == (
        101,
        "app-eu1.hubspot.com",
        "eu1",
    )
    assert minted.refresh_token is not None
    assert minted.refresh_token.startswith("eu1-")


def test_an_expired_token_is_told_how_old_it_is(hub: Hub) -> None:
    """EXPIRED_AUTHENTICATION gives the age and the moment, with the headers seen in the field."""
    minted = hub.control.grant(hub.client_id)
    hub.whole.advance(1800 + 3 * 60)
    answer = hub.call(minted.access_token)
    body = answer.json()
    assert (answer.status_code, body["category"]) == (401, "EXPIRED_AUTHENTICATION")
    assert "expired 3 minute(s) ago" in body["message"]
    assert body["context"]["expire time"][0].endswith("Z")
    assert "x-hubspot-auth-failure" in answer.headers
    assert answer.headers["x-hubspot-correlation-id"] == body["correlationId"]


def test_an_unknown_token_is_invalid_authentication(hub: Hub) -> None:
    """A made-up token and a missing one get the same 401."""
    for headers in ({}, {"Authorization": "Bearer nonsense"}):
        answer = requests.get(f"{hub.url}/account-info/v3/details", headers=headers, timeout=TIMEOUT)
        assert (answer.status_code, answer.json()["category"]) == (401, "INVALID_AUTHENTICATION")


def test_a_token_without_the_scope_is_403(hub: Hub) -> None:
    """MISSING_SCOPES names the scopes that are needed."""
    minted = hub.control.grant(hub.client_id, scopes=["contacts"])
    answer = hub.call(minted.access_token)
    assert (answer.status_code, answer.json()["category"]) == (403, "MISSING_SCOPES")
    assert answer.json()["errors"][0]["context"]["requiredGranularScopes"] == ["oauth"]


def test_a_moving_account_answers_477(hub: Hub) -> None:
    """While an account changes data centre the API says when to come back."""
    minted = hub.control.grant(hub.client_id, account="101")
    hub.control.change_account("101", migrating=3600)
    answer = hub.call(minted.access_token)
    assert (answer.status_code, answer.headers["Retry-After"]) == (477, "3600")


def test_the_token_endpoint_can_be_throttled(hub: Hub) -> None:
    """Beyond the set number of requests in a second the answer is 429 without Retry-After."""
    token = hub.control.grant(hub.client_id).refresh_token
    hub.control.settings(token_requests_per_second=1)
    answers = [hub.refresh(token) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert answers[1].json()["message"] == "You have reached your rate limit."
    assert "Retry-After" not in answers[1].headers
    hub.whole.advance(1.1)
    assert hub.refresh(token).status_code == 200


@pytest.mark.parametrize(
    "uri", ["http://broker.example/callback", "https://192.0.2.7/cb", "http://127.0.0.1/cb"]
)
def test_redirect_urls_need_https_and_a_domain_name(hub: Hub, uri: str) -> None:
    """Plain http is for localhost, and an address is no domain name; a test may lift both."""
    with pytest.raises(ControlError, match="HubSpot takes"):
        hub.control.register_app("x", redirect_uris=[uri])
    hub.control.register_app("x", redirect_uris=[uri, "http://localhost:1/cb"], lenient_redirects=True)


def test_set_up_that_makes_no_sense_is_refused(hub: Hub) -> None:
    """The control port names what it does not know instead of ignoring it."""
    with pytest.raises(ControlError, match="unknown fields"):
        hub.control.register_app("x", colour="green")
    with pytest.raises(ControlError, match="hub id is a number"):
        hub.control.add_account(id="acme")
    with pytest.raises(ControlError, match="no account"):
        hub.control.grant(hub.client_id, account="404")
    with pytest.raises(ControlError, match="app must be registered"):
        hub.control.grant("nobody")


def test_pkce_can_be_demanded_and_is_s256_alone(hub: Hub) -> None:
    """An app may insist on a challenge; `plain` is not understood."""
    hub.control.change_app(hub.client_id, pkce_required=True)
    assert hub.consent().status == 400
    plain = hub.authorize_url(code_challenge=challenge(), code_challenge_method="plain")
    assert hub.control.consent(plain).status == 400
    assert hub.control.consent(hub.authorize_url(code_challenge=challenge())).answer("code")


def test_version_one_knows_no_dead_access_token(hub: Hub) -> None:
    """Asking for the metadata of an expired token is 404."""
    token = hub.control.grant(hub.client_id).access_token
    hub.whole.advance(1801)
    assert requests.get(f"{hub.url}/oauth/v1/access-tokens/{token}", timeout=TIMEOUT).status_code == 404
