"""Independent clients against the emulated vendors: Authlib, simple-salesforce and curl."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import requests
from authlib.integrations.base_client import OAuthError
from authlib.integrations.requests_client import OAuth2Session
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from requests.adapters import HTTPAdapter
from simple_salesforce import Salesforce, SalesforceExpiredSession, SalesforceLogin
from simple_salesforce.exceptions import SalesforceAuthenticationFailed

from tests.contract.emulated import CALLBACK, SECRET, TIMEOUT, VERIFIER, Force, Hub

ORG = "00Dxx0000001gPFEAY"


@pytest.fixture
def _http_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Authlib speak plain HTTP, which it refuses otherwise."""
    monkeypatch.setenv("AUTHLIB_INSECURE_TRANSPORT", "1")


@pytest.mark.usefixtures("_http_allowed")
def test_authlib_runs_the_whole_hubspot_flow(hub: Hub) -> None:
    """Code with PKCE, refresh, introspection and revocation with a client that knows nothing of HubSpot."""
    root = f"{hub.url}/oauth/2026-09/token"
    session = OAuth2Session(
        hub.client_id,
        SECRET,
        token_endpoint_auth_method="client_secret_post",
        revocation_endpoint_auth_method="client_secret_post",
        redirect_uri=CALLBACK,
        scope="oauth contacts",
        code_challenge_method="S256",
    )
    url, state = session.create_authorization_url(f"{hub.url}/oauth/authorize", code_verifier=VERIFIER)
    callback = hub.control.consent(url, account="101").location
    token = session.fetch_token(root, authorization_response=callback, state=state, code_verifier=VERIFIER)
    assert (token["hub_id"], token["expires_in"]) == (101, 1800)
    renewed = session.refresh_token(root, refresh_token=token["refresh_token"])
    assert renewed["access_token"] != token["access_token"]
    details = session.get(f"{hub.url}/account-info/2026-09/details", timeout=TIMEOUT)
    assert details.json()["portalId"] == 101
    seen = session.introspect_token(
        f"{root}/introspect", token=renewed["access_token"], token_type_hint="access_token"
    )
    assert seen.json()["active"] is True
    assert session.revoke_token(f"{root}/revoke", token=token["refresh_token"]).status_code == 200
    with pytest.raises(OAuthError, match="invalid_grant"):
        session.refresh_token(root, refresh_token=token["refresh_token"])


@pytest.mark.usefixtures("_http_allowed")
def test_authlibs_default_basic_authentication_fails_at_hubspot(hub: Hub) -> None:
    """The pitfall clients fell into when their library switched to the Basic header."""
    session = OAuth2Session(hub.client_id, SECRET)
    minted = hub.control.grant(hub.client_id)
    with pytest.raises(OAuthError, match="missing or unknown client id"):
        session.refresh_token(f"{hub.url}/oauth/2026-09/token", refresh_token=minted.refresh_token)


@pytest.mark.usefixtures("_http_allowed")
def test_authlib_runs_the_whole_salesforce_flow(force: Force) -> None:
    """Code with PKCE, rotating refresh, introspection and revocation with a generic client."""
    force.control.change_app(force.client_id, rotation=True, pkce_required=True)
    root = f"{force.url}/services/oauth2"
    session = OAuth2Session(
        force.client_id,
        SECRET,
        redirect_uri=CALLBACK,
        scope="api refresh_token",
        code_challenge_method="S256",
    )
    url, state = session.create_authorization_url(f"{root}/authorize", code_verifier=VERIFIER)
    callback = force.control.consent(url).location
    token = session.fetch_token(
        f"{root}/token", authorization_response=callback, state=state, code_verifier=VERIFIER
    )
    assert "expires_in" not in token
    renewed = session.refresh_token(f"{root}/token", refresh_token=token["refresh_token"])
    assert renewed["refresh_token"] != token["refresh_token"]
    assert session.get(f"{root}/userinfo", timeout=TIMEOUT).json()["organization_id"] == ORG
    seen = session.introspect_token(f"{root}/introspect", token=renewed["access_token"])
    assert seen.json()["username"] == "ada@acme.example"
    assert session.revoke_token(f"{root}/revoke", token=renewed["refresh_token"]).status_code == 200
    with pytest.raises(OAuthError, match="expired access/refresh token"):
        session.refresh_token(f"{root}/token", refresh_token=renewed["refresh_token"])


class Detour(HTTPAdapter):
    """Sends what is meant for Salesforce's hosts to the emulator; the client itself stays untouched."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url

    def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        request.url = self._url + request.path_url
        return super().send(request, **kwargs)


@pytest.fixture
def detour(force: Force) -> requests.Session:
    """Give a session whose https requests all end at the emulator."""
    session = requests.Session()
    session.mount("https://", Detour(force.url))
    return session


def test_simple_salesforce_logs_in_with_a_signed_assertion(force: Force, detour: requests.Session) -> None:
    """Its JWT login and its REST calls work, though it sends exp as a string."""
    key = generate_private_key(public_exponent=65537, key_size=2048)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public = key.public_key().public_bytes(serialization.Encoding.PEM, form).decode()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    force.control.change_app(force.client_id, jwt_public_key=public)
    client = Salesforce(
        username="ada@acme.example",
        consumer_key=force.client_id,
        privatekey=private.decode(),
        session=detour,
        version="66.0",
    )
    assert client.query("SELECT COUNT() FROM Account")["totalSize"] == 3
    assert [seen.grant_type for seen in force.control.requests()] == [
        "urn:ietf:params:oauth:grant-type:jwt-bearer"
    ]


def test_simple_salesforce_logs_in_with_client_credentials(force: Force, detour: requests.Session) -> None:
    """Its Basic header is accepted on My Domain and its error is ours."""
    force.control.change_app(force.client_id, run_as="bob@acme.example")
    login = {"consumer_key": force.client_id, "domain": "acme.my", "session": detour}
    session_id, instance = SalesforceLogin(consumer_secret=SECRET, **login)
    assert session_id.startswith(f"{ORG[:15]}!")
    assert f"http://{instance}" == force.url
    with pytest.raises(SalesforceAuthenticationFailed, match="invalid client credentials"):
        SalesforceLogin(consumer_secret="wrong", **login)


def test_simple_salesforce_uses_a_token_of_the_web_flow(force: Force, detour: requests.Session) -> None:
    """Queries, records, describe and limits work with a handed-out session, and its death is recognised."""
    minted = force.control.grant(force.client_id, account=ORG)
    client = Salesforce(
        instance_url=minted.instance_url, session_id=minted.access_token, session=detour, version="66.0"
    )
    found = client.query("SELECT Id, LastName FROM Contact LIMIT 2")
    assert (found["totalSize"], found["done"]) == (2, True)
    record_id = found["records"][0]["Id"]
    assert client.Contact.get(record_id)["LastName"] == found["records"][0]["LastName"]
    assert client.Account.describe()["name"] == "Account"
    assert client.limits()["DailyApiRequests"]["Max"] == 15000
    assert {each["name"] for each in client.describe()["sobjects"]} == {"Account", "Contact"}
    force.whole.advance(7201)
    with pytest.raises(SalesforceExpiredSession):
        client.query("SELECT COUNT() FROM Account")


def test_curl_refreshes_and_reads(force: Force, tmp_path: Path) -> None:
    """A client that is no Python at all gets a token and uses it."""
    curl = shutil.which("curl")
    assert curl is not None, "curl is part of what the contract tests need"
    minted = force.control.grant(force.client_id, account=ORG)
    form = f"grant_type=refresh_token&refresh_token={minted.refresh_token}&client_id={force.client_id}"
    (tmp_path / "form").write_text(f"{form}&client_secret={SECRET}")
    command = [curl, "--silent", "--show-error", "--fail", "--max-time", "10"]
    answer = subprocess.run(
        [*command, "--data", f"@{tmp_path / 'form'}", f"{force.url}/services/oauth2/token"],
        capture_output=True,
        check=True,
    )
    token = json.loads(answer.stdout)["access_token"]
    limits = subprocess.run(
        [*command, "--header", f"Authorization: Bearer {token}", f"{force.url}/services/data/v66.0/limits"],
        capture_output=True,
        check=True,
    )
    assert "DailyApiRequests" in json.loads(limits.stdout)
