"""The whole program on a fresh database, with both vendors emulated: what flow tests stand on."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from app.access.callers import Added
from app.access.permissions import Permission
from app.bootstrap import Services, bootstrap, prepare_database
from app.broker.connection import Connection
from app.settings import Settings, load
from app.web.application import create_app
from emulator import Emulator
from tests.access_stage import JumpingClock

PUBLIC_URL = "https://broker.example"
HUBSPOT_APP = "hub-client"
SALESFORCE_APP = "force-client"
SECRET = "the-client-secret"
HUBSPOT_SCOPES = ("oauth", "contacts")


@dataclass
class Answer:
    """One answer with the questions tests ask of it."""

    raw: TestResponse

    @property
    def status(self) -> int:
        return self.raw.status_code

    @property
    def text(self) -> str:
        return self.raw.get_data(as_text=True)

    @property
    def json(self) -> Any:
        return self.raw.get_json(force=True)

    @property
    def code(self) -> str:
        """The code of a problem; fails where the answer is none."""
        assert self.raw.mimetype == "application/problem+json", (self.status, self.text)
        assert self.json["status"] == self.status
        return str(self.json["code"])

    def hidden(self, name: str) -> str:
        """The value of a hidden field of the page's first form that has it."""
        found = re.search(rf'name="{name}" value="([^"]*)"', self.text)
        assert found is not None, self.text
        return found[1]


@dataclass
class Stage:
    """A running broker without a server: services, application, emulated vendors."""

    services: Services
    app: Flask
    emulator: Emulator
    clock: JumpingClock
    callers: dict[str, Added] = field(default_factory=dict)

    def client(self) -> FlaskClient:
        """A browser or caller with a cookie jar of its own."""
        return self.app.test_client()

    def ask(
        self,
        path: str,
        *,
        method: str = "GET",
        caller: str | None = "caller",
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> Answer:
        """One request, by default of the caller that may everything."""
        sent = dict(headers or {})
        if caller is not None and "Authorization" not in sent:
            sent["Authorization"] = self.basic(caller)
        return Answer(self.client().open(path, method=method, headers=sent, buffered=True, **more))

    def basic(self, caller: str) -> str:
        """The Authorization header of a caller made by `add_caller`."""
        added = self.callers[caller]
        assert added.client_secret is not None
        pair = f"{added.caller.client_id}:{added.client_secret.reveal()}"
        return f"Basic {base64.b64encode(pair.encode()).decode()}"

    def add_caller(self, name: str, *permissions: str, **more: Any) -> Added:
        """A caller with these permissions."""
        allow = [Permission.parse(text) for text in permissions]
        self.callers[name] = self.services.callers.add(name, allow=allow, **more)
        return self.callers[name]

    def signed_in(self) -> FlaskClient:
        """A browser with an admin session."""
        client = self.client()
        token, _ = self.services.admins.make_login()
        answer = client.post("/admin/login", data={"token": token.reveal()})
        assert answer.status_code == 303, answer.get_data(as_text=True)
        return client

    def connect(self, provider: str = "hubspot", *, name: str | None = None, **choice: Any) -> Connection:
        """Connect an account through the real redirects, as an admin in a browser."""
        client = self.signed_in()
        back = self.go_through(client, provider, name=name, **choice)
        assert back.status == 200, back.text
        found = re.search(r"<dt>Connection</dt><dd>([^<]+)</dd>", back.text)
        assert found is not None
        return self.services.store.named(found[1])

    def go_through(
        self, client: FlaskClient, provider: str, *, name: str | None = None, query: str = "", **choice: Any
    ) -> Answer:
        """The trip of a signed-in browser; the callback's answer."""
        location = self.begin(client, provider, name=name, query=query)
        return Answer(client.get(self.approve(provider, location, **choice)))

    def begin(self, client: FlaskClient, provider: str, *, name: str | None = None, query: str = "") -> str:
        """Press the button; where the browser is sent."""
        page = Answer(client.get(f"/connect/{provider}{query or (f'?name={name}' if name else '')}"))
        assert page.status == 200, page.text
        fields = dict(re.findall(r'name="(csrf|app|name|connection|link)" value="([^"]*)"', page.text))
        started = client.post(f"/connect/{provider}", data=fields)
        assert started.status_code == 303, started.get_data(as_text=True)
        return started.headers["Location"]

    def approve(self, provider: str, location: str, **choice: Any) -> str:
        """Give (or with approve=False refuse) consent; the callback's path and query."""
        consent = getattr(self.emulator.control, provider).consent(location, **choice)
        assert consent.location is not None, consent.body
        assert consent.location.startswith(PUBLIC_URL)
        return str(consent.location.removeprefix(PUBLIC_URL))


def environment(emulator: Emulator, database_url: str, state_dir: Path, **more: str) -> dict[str, str]:
    """The settings of a broker whose providers are the emulated ones."""
    plain = {
        "DATABASE_URL": database_url,
        "STATE_DIR": str(state_dir),
        "PUBLIC_URL": PUBLIC_URL,
        "ALLOW_LOOPBACK_PROVIDERS": "true",
        "HUBSPOT_CLIENT_ID": HUBSPOT_APP,
        "HUBSPOT_CLIENT_SECRET": SECRET,
        "HUBSPOT_SCOPES": " ".join(HUBSPOT_SCOPES),
        "HUBSPOT_OPTIONAL_SCOPES": "companies",
        "HUBSPOT_API_URL": emulator.hubspot.url,
        "HUBSPOT_AUTHORIZE_URL": f"{emulator.hubspot.url}/oauth/authorize",
        "SALESFORCE_CLIENT_ID": SALESFORCE_APP,
        "SALESFORCE_CLIENT_SECRET": SECRET,
        "SALESFORCE_LOGIN_URL": emulator.salesforce.url,
        "SALESFORCE_SCOPES": "api refresh_token",
        "PROVIDER_TIMEOUT_SECONDS": "5",
        "LEASE_SECONDS": "16",
    }
    return {f"DRAWBRIDGE_{name}": value for name, value in (plain | more).items()}


def populate(emulator: Emulator) -> None:
    """An empty world with one app at each vendor, two portals and one org."""
    control = emulator.control
    control.reset("all")
    control.hubspot.register_app(
        HUBSPOT_APP,
        secrets=[SECRET],
        redirect_uris=[f"{PUBLIC_URL}/connect/hubspot/callback"],
        scopes=list(HUBSPOT_SCOPES),
        optional_scopes=["companies"],
    )
    for id_, domain in (("101", "acme.example"), ("102", "globex.example")):
        control.hubspot.add_account(id=id_, domain=domain, users=[{"id": f"{id_}1", "name": f"ada@{domain}"}])
    control.salesforce.register_app(
        SALESFORCE_APP,
        secrets=[SECRET],
        redirect_uris=[f"{PUBLIC_URL}/connect/salesforce/callback"],
        scopes=["api", "refresh_token"],
        pkce_required=True,
    )
    control.salesforce.add_account(
        id="00Dxx0000001gPF", domain="acme.example", users=[{"name": "ada@acme.example"}]
    )


@contextmanager
def staged(emulator: Emulator, database_url: str, state_dir: Path, **more: str) -> Iterator[Stage]:
    """Bring everything up, with one caller that may everything, and down again."""
    populate(emulator)
    clock = JumpingClock()
    settings: Settings = load(environment(emulator, database_url, state_dir, **more), config_file=None)
    prepare_database(settings, clock=clock)
    services = bootstrap(settings, kind="web", clock=clock)
    services.start()
    try:
        stage = Stage(services, create_app(services), emulator, clock)
        everything = (
            "token:issue@*",
            "connection:read@*",
            "connection:manage@*",
            "sync:read@*",
            "sync:write@*",
        )
        stage.add_caller("caller", *everything, rate=10_000)
        yield stage
    finally:
        services.close()
