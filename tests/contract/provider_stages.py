"""Where a provider file is put to the test: a server that behaves, misbehaves on request, and knows the
truth.

`EmulatorStage` stands on the emulated HubSpot or Salesforce. `PlainStage` stands on an RFC 6749 server of a
hundred lines and takes any other provider file: its endpoints are moved there by the options every provider
understands.
"""

import base64
import secrets as random
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import parse_qs, unquote_plus, urlencode, urlsplit

import requests
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from app.clock import Clock
from app.http_client import Deadlines, HttpClient
from app.oauth2 import handshake
from app.oauth2.client import Wire
from app.oauth2.outcomes import Granted
from app.oauth2.provider import App, Grant, Provider
from app.secret import Secret
from emulator.control import Control

REDIRECT = "http://localhost:8000/callback"
CLIENT_ID = "conformance-client"
SECRET = "the-secret-in-force"
RETRY_AFTER = 7


def new_wire(provider: Provider, app: App, *, before_body: Callable[[], None] | None = None) -> Wire:
    """Make a wire to where this app's requests go, with deadlines no healthy answer comes near."""
    clock = Clock()
    http = HttpClient(clock, allow_loopback=True, provider_hosts=provider.hosts(app))
    return Wire(http, Deadlines(connect=5.0, read=10.0, total=20.0), clock, before_body)


def closed_port_url() -> str:
    """Return an address on this machine where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/token"


class Stage(ABC):
    """A provider, an app of it and the server behind; `app` knows the secret in force."""

    provider: Provider
    app: App
    accounts: tuple[str, str]

    @abstractmethod
    def consent(self, url: str, *, account: str | None = None) -> dict[str, str]:
        """Do what a person does with an authorize URL and return the callback's query."""

    @abstractmethod
    def misbehave(self, fault: str) -> None:
        """Let the next token request go wrong: one of FAULTS."""

    @abstractmethod
    def rotate(self) -> None:
        """Give a new refresh token at each refresh from now on, and honour each once."""

    @abstractmethod
    def kill(self, granted: Granted) -> None:
        """Revoke a grant at the provider."""

    @abstractmethod
    def seen(self) -> int:
        """Count the token requests that came in."""

    def wire(self, app: App | None = None) -> Wire:
        """Return a wire for the stage's own app, or for a changed one."""
        return new_wire(self.provider, app or self.app)

    def connect(self, *, account: str | None = None) -> Granted:
        """Walk through authorize and exchange."""
        verifier = handshake.new_verifier()
        url = self.provider.authorize_url(
            self.app, state=handshake.new_state(), challenge=handshake.challenge(verifier)
        )
        code = Secret(self.consent(url, account=account)["code"])
        outcome = self.provider.exchange(self.app, code=code, verifier=verifier, wire=self.wire())
        assert isinstance(outcome, Granted), outcome
        return outcome

    def with_secrets(self, *texts: str) -> App:
        """Return the app with other client secrets, newest first."""
        return replace(self.app, secrets=tuple(Secret(text) for text in texts))


def grant_of(granted: Granted) -> Grant:
    """Return what the broker would keep of an answer."""
    return Grant("authorization_code", refresh_token=granted.refresh_token, access_token=granted.access_token)


# name: kind and options of the emulator's fault
FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rate_limited": ("status", {"status": 429, "retry_after": RETRY_AFTER}),
    "unavailable": ("status", {"status": 503, "retry_after": RETRY_AFTER}),
    "server_error": ("status", {"status": 500}),
    "bad_gateway": ("status", {"status": 502}),
    "html": ("html", {"status": 200}),
    "redirect": ("redirect", {"status": 307}),
    "no_token": ("no_access_token", {}),
    "half_json": ("truncated", {"mode": "json"}),
    "cut_short": ("truncated", {"mode": "length"}),
    "lost": ("drop", {"when": "after"}),
    "odd_error": (
        "status",
        {"status": 400, "body": {"error": "brand_new", "error_description": "jane@x.example"}},
    ),
    "bare_400": ("status", {"status": 400, "body": {}}),
}


class EmulatorStage(Stage):
    """A provider on the emulator's vendor of the same name."""

    def __init__(self, provider: Provider, control: Control, *, url: str) -> None:
        vendor = control.hubspot if provider.name == "hubspot" else control.salesforce
        self.provider, self.control, self.vendor = provider, control, vendor
        control.reset("all")
        hubspot = provider.name == "hubspot"
        scopes = ("oauth", "crm.objects.contacts.read") if hubspot else ("api", "refresh_token")
        registration = vendor.register_app(
            CLIENT_ID, secrets=[SECRET], redirect_uris=[REDIRECT], scopes=list(scopes)
        )
        self.app_id = str(registration["app_id"])
        self.accounts = (str(vendor.add_account()["id"]), str(vendor.add_account()["id"]))
        options = (
            {"api_url": url, "authorize_url": f"{url}/oauth/authorize"} if hubspot else {"login_url": url}
        )
        self.app = App(
            id="a1",
            provider=provider.name,
            name="default",
            client_id=CLIENT_ID,
            secrets=(Secret(SECRET),),
            scopes=scopes,
            options=provider.load_options(options),
            redirect_uri=REDIRECT,
        )

    def consent(self, url: str, *, account: str | None = None) -> dict[str, str]:
        location = self.vendor.consent(url, account=account).location or ""
        return {name: values[0] for name, values in parse_qs(urlsplit(location).query).items()}

    def misbehave(self, fault: str) -> None:
        kind, options = FAULTS[fault]
        self.vendor.misbehave(kind, count=1, **options)

    def rotate(self) -> None:
        self.vendor.change_app(CLIENT_ID, rotation=True)

    def kill(self, granted: Granted) -> None:
        assert granted.refresh_token is not None
        digest = granted.refresh_token.sha256()
        grants = self.control.grants(vendor=self.provider.name)
        self.control.revoke(next(grant.id for grant in grants if grant.refresh_sha256 == digest))

    def seen(self) -> int:
        return len(self.vendor.requests())


@dataclass
class PlainServer:
    """An authorization server of RFC 6749, 7636, 7009 and 7662; credentials by Basic or in the body."""

    secrets: list[str | None] = field(default_factory=lambda: [SECRET])
    rotates: bool = False
    token_requests: int = 0
    fault: str | None = None
    codes: dict[str, tuple[str, str]] = field(default_factory=dict)
    refreshing: dict[str, str] = field(default_factory=dict)
    living: dict[str, str] = field(default_factory=dict)

    def serve(self, httpserver: HTTPServer) -> None:
        """Answer at the four endpoints."""
        httpserver.expect_request("/token", method="POST").respond_with_handler(self.token)
        httpserver.expect_request("/revoke", method="POST").respond_with_handler(self.revoke)
        httpserver.expect_request("/introspect", method="POST").respond_with_handler(self.introspect)
        httpserver.expect_request("/authorize").respond_with_handler(self.authorize)

    def authorize(self, request: Request) -> Response:
        """Approve at once, for the account named in the query."""
        code = random.token_urlsafe(16)
        self.codes[code] = (request.args["account"], request.args["code_challenge"])
        query = urlencode({"code": code, "state": request.args["state"]})
        return Response("", 302, {"Location": f"{request.args['redirect_uri']}?{query}"})

    def token(self, request: Request) -> Response:
        """Answer a token request, or misbehave once."""
        self.token_requests += 1
        fault, self.fault = self.fault, None
        kind, options = FAULTS.get(fault or "", ("", {}))
        if kind in ("status", "html", "redirect"):
            return _strange(kind, options)
        answer = self._honest(request)
        if kind == "drop":
            request.environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        if kind == "no_access_token":
            return _json({"token_type": "Bearer", "expires_in": 600})
        if kind == "truncated":
            return _half(answer, options["mode"])
        return answer

    def _honest(self, request: Request) -> Response:
        if not self._client_known(request):
            return _json({"error": "invalid_client"}, 401)
        if request.form["grant_type"] == "client_credentials":
            return self._issue("the-client-itself", None)
        if request.form["grant_type"] == "authorization_code":
            account, challenge = self.codes.pop(request.form["code"], ("", ""))
            verifier = Secret(request.form.get("code_verifier", ""))
            if not account or handshake.challenge(verifier) != challenge:
                return _json({"error": "invalid_grant"}, 400)
            return self._issue(account, random.token_urlsafe(16))
        old = request.form["refresh_token"]
        account = self.refreshing.get(old, "")
        if not account:
            return _json({"error": "invalid_grant"}, 400)
        if not self.rotates:
            return self._issue(account, None)
        del self.refreshing[old]
        return self._issue(account, random.token_urlsafe(16))

    def _issue(self, account: str, refresh_token: str | None) -> Response:
        access_token = random.token_urlsafe(16)
        self.living[access_token] = account
        answer = {
            "access_token": access_token,
            "token_type": "Bearer",
            "expires_in": 600,
            "scope": "read write",
        }
        if refresh_token is not None:
            self.refreshing[refresh_token] = account
            answer["refresh_token"] = refresh_token
        return _json(answer)

    def _client_known(self, request: Request) -> bool:
        client_id, secret = request.form.get("client_id"), request.form.get("client_secret")
        scheme, _, encoded = request.headers.get("Authorization", "").partition(" ")
        if scheme == "Basic":
            client_id, _, secret = (
                unquote_plus(part) for part in base64.b64decode(encoded).decode().partition(":")
            )
        return client_id == CLIENT_ID and secret in self.secrets

    def revoke(self, request: Request) -> Response:
        """Forget a token (RFC 7009); an unknown one is fine."""
        if not self._client_known(request):
            return _json({"error": "invalid_client"}, 401)
        self.refreshing.pop(request.form["token"], None)
        return Response("", 200)

    def introspect(self, request: Request) -> Response:
        """Describe an access token (RFC 7662)."""
        if not self._client_known(request):
            return _json({"error": "invalid_client"}, 401)
        account = self.living.get(request.form["token"])
        return _json({"active": True, "sub": account} if account else {"active": False})


def _json(data: Any, status: int = 200) -> Response:
    import json

    return Response(json.dumps(data), status, mimetype="application/json")


def _strange(kind: str, options: dict[str, Any]) -> Response:
    if kind == "html":
        return Response("<html>maintenance</html>", options["status"], mimetype="text/html")
    if kind == "redirect":
        return Response("", options["status"], {"Location": "/elsewhere"})
    answer = _json(options.get("body", {"message": "strange"}), options["status"])
    if "retry_after" in options:
        answer.headers["Retry-After"] = str(options["retry_after"])
    return answer


def _half(answer: Response, mode: str) -> Response:
    body = answer.get_data()
    cut = Response(body[: len(body) // 2], 200, mimetype="application/json")
    if mode == "length":
        cut.headers["Content-Length"] = str(len(body))
        cut.automatically_set_content_length = False
    return cut


class PlainStage(Stage):
    """Any provider file on the plain server."""

    def __init__(self, provider: Provider, httpserver: HTTPServer) -> None:
        self.provider, self.server = provider, PlainServer()
        self.server.serve(httpserver)
        self.accounts = ("acct-1", "acct-2")
        options = {f"{name}_endpoint": httpserver.url_for(f"/{name}") for name in (
            "authorize", "token", "introspect", "revoke")}  # fmt: skip
        self.app = App(
            id="a1",
            provider=provider.name,
            name="default",
            client_id=CLIENT_ID,
            secrets=(Secret(SECRET),),
            scopes=("read", "write"),
            options=provider.load_options(options),
            redirect_uri=REDIRECT,
        )

    def consent(self, url: str, *, account: str | None = None) -> dict[str, str]:
        answer = requests.get(
            url, params={"account": account or self.accounts[0]}, allow_redirects=False, timeout=10
        )
        query = urlsplit(answer.headers["Location"]).query
        return {name: values[0] for name, values in parse_qs(query).items()}

    def misbehave(self, fault: str) -> None:
        self.server.fault = fault

    def rotate(self) -> None:
        self.server.rotates = True

    def kill(self, granted: Granted) -> None:
        assert granted.refresh_token is not None
        del self.server.refreshing[granted.refresh_token.reveal()]

    def seen(self) -> int:
        return self.server.token_requests


@contextmanager
def emulator_control() -> Iterator[Control]:
    """Run an emulator without a world in it."""
    from emulator import running

    with running(config={}) as emulator:
        yield emulator.control
