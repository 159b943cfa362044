"""What is HubSpot's own, against the emulated HubSpot."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from app.errors import InvalidRequest, ProviderMisconfigured, ProviderUnavailable
from app.oauth2 import handshake
from app.oauth2.outcomes import MAX_RETRY_AFTER, Granted, Misconfigured, Refused, Unavailable
from app.oauth2.provider import App, Grant
from app.providers.hubspot import HubSpot
from app.secret import Secret
from emulator.control import Control
from tests.contract.provider_stages import (
    CLIENT_ID,
    EmulatorStage,
    closed_port_url,
    emulator_control,
    grant_of,
)


@pytest.fixture(scope="module")
def emulator() -> Iterator[Control]:
    """Run one emulator for all tests here; each stage empties it."""
    with emulator_control() as control:
        yield control


@pytest.fixture
def stage(emulator: Control) -> EmulatorStage:
    """Put HubSpot on its stage."""
    return EmulatorStage(HubSpot(), emulator, url=emulator.hubspot.url)


def having(app: App, **options: Any) -> App:
    """Return the app with some options changed."""
    return replace(app, options={**app.options, **options})


def test_every_address_is_dated_and_the_date_is_an_option() -> None:
    """The dates of OAuth and of the other APIs move by option, without a change of code."""
    hubspot = HubSpot()
    app = App(id="a", provider="hubspot", name="default", client_id="c")
    assert hubspot.endpoint(app, "token") == "https://api.hubapi.com/oauth/2026-03/token"
    moved = replace(app, options=hubspot.load_options({"oauth_version": "2026-09"}))
    assert hubspot.endpoint(moved, "revoke") == "https://api.hubapi.com/oauth/2026-09/token/revoke"
    assert hubspot.endpoint(moved, "introspect") == "https://api.hubapi.com/oauth/2026-09/token/introspect"
    assert hubspot.endpoint(app, "authorize") == "https://app.hubspot.com/oauth/authorize"
    assert hubspot.hosts(app) == ("https://api.hubapi.com",)
    with pytest.raises(InvalidRequest, match="oauth_version"):
        hubspot.load_options({"oauth_version": "newest/../v1"})


def test_portal_is_the_identity_whoever_installs(stage: EmulatorStage) -> None:
    """Another user of the portal connects the same connection, and no user is named."""
    portal = stage.accounts[0]
    colleague = stage.vendor.add_user(portal, name="colleague@customer.example")
    first = stage.provider.identify(stage.app, stage.connect(account=portal), wire=stage.wire())
    verifier = handshake.new_verifier()
    url = stage.provider.authorize_url(stage.app, state="s", challenge=handshake.challenge(verifier))
    consent = stage.vendor.consent(url, account=portal, user=colleague["id"])
    code = Secret(consent.answer("code") or "")
    granted = stage.provider.exchange(stage.app, code=code, verifier=verifier, wire=stage.wire())
    assert isinstance(granted, Granted)
    second = stage.provider.identify(stage.app, granted, wire=stage.wire())
    assert first.identity == second.identity == portal
    assert first.user_id == second.user_id == ""


def test_details_tell_the_region_and_nobodys_address(stage: EmulatorStage) -> None:
    """Hublet, install and app are kept; e-mail address and web domain are not."""
    portal = stage.accounts[0]
    stage.vendor.change_account(portal, hublet="eu1", domain="customer-domain.example")
    account = stage.provider.identify(stage.app, stage.connect(account=portal), wire=stage.wire())
    assert account.details["hublet"] == "eu1"
    assert account.details["app_id"] == stage.app_id
    assert "@" not in repr(account)
    assert "customer-domain" not in repr(account)


def test_token_of_another_app_is_refused_at_connect(stage: EmulatorStage) -> None:
    """With an app id configured, a token of another app is a clear error and the right one passes."""
    granted = stage.connect()
    right, wrong = having(stage.app, app_id=stage.app_id), having(stage.app, app_id="1")
    assert stage.provider.identify(right, granted, wire=stage.wire()).account_id == stage.accounts[0]
    with pytest.raises(ProviderMisconfigured, match=stage.app_id):
        stage.provider.identify(wrong, granted, wire=stage.wire())


def test_inactive_token_is_not_taken_for_an_account(stage: EmulatorStage) -> None:
    """Introspection answers 200 for a token it does not know: `active` decides."""
    granted = stage.connect()
    stage.vendor.misbehave("inactive", endpoint="introspect", count=1)
    with pytest.raises(ProviderUnavailable):
        stage.provider.identify(stage.app, granted, wire=stage.wire())


def test_user_level_app_has_an_identity_per_user(stage: EmulatorStage) -> None:
    """A user-level app names the user, and connecting one without the option is a clear error."""
    stage.vendor.change_app(CLIENT_ID, user_level=True)
    granted = stage.connect()
    with pytest.raises(ProviderMisconfigured, match="user_level"):
        stage.provider.identify(stage.app, granted, wire=stage.wire())
    app = replace(
        stage.app, options={**stage.app.options, **stage.provider.load_options({"user_level": "yes"})}
    )
    account = stage.provider.identify(app, granted, wire=stage.wire())
    assert account.user_id
    assert account.identity == f"{account.account_id}:{account.user_id}"
    assert stage.provider.account_told(app, granted) == replace(account, details={})


def test_optional_scopes_are_asked_for_apart_and_may_stay_away(stage: EmulatorStage) -> None:
    """An account without an optional scope installs all the same, and the granted scopes say so."""
    stage.vendor.change_app(CLIENT_ID, optional_scopes=["tickets", "sales-email-read"])
    stage.vendor.change_account(stage.accounts[0], scopes=[*stage.app.scopes, "tickets"])
    stage.app = replace(stage.app, optional_scopes=("tickets", "sales-email-read"))
    url = stage.provider.authorize_url(stage.app, state="s", challenge="c")
    query = parse_qs(urlsplit(url).query)
    assert query["scope"] == ["oauth crm.objects.contacts.read"]
    assert query["optional_scope"] == ["tickets sales-email-read"]
    assert "optional_scope=tickets%20sales-email-read" in url
    granted = stage.connect(account=stage.accounts[0])
    assert granted.scopes is not None
    assert set(granted.scopes) == {*stage.app.scopes, "tickets"}


def test_pkce_can_be_switched_off(stage: EmulatorStage) -> None:
    """Without PKCE neither half of the pair is sent, and connecting works all the same."""
    stage.app = having(stage.app, pkce=False)
    assert "code_challenge" not in stage.provider.authorize_url(stage.app, state="s", challenge="c")
    assert stage.connect().access_token


def test_wrong_verifier_is_nobodys_dead_grant(stage: EmulatorStage) -> None:
    """With PKCE, as by default, the pair is checked; a mismatch blames the set-up."""
    url = stage.provider.authorize_url(
        stage.app, state="s", challenge=handshake.challenge(handshake.new_verifier())
    )
    code = Secret(stage.consent(url)["code"])
    outcome = stage.provider.exchange(
        stage.app, code=code, verifier=handshake.new_verifier(), wire=stage.wire()
    )
    assert outcome == Misconfigured("code_verifier_refused", whole_app=False)


def test_uninstall_takes_the_grant_along(stage: EmulatorStage) -> None:
    """Uninstalling with the access token is done at once; the refresh token is refused from then on."""
    granted = stage.connect()
    assert stage.provider.uninstall(stage.app, granted.access_token, wire=stage.wire()) == "done"
    assert isinstance(stage.provider.refresh(stage.app, grant_of(granted), wire=stage.wire()), Refused)
    assert stage.provider.uninstall(stage.app, Secret("unknown"), wire=stage.wire()) == "impossible"
    stage.vendor.misbehave("status", endpoint="api", status=503, count=1)
    assert stage.provider.uninstall(stage.app, granted.access_token, wire=stage.wire()) == "retry"


@pytest.mark.parametrize("style", ["old", "new"])
def test_closed_account_is_a_refusal_in_both_styles(stage: EmulatorStage, style: str) -> None:
    """BAD_HUB is this account's end whether or not the body has RFC 6749 fields."""
    granted = stage.connect(account=stage.accounts[0])
    stage.vendor.settings(error_style=style)
    stage.vendor.change_account(stage.accounts[0], active=False)
    outcome = stage.provider.refresh(stage.app, grant_of(granted), wire=stage.wire())
    assert outcome == Refused("account_gone")


@pytest.mark.parametrize("style", ["old", "new"])
def test_wrong_secret_is_recognised_in_both_styles(stage: EmulatorStage, style: str) -> None:
    """Without an `error` the `status` alone says that the secret is wrong."""
    granted = stage.connect()
    stage.vendor.settings(error_style=style)
    outcome = stage.provider.refresh(stage.with_secrets("wrong"), grant_of(granted), wire=stage.wire())
    assert outcome == Misconfigured("client_secret_refused")


def test_token_of_another_client_keeps_the_grant(stage: EmulatorStage) -> None:
    """A refresh token under a foreign client id is a mix-up to be cleared, not a dead grant."""
    granted = stage.connect()
    stage.vendor.register_app("other-client", secrets=["other"], scopes=["oauth"])
    other = replace(stage.app, client_id="other-client", secrets=(Secret("other"),))
    outcome = stage.provider.refresh(other, grant_of(granted), wire=stage.wire())
    assert outcome == Misconfigured("token_of_another_client", whole_app=False)
    assert isinstance(stage.provider.refresh(stage.app, grant_of(granted), wire=stage.wire()), Granted)


def test_account_on_the_move_is_unavailable(stage: EmulatorStage) -> None:
    """HubSpot's 477 asks for up to a day; we look again after our own limit."""
    granted = stage.connect()
    stage.vendor.misbehave("status", status=477, retry_after=86400, count=1)
    outcome = stage.provider.refresh(stage.app, grant_of(granted), wire=stage.wire())
    assert outcome == Unavailable("migrating", MAX_RETRY_AFTER, whole_app=False)


def test_only_the_refresh_token_can_be_given_back(stage: EmulatorStage) -> None:
    """HubSpot knows no way to revoke an access token."""
    grant = Grant("authorization_code", access_token=stage.connect().access_token)
    assert stage.provider.revoke(stage.app, grant, wire=stage.wire()) == "impossible"


def test_other_grants_are_not_offered(stage: EmulatorStage) -> None:
    """An account's token comes by consent alone."""
    with pytest.raises(InvalidRequest, match="jwt_bearer"):
        stage.provider.check_grant(stage.app, Grant("jwt_bearer"))


@pytest.mark.parametrize(
    ("changed", "raised"),
    [
        ({"client_id": "somebody-else"}, ProviderMisconfigured),
        ({"hub_id": 1}, ProviderMisconfigured),
        ({"hub_id": None}, ProviderUnavailable),
        ({"hub_id": True}, ProviderUnavailable),
    ],
)
def test_introspection_that_contradicts_is_not_believed(
    stage: EmulatorStage, changed: dict[str, Any], raised: type[Exception]
) -> None:
    """Another client, another portal than the token answer named, or none at all: nothing is stored."""
    granted = stage.connect()
    stage.vendor.misbehave("edit", endpoint="introspect", count=1, set=changed)
    with pytest.raises(raised):
        stage.provider.identify(stage.app, granted, wire=stage.wire())


def test_account_on_the_move_is_not_identified(stage: EmulatorStage) -> None:
    """477 at introspection is a matter of time, not of the app's set-up."""
    granted = stage.connect()
    stage.vendor.misbehave("status", endpoint="introspect", status=477, retry_after=30, count=1)
    with pytest.raises(ProviderUnavailable) as caught:
        stage.provider.identify(stage.app, granted, wire=stage.wire())
    assert caught.value.retry_after == 30


def test_token_answer_may_name_nobody(stage: EmulatorStage) -> None:
    """Answers of before 2025-08 have neither portal nor scopes; introspection has both."""
    stage.vendor.misbehave("edit", count=1, omit=["hub_id", "user_id", "scopes"])
    granted = stage.connect()
    assert granted.scopes is None
    assert stage.provider.account_told(stage.app, granted) is None
    account = stage.provider.identify(stage.app, granted, wire=stage.wire())
    assert account.account_id == stage.accounts[0]
    assert set(account.scopes) == set(stage.app.scopes)


def test_uninstall_is_tried_again_when_nobody_answers(stage: EmulatorStage) -> None:
    """A provider that is away has uninstalled nothing."""
    away = having(stage.app, api_url=closed_port_url().removesuffix("/token"))
    wire = stage.wire(away)
    assert stage.provider.uninstall(away, Secret("a"), wire=wire) == "retry"


def test_identity_from_ids_alone_is_the_one_connecting_gives(stage: EmulatorStage) -> None:
    """An imported connection and a connected one are the same connection."""
    portal = stage.accounts[0]
    account = stage.provider.identify(stage.app, stage.connect(account=portal), wire=stage.wire())
    assert stage.provider.identity_of(stage.app, portal, "") == account.identity
    assert stage.provider.identity_of(having(stage.app, user_level=True), portal, "7") == f"{portal}:7"


@pytest.mark.parametrize(
    ("account_id", "user_id", "user_level"),
    [("na1-7", "", False), ("", "", False), ("7", "", True), ("7", "x", True)],
)
def test_identity_needs_the_ids_that_count(
    stage: EmulatorStage, account_id: str, user_id: str, user_level: bool
) -> None:
    """A portal is a number, and a user-level app needs the user's as well."""
    with pytest.raises(InvalidRequest):
        stage.provider.identity_of(having(stage.app, user_level=user_level), account_id, user_id)
