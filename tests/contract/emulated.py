"""Plain HTTP to the emulated vendors, without any client library: what a test says and what it gets back."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode

import requests

from emulator import Consent, Control, Emulator, VendorControl

CALLBACK = "https://broker.example/callback"
HUBSPOT_APP = "hs-app"
SALESFORCE_APP = "3MVG9app"
SECRET = "first-secret"
VERIFIER = "a-verifier-of-at-least-forty-three-characters-0"
TIMEOUT = 20.0


def challenge(verifier: str = VERIFIER) -> str:
    """Return the S256 challenge of a verifier."""
    digest = hashlib.sha256(verifier.encode()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


@dataclass
class Hub:
    """One emulated HubSpot with a registered app, spoken to by hand."""

    emulator: Emulator
    version: str = "2026-09"
    client_id: str = HUBSPOT_APP
    asked: dict[str, str] = field(
        default_factory=lambda: {"scope": "oauth contacts", "optional_scope": "companies leads"}
    )

    @property
    def url(self) -> str:
        return self.emulator.hubspot.url

    @property
    def control(self) -> VendorControl:
        return self.emulator.control.hubspot

    @property
    def whole(self) -> Control:
        return self.emulator.control

    def authorize_url(self, *, hub: str | None = None, **changes: str | None) -> str:
        query = {
            "client_id": self.client_id,
            "redirect_uri": CALLBACK,
            "state": "s t&te",
            **self.asked,
            **changes,
        }
        path = "/oauth/authorize" if hub is None else f"/oauth/{hub}/authorize"
        kept = {name: value for name, value in query.items() if value is not None}
        return f"{self.url}{path}?{urlencode(kept, quote_via=quote, safe='')}"

    def consent(self, **choice: Any) -> Consent:
        return self.control.consent(self.authorize_url(), **choice)

    def token(self, version: str | None = None, **fields: str | None) -> requests.Response:
        form = {"client_id": self.client_id, "client_secret": SECRET, **fields}
        url = f"{self.url}/oauth/{version or self.version}/token"
        return requests.post(url, data=form, timeout=TIMEOUT, allow_redirects=False)

    def exchange(self, code: str | None, **fields: str | None) -> requests.Response:
        form = {"grant_type": "authorization_code", "code": code, "redirect_uri": CALLBACK, **fields}
        return self.token(**form)

    def refresh(self, token: str | None, **fields: str | None) -> requests.Response:
        return self.token(**{"grant_type": "refresh_token", "refresh_token": token, **fields})

    def ask(self, what: str, token: str | None, **fields: str | None) -> requests.Response:
        form = {"client_id": self.client_id, "client_secret": SECRET, "token": token, **fields}
        return requests.post(f"{self.url}/oauth/{self.version}/token/{what}", data=form, timeout=TIMEOUT)

    def call(
        self, token: str, path: str = "/account-info/2026-09/details", method: str = "GET"
    ) -> requests.Response:
        headers = {"Authorization": f"Bearer {token}"}
        return requests.request(method, f"{self.url}{path}", headers=headers, timeout=TIMEOUT)


@dataclass
class Force:
    """One emulated Salesforce with a registered app, spoken to by hand."""

    emulator: Emulator
    client_id: str = SALESFORCE_APP

    @property
    def url(self) -> str:
        return self.emulator.salesforce.url

    @property
    def control(self) -> VendorControl:
        return self.emulator.control.salesforce

    @property
    def whole(self) -> Control:
        return self.emulator.control

    def authorize_url(self, **changes: str | None) -> str:
        query = {
            "response_type": "code",
            "client_id": self.client_id,
            "redirect_uri": CALLBACK,
            "scope": "api refresh_token",
            "state": "xyz",
            "code_challenge": challenge(),
            "code_challenge_method": "S256",
            **changes,
        }
        kept = {name: value for name, value in query.items() if value is not None}
        return f"{self.url}/services/oauth2/authorize?{urlencode(kept)}"

    def consent(self, **choice: Any) -> Consent:
        return self.control.consent(self.authorize_url(), **choice)

    def post(self, what: str, **fields: str | None) -> requests.Response:
        return requests.post(
            f"{self.url}/services/oauth2/{what}", data=fields, timeout=TIMEOUT, allow_redirects=False
        )

    def token(self, **fields: str | None) -> requests.Response:
        return self.post("token", **{"client_id": self.client_id, "client_secret": SECRET, **fields})

    def exchange(self, code: str | None, **fields: str | None) -> requests.Response:
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": CALLBACK,
            "code_verifier": VERIFIER,
        }
        return self.token(**{**form, **fields})

    def refresh(self, token: str | None, **fields: str | None) -> requests.Response:
        return self.token(**{"grant_type": "refresh_token", "refresh_token": token, **fields})

    def ask(self, what: str, token: str | None) -> requests.Response:
        return self.post(what, client_id=self.client_id, client_secret=SECRET, token=token)

    def call(self, token: str, path: str = "/services/data/v66.0/limits") -> requests.Response:
        headers = {"Authorization": f"Bearer {token}"}
        return requests.get(f"{self.url}{path}", headers=headers, timeout=TIMEOUT)
