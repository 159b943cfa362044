"""What the two authorization servers have in common: memory, faults, ledger, and the seam to their own rules.

A vendor never speaks HTTP by itself; it answers with `RefusedError` or data, and its web module turns that
into bytes.
"""

from __future__ import annotations

import abc
import base64
import hashlib
import hmac
import itertools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

from flask import Response

from emulator.clock import ShiftedClock
from emulator.faults import CONSENTING, Fault, FaultBook
from emulator.ledger import Ledger
from emulator.minting import BASE64URL, Minter
from emulator.model import Access, Account, App, Grant, SetUpError, User, VendorName
from emulator.store import Store

Subject = dict[str, str | None]


class RefusedError(Exception):
    """The vendor says no; `name` is a key of its error table, `detail` replaces the usual description."""

    def __init__(self, name: str, detail: str | None = None) -> None:
        super().__init__(name)
        self.name = name
        self.detail = detail


class Vendor(abc.ABC):
    """One authorization server without its HTTP face."""

    name: VendorName
    # What a grant minted without a browser carries besides the app's own scopes.
    scopes_of_grants: tuple[str, ...] = ()

    def __init__(self, clock: ShiftedClock, minter: Minter, *, fault_ids: itertools.count[int]) -> None:
        self.clock = clock
        self.minter = minter
        self.ledger = Ledger(clock)
        self.store = Store(clock, minter, ledger=self.ledger)
        self.faults = FaultBook(clock, fault_ids)
        self.url = ""

    @abc.abstractmethod
    def problem(self, name: str, detail: str | None) -> Response:
        """Turn an error name into the vendor's answer; SetUpError for a name it does not know."""

    @abc.abstractmethod
    def knows_problem(self, name: str) -> bool:
        """Whether `problem` has an answer for this name."""

    @abc.abstractmethod
    def subject(self, endpoint: str) -> Subject:
        """Tell from the current request whom it is about; absent parts are None."""

    @abc.abstractmethod
    def settings_data(self) -> dict[str, Any]:
        """Return the vendor-wide settings as JSON-ready data."""

    @abc.abstractmethod
    def change_settings(self, changes: Mapping[str, Any]) -> None:
        """Change vendor-wide settings; SetUpError for an unknown name."""

    @abc.abstractmethod
    def new_account(self, data: Mapping[str, Any]) -> Account:
        """Complete set-up data with ids and a user where they are missing."""

    @abc.abstractmethod
    def new_user(self, data: Mapping[str, Any]) -> User:
        """Complete a user with an id in the vendor's form."""

    @abc.abstractmethod
    def access_state(self, access: Access | None) -> str:
        """Tell live, expired, revoked or unknown."""

    @abc.abstractmethod
    def approve(self, app: App, account: Account, *, user: User, scopes: list[str], kind: str) -> Grant:
        """Record an approval and return the grant; the vendor's limits on approvals strike here."""

    @abc.abstractmethod
    def mint_access(self, grant: Grant) -> Access:
        """Hand out one more access token on a grant."""

    @abc.abstractmethod
    def new_refresh_token(self, account: Account) -> str:
        """Make a refresh token in the vendor's form."""

    def processing(self, endpoint: str, subject: Subject) -> AbstractContextManager[None]:
        """Surround the work on one request; a vendor may refuse it here because of another one."""
        return nullcontext()

    def put_app(self, app: App) -> App:
        """Register or replace an app."""
        self.check_app(app)
        if not app.app_id:
            app.app_id = self.minter.number(1_000_000, 9_999_999)
        with self.store.lock:
            self.store.apps[app.client_id] = app
        return app

    def check_app(self, app: App) -> None:
        """Raise SetUpError for an app that the vendor's own set-up would not take."""
        for name in ("secrets", "redirect_uris", "scopes", "optional_scopes", "conditional_scopes"):
            value = getattr(app, name)
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise SetUpError(f"{name} is a list of strings")

    def put_account(self, account: Account) -> Account:
        """Add or replace an account."""
        with self.store.lock:
            self.store.accounts[account.id] = account
        return account

    def put_fault(self, data: Mapping[str, Any]) -> Fault:
        """Put a fault in force after checking that this vendor can carry it out."""
        fault = Fault.parse({**data, "id": 0, "hits": 0})
        if fault.kind in CONSENTING:
            fault.endpoint = "authorize"
        if fault.kind == "error" and not self.knows_problem(str(fault.options.get("error"))):
            raise SetUpError(f"{self.name} has no error {fault.options.get('error')!r}")
        return self.faults.add(fault)

    def instance_url(self, grant: Grant) -> str:
        """Tell where the API of the grant's account is."""
        return self.url

    def find_account(self, account_id: str) -> Account | None:
        """Find an account by its id in the vendor's canonical form."""
        return self.store.accounts.get(account_id)

    def subject_of_grant(self, grant: Grant | None) -> Subject:
        """Name the parts of a grant for faults and ledger."""
        if grant is None:
            return {"account": None, "user": None, "grant_id": None}
        return {"account": grant.account_id, "user": grant.user_id, "grant_id": grant.id}

    def restore(self) -> None:
        """Forget the world and everything counted."""
        self.faults.lift()
        self.store.forget()
        self.ledger.reset()


def secret_index(app: App, secret: str | None) -> int | None:
    """Tell which of the app's secrets was presented, in constant time per secret; None when none fits."""
    presented = (secret or "").encode()
    for index, known in enumerate(app.secrets):
        if hmac.compare_digest(known.encode(), presented):
            return index
    return None


def verifier_fits(challenge: str, verifier: str | None) -> bool:
    """Check a PKCE verifier, length and alphabet too, against an S256 challenge (RFC 7636 4.6)."""
    if verifier is None or not 43 <= len(verifier) <= 128 or set(verifier) - set(BASE64URL + ".~"):
        return False
    digest = hashlib.sha256(verifier.encode()).digest()
    return hmac.compare_digest(base64.urlsafe_b64encode(digest).rstrip(b"=").decode(), challenge.rstrip("="))


def account_data(account: Account) -> dict[str, Any]:
    """Return an account as JSON-ready data."""
    return asdict(account)
