"""The control port: what it refuses, what it changes, what it remembers."""

from collections.abc import Callable

import pytest
import requests
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from emulator import Control, ControlError
from tests.contract.emulated import CALLBACK, SECRET, TIMEOUT, Force, Hub


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda control: control.call("GET", "/control/pipedrive/settings"), "no vendor 'pipedrive'"),
        (lambda control: control.call("POST", "/control/clock", body=[1]), "a JSON object is needed"),
        (lambda control: control.call("POST", "/control/clock", body={}), "advance is missing"),
        (lambda control: control.hubspot.change_app("nobody", rotation=True), "no app 'nobody'"),
        (lambda control: control.hubspot.register_app("x", scopes="oauth"), "scopes is a list of strings"),
        (
            lambda control: control.hubspot.register_app("x", refresh_policy="never"),
            "refresh_policy is one of",
        ),
        (lambda control: control.hubspot.change_account("404", active=False), "no account '404'"),
        (lambda control: control.hubspot.change_account("101", id="9"), "cannot change \\['id'\\]"),
        (lambda control: control.hubspot.change_user("101", "9", active=False), "no user '9'"),
        (lambda control: control.hubspot.add_user("101", id="ada"), "user id is a number"),
        (lambda control: control.hubspot.add_user("101", mail="ada"), "unknown fields \\['mail'\\]"),
        (lambda control: control.hubspot.add_user("101"), "missing 1 required positional"),
        (lambda control: control.hubspot.grant("hs-app", colour=1), "unknown fields \\['colour'\\]"),
        (lambda control: control.hubspot.grant_many("hs-app", 0), "count within"),
        (lambda control: control.salesforce.add_account(id="00D"), "15 or 18 characters"),
        (lambda control: control.salesforce.add_account(id="001xx0000001gPF"), "begins with 00D"),
        (lambda control: control.salesforce.register_app("x", jwt_public_key="rubbish"), "no PEM"),
        (lambda control: control.revoke("nothing"), "no grant"),
        (lambda control: control.reset("kitchen"), "what is counters, faults or all"),
    ],
)
def test_nonsense_is_refused_by_name(hub: Hub, ask: Callable[[Control], object], says: str) -> None:
    """Every refusal is a 422 that says what was wrong, so that no test runs on a world it did not get."""
    with pytest.raises(ControlError, match=says) as refused:
        ask(hub.whole)
    assert ": 422 " in str(refused.value)


def test_a_grant_that_does_not_exist_is_an_error(hub: Hub) -> None:
    """The client itself says so, because a filter that fits nothing is no mistake to the emulator."""
    with pytest.raises(ControlError, match="no grant"):
        hub.whole.grant("nothing")


def test_an_elliptic_curve_key_is_no_rsa_key(force: Force) -> None:
    """Only RSA keys can check RS256."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem = key.public_bytes(serialization.Encoding.PEM, form).decode()
    with pytest.raises(ControlError, match="not an RSA key"):
        force.control.change_app(force.client_id, jwt_public_key=pem)


def test_the_world_can_be_read_back(hub: Hub) -> None:
    """Settings, apps and accounts are returned as they stand, and a vendor knows its own address."""
    assert hub.control.settings()["token_lifetime"] == 1800
    assert hub.control.settings(token_lifetime=60)["token_lifetime"] == 60
    (app,) = hub.whole.call("GET", "/control/hubspot/apps")
    assert (app["client_id"], app["secrets"], app["redirect_uris"]) == (hub.client_id, [SECRET], [CALLBACK])
    assert [account["id"] for account in hub.control.accounts()] == ["101", "102"]
    assert hub.control.url == hub.url


def test_users_can_be_added_with_and_without_an_id(hub: Hub, force: Force) -> None:
    """Ids that are not given are made in the vendor's form."""
    assert hub.control.add_user("101", id="12", name="eve@acme.example")["id"] == "12"
    made = hub.control.add_user("101", name="pat@acme.example")
    assert made["id"].isdigit()
    assert hub.control.grant(hub.client_id, account="101", user="pat@acme.example").user == made["id"]
    account = force.control.add_account(domain="new.example")
    added = force.control.add_user(account["id"], name="pat@new.example")
    assert (len(added["id"]), added["id"][:3], account["id"][:3]) == (18, "005", "00D")


def test_a_grant_is_found_by_the_short_form_of_an_org_id(force: Force) -> None:
    """An org is the same by 15 and by 18 characters."""
    minted = force.control.grant(force.client_id, account="00Dxx0000001gPF")
    assert minted.account == "00Dxx0000001gPFEAY"


def test_faults_can_be_lifted_without_touching_the_world(hub: Hub) -> None:
    """Resetting faults leaves grants and counters; resetting all leaves nothing."""
    minted = hub.control.grant(hub.client_id)
    hub.control.misbehave("drop")
    hub.whole.reset("faults")
    assert hub.refresh(minted.refresh_token).status_code == 200
    hub.whole.reset("all")
    assert hub.whole.grants() == []
    assert hub.refresh(minted.refresh_token).json()["status"] == "BAD_CLIENT_ID"


def test_a_consent_that_cannot_be_given_is_an_error(hub: Hub, force: Force) -> None:
    """Choosing an account that the page does not offer fails in the test, a forged choice at the vendor."""
    with pytest.raises(ControlError, match="offers no account"):
        hub.consent(account="404")
    form = {"choice": "404:1", "decision": "approve"}
    forged = requests.post(hub.authorize_url(), data=form, timeout=TIMEOUT, allow_redirects=False)
    assert (forged.status_code, "Location" in forged.headers) == (400, False)
    forged = requests.post(force.authorize_url(), data=form, timeout=TIMEOUT, allow_redirects=False)
    assert (forged.status_code, "Location" in forged.headers) == (400, False)


def test_only_the_newest_access_tokens_of_a_grant_are_remembered(hub: Hub) -> None:
    """A bench that refreshes for ever does not fill the memory: the oldest tokens are forgotten."""
    minted = hub.control.grant(hub.client_id)
    for _ in range(200):
        assert hub.refresh(minted.refresh_token).status_code == 200
    assert len(hub.whole.grant(minted.grant_id).access) == 200
    assert hub.call(minted.access_token).json()["category"] == "INVALID_AUTHENTICATION"
