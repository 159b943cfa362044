"""A typed client of the control port, for tests and benches; it works on another process just as well.

`Control(url)` speaks about the whole emulator, `Control.hubspot` and `Control.salesforce` about one vendor.
Every method raises `ControlError` with the emulator's own words when it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any
from urllib.parse import parse_qs, urlsplit

import requests

from emulator.model import VendorName

TIMEOUT = 60.0


class ControlError(RuntimeError):
    """The control port refused; the message is its own."""


@dataclass(frozen=True, slots=True)
class Minted:
    """A grant made without a browser, tokens in the clear. Times are the emulator's epoch seconds."""

    grant_id: str
    app: str
    account: str
    user: str
    scopes: list[str]
    access_token: str
    refresh_token: str | None
    issued_at: float
    expires_at: float
    instance_url: str

    def __repr__(self) -> str:
        return f"Minted(grant_id={self.grant_id!r}, account={self.account!r})"


@dataclass(frozen=True, slots=True)
class AccessTruth:
    """An access token as the vendor sees it; `state` is live, expired or revoked."""

    sha256: str
    issued_at: float
    expires_at: float
    revoked: str | None
    revoked_at: float
    state: str


@dataclass(frozen=True, slots=True)
class GrantTruth:
    """A grant as the vendor sees it; `live` speaks of its refresh token."""

    id: str
    vendor: str
    app: str
    account: str
    user: str
    scopes: list[str]
    kind: str
    created_at: float
    live: bool
    revoked: str | None
    revoked_at: float
    rotations: int
    voided: int
    refresh_sha256: str | None
    access: list[AccessTruth]


@dataclass(frozen=True, slots=True)
class SeenRequest:
    """A token request as it was received; see `emulator.ledger.TokenRequest`."""

    id: int
    at: float
    path: str
    grant_type: str | None
    app: str | None
    account: str | None
    user: str | None
    grant_id: str | None
    refresh_sha256: str | None
    concurrent_with: list[int]
    secret_index: int | None
    reuse: bool
    processed: bool
    outcome: str
    status: int | None
    faults: list[str]
    ended_at: float | None


@dataclass(frozen=True, slots=True)
class Totals:
    """Counters of one vendor. `calls` counts protected-resource calls by the state of their token."""

    endpoints: dict[str, int]
    outcomes: dict[str, int]
    calls: dict[str, int]
    reuses: int
    concurrent: int
    most_open: int
    open: int
    revocations: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Consent:
    """What came of a consent page: `location` is the callback, None when the vendor kept the user."""

    status: int
    body: str
    location: str | None

    def answer(self, name: str) -> str | None:
        """Return a query parameter of the callback."""
        values = parse_qs(urlsplit(self.location or "").query).get(name)
        return values[0] if values else None


class Control:
    """The whole emulator: both vendors, the clock, the truth."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.hubspot = VendorControl(self, "hubspot")
        self.salesforce = VendorControl(self, "salesforce")

    def call(self, method: str, path: str, *, body: Any = None, query: dict[str, Any] | None = None) -> Any:
        """Speak to the control port; ControlError for any answer but 2xx."""
        response = requests.request(method, f"{self.url}{path}", json=body, params=query, timeout=TIMEOUT)
        if not response.ok:
            raise ControlError(f"{method} {path}: {response.status_code} {response.text.strip()}")
        return response.json()

    def vendor(self, name: VendorName) -> VendorControl:
        """Return the client for one vendor by name."""
        return self.hubspot if name == "hubspot" else self.salesforce

    def health(self) -> dict[str, str]:
        """Return status and the vendors' addresses."""
        answer: dict[str, str] = self.call("GET", "/control/health")
        return answer

    def now(self) -> float:
        """Tell the emulator's time in epoch seconds."""
        return float(self.call("GET", "/control/clock")["now"])

    def advance(self, seconds: float) -> float:
        """Move the emulator's clock and return its time."""
        return float(self.call("POST", "/control/clock", body={"advance": seconds})["now"])

    def grants(self, **query: str) -> list[GrantTruth]:
        """List grants as they really are; filter by vendor, app, account, user, id."""
        found = self.call("GET", "/control/grants", query=query)
        return [
            GrantTruth(**{**each, "access": [AccessTruth(**item) for item in each["access"]]})
            for each in found
        ]

    def grant(self, grant_id: str) -> GrantTruth:
        """Return one grant as it really is; ControlError when there is none."""
        found = self.grants(id=grant_id)
        if not found:
            raise ControlError(f"no grant {grant_id!r}")
        return found[0]

    def revoke(
        self, grant_id: str, *, reason: str = "revoked by control", access_tokens: bool = True
    ) -> None:
        """Kill a grant, by default with its access tokens."""
        body = {"reason": reason, "access_tokens": access_tokens}
        self.call("POST", f"/control/grants/{grant_id}/revoke", body=body)

    def reset(self, what: str = "counters") -> None:
        """Reset `counters`, lift all `faults`, or forget `all` including the world and settings."""
        self.call("POST", "/control/reset", body={"what": what})


class VendorControl:
    """One vendor's part of the control port."""

    def __init__(self, control: Control, name: VendorName) -> None:
        self._control = control
        self.name = name

    @property
    def url(self) -> str:
        """The vendor's own address."""
        return self._control.health()[self.name]

    def _call(self, method: str, path: str, *, body: Any = None, query: dict[str, Any] | None = None) -> Any:
        return self._control.call(method, f"/control/{self.name}{path}", body=body, query=query)

    def settings(self, **changes: Any) -> dict[str, Any]:
        """Change vendor-wide settings, if any are named, and return all of them."""
        method = "PATCH" if changes else "GET"
        answer: dict[str, Any] = self._call(method, "/settings", body=changes or None)
        return answer

    def register_app(self, client_id: str, **registration: Any) -> dict[str, Any]:
        """Register or replace an app; fields as in `emulator.model.App`."""
        answer: dict[str, Any] = self._call("PUT", f"/apps/{client_id}", body=registration)
        return answer

    def change_app(self, client_id: str, **changes: Any) -> dict[str, Any]:
        """Change some fields of an app."""
        answer: dict[str, Any] = self._call("PATCH", f"/apps/{client_id}", body=changes)
        return answer

    def set_secrets(self, client_id: str, secrets: list[str], *, revoke_tokens: bool = False) -> None:
        """Replace an app's secrets; with `revoke_tokens` every token of the app dies, as at Salesforce."""
        body = {"secrets": secrets, "revoke_tokens": revoke_tokens}
        self._call("PUT", f"/apps/{client_id}/secrets", body=body)

    def add_account(self, **account: Any) -> dict[str, Any]:
        """Add or replace an account; ids and a first user are made up where they are missing."""
        answer: dict[str, Any] = self._call("POST", "/accounts", body=account)
        return answer

    def change_account(self, account_id: str, **changes: Any) -> dict[str, Any]:
        """Change an account: active, scopes, migrating, ip_blocked, instance_url, hublet, domain."""
        answer: dict[str, Any] = self._call("PATCH", f"/accounts/{account_id}", body=changes)
        return answer

    def accounts(self) -> list[dict[str, Any]]:
        """List the accounts with their users."""
        answer: list[dict[str, Any]] = self._call("GET", "/accounts")
        return answer

    def add_user(self, account_id: str, **user: Any) -> dict[str, Any]:
        """Add a user (name, and an id if wanted) to an account."""
        answer: dict[str, Any] = self._call("POST", f"/accounts/{account_id}/users", body=user)
        return answer

    def change_user(self, account_id: str, user_id: str, **changes: Any) -> dict[str, Any]:
        """Change a user: name, active, may_install."""
        answer: dict[str, Any] = self._call("PATCH", f"/accounts/{account_id}/users/{user_id}", body=changes)
        return answer

    def grant(self, app: str, **order: Any) -> Minted:
        """Mint one grant without a browser: account, user, scopes; a new account when none is named."""
        return self.grant_many(app, 1, **order)[0]

    def grant_many(self, app: str, count: int, **order: Any) -> list[Minted]:
        """Mint `count` grants at once, each in a new account unless one is named."""
        body = {**order, "app": app, "count": count}
        return [Minted(**each) for each in self._call("POST", "/grants", body=body)]

    def misbehave(
        self,
        kind: str,
        *,
        endpoint: str = "token",
        when: str | None = None,
        count: int | None = None,
        seconds: float | None = None,
        app: str | None = None,
        account: str | None = None,
        user: str | None = None,
        grant_id: str | None = None,
        grant_type: str | None = None,
        **options: Any,
    ) -> int:
        """Put a fault in force and return its id; kinds and options stand in `emulator.faults`."""
        if kind == "other_account":
            options = {"account": account, **({"user": user} if user is not None else {})}
            account = user = None
        body = {
            "kind": kind, "endpoint": endpoint, "when": when, "count": count, "seconds": seconds, "app": app,
            "account": account, "user": user, "grant_id": grant_id, "grant_type": grant_type,
            "options": options,
        }  # fmt: skip
        return int(self._call("POST", "/faults", body=body)["id"])

    def faults(self) -> list[dict[str, Any]]:
        """List faults with what is left of them and how often they struck."""
        answer: list[dict[str, Any]] = self._call("GET", "/faults")
        return answer

    def behave(self, fault_id: int | None = None) -> None:
        """Lift one fault, or all of this vendor's; requests that hang are let go."""
        self._call("DELETE", "/faults" if fault_id is None else f"/faults/{fault_id}")

    def totals(self) -> Totals:
        """Return this vendor's counters."""
        return Totals(**self._control.call("GET", "/control/counters")[self.name])

    def requests(self, since: int = 0) -> list[SeenRequest]:
        """Return the token requests received after the one with id `since`, oldest first."""
        return [SeenRequest(**each) for each in self._call("GET", "/requests", query={"since": since})]

    def consent(
        self, authorize_url: str, *, account: str | None = None, user: str | None = None, approve: bool = True
    ) -> Consent:
        """Do what a person does with an authorize URL; the default is the first account and user."""
        page = requests.get(authorize_url, timeout=TIMEOUT, allow_redirects=False)
        if page.status_code != 200:
            return Consent(page.status_code, page.text, page.headers.get("Location"))
        choice = _pick(page.text, account, user)
        form = {"choice": choice, "decision": "approve" if approve else "deny"}
        answer = requests.post(authorize_url, data=form, timeout=TIMEOUT, allow_redirects=False)
        return Consent(answer.status_code, answer.text, answer.headers.get("Location"))


class _Choices(HTMLParser):
    """Collects the values of the options on a consent page."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "option":
            self.values.append(dict(attrs).get("value") or "")


def _pick(body: str, account: str | None, user: str | None) -> str:
    parser = _Choices()
    parser.feed(body)
    for value in parser.values:
        offered_account, _, offered_user = value.partition(":")
        if account in (None, offered_account) and user in (None, offered_user):
            return value
    raise ControlError(f"the page offers no account {account!r} with user {user!r}")
