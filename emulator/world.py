"""Sets up apps, accounts and grants: from a configuration file, for the demo, or in bulk for benches.

A configuration is one JSON object: for each vendor `settings`, `apps`, `accounts` and `faults` in the control
port's own words. `DEMO` is what a process gets that is started without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from emulator.model import Account, App, Grant, SetUpError, User
from emulator.vendor import Vendor

MOST_GRANTS_PER_CALL = 20_000

DEMO: dict[str, Any] = {
    "hubspot": {
        "apps": [
            {
                "client_id": "demo-hubspot-app",
                "secrets": ["demo-hubspot-secret"],
                "redirect_uris": ["http://localhost:8000/callback"],
                "scopes": ["oauth", "crm.objects.contacts.read"],
                "optional_scopes": ["crm.objects.companies.read", "crm.objects.leads.read"],
            }
        ],
        "accounts": [
            {"id": "1111111", "domain": "acme.example", "users": [{"id": "11", "name": "ada@acme.example"}]},
            {
                "id": "2222222",
                "domain": "globex.example",
                "users": [
                    {"id": "21", "name": "bob@globex.example"},
                    {"id": "22", "name": "eve@globex.example"},
                ],
                "scopes": ["oauth", "crm.objects.contacts.read", "crm.objects.companies.read"],
                "hublet": "eu1",
            },
        ],
    },
    "salesforce": {
        "apps": [
            {
                "client_id": "demo-salesforce-app",
                "secrets": ["demo-salesforce-secret"],
                "redirect_uris": ["http://localhost:8000/callback"],
                "scopes": ["api", "refresh_token", "openid"],
                "rotation": True,
                "pkce_required": True,
            }
        ],
        "accounts": [
            {"id": "00Dxx0000001gPF", "domain": "acme.example", "users": [{"name": "ada@acme.example"}]},
            {"id": "00Dxx0000001gPG", "domain": "globex.example", "users": [{"name": "bob@globex.example"}]},
        ],
    },
}


def set_up(vendor: Vendor, config: Mapping[str, Any]) -> None:
    """Apply one vendor's part of a configuration; SetUpError names what does not fit."""
    unknown = sorted(set(config) - {"settings", "apps", "accounts", "faults"})
    if unknown:
        raise SetUpError(f"{vendor.name}: unknown parts {unknown}")
    vendor.change_settings(config.get("settings", {}))
    # A copy, because records keep the lists they are made from and `DEMO` must stay as it is.
    own = deepcopy(dict(config))
    for app in own.get("apps", []):
        vendor.put_app(App.parse(app))
    for account in own.get("accounts", []):
        vendor.put_account(vendor.new_account(account))
    for fault in own.get("faults", []):
        vendor.put_fault(fault)


def grant_in_bulk(vendor: Vendor, order: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Mint grants without a browser; without an account each grant gets a new one of its own.

    `order`: app, account, user, scopes, count (default 1). Answers clear tokens: the only place that does.
    """
    unknown = sorted(set(order) - {"app", "account", "user", "scopes", "count"})
    if unknown:
        raise SetUpError(f"unknown fields {unknown}")
    app = vendor.store.apps.get(str(order.get("app")))
    count = int(order.get("count", 1))
    if app is None or not 1 <= count <= MOST_GRANTS_PER_CALL:
        raise SetUpError(f"app must be registered and count within 1..{MOST_GRANTS_PER_CALL}")
    return [_mint_one(vendor, app, order=order) for _ in range(count)]


def _mint_one(vendor: Vendor, app: App, *, order: Mapping[str, Any]) -> dict[str, Any]:
    account, user = _whose(vendor, order)
    scopes = order.get("scopes") or sorted({*app.scopes, *vendor.scopes_of_grants})
    grant = vendor.approve(app, account, user=user, scopes=list(scopes), kind="control")
    return minted(vendor, grant)


def _whose(vendor: Vendor, order: Mapping[str, Any]) -> tuple[Account, User]:
    named = order.get("account")
    account = vendor.put_account(vendor.new_account({})) if named is None else vendor.find_account(str(named))
    user = account.user(order.get("user")) if account is not None else None
    if account is None or user is None:
        raise SetUpError(f"no account {named!r} with user {order.get('user')!r}")
    return account, user


def minted(vendor: Vendor, grant: Grant) -> dict[str, Any]:
    """Return a fresh grant with a first access token, in the clear."""
    access = vendor.mint_access(grant)
    return {
        "grant_id": grant.id,
        "app": grant.client_id,
        "account": grant.account_id,
        "user": grant.user_id,
        "scopes": grant.scopes,
        "access_token": access.token,
        "refresh_token": grant.refresh,
        "issued_at": access.issued_at,
        "expires_at": access.expires_at,
        "instance_url": vendor.instance_url(grant),
    }
