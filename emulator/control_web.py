"""The control port: set up the world, ask for misbehaviour, move the clock, read what happened. JSON in and
out.

It has its own port so that nothing under test can reach it by mistake through a vendor's address.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from flask import Flask, Response, jsonify, request

from emulator.clock import ShiftedClock
from emulator.hubspot import HubSpot
from emulator.minting import sha256
from emulator.model import Access, Account, App, Grant, SetUpError, User
from emulator.salesforce import Salesforce
from emulator.vendor import Vendor, account_data
from emulator.world import grant_in_bulk

Vendors = Mapping[str, Vendor]


def build(hubspot: HubSpot, salesforce: Salesforce, *, clock: ShiftedClock) -> Flask:
    """Build the Flask app of the control port."""
    app = Flask("emulator.control")
    vendors: Vendors = {"hubspot": hubspot, "salesforce": salesforce}

    @app.errorhandler(SetUpError)
    def invalid(error: SetUpError) -> tuple[Response, int]:
        return jsonify({"error": str(error)}), 422

    _add_world(app, vendors)
    _add_people(app, vendors)
    _add_grants(app, vendors)
    _add_faults(app, vendors)
    _add_truth(app, vendors, clock=clock)
    return app


def _vendor(vendors: Vendors, name: str) -> Vendor:
    if name not in vendors:
        raise SetUpError(f"no vendor {name!r}, there are {sorted(vendors)}")
    return vendors[name]


def _body() -> dict[str, Any]:
    data = request.get_json(silent=True)
    if not isinstance(data, dict):
        raise SetUpError("a JSON object is needed")
    return data


def _needed(name: str) -> Any:
    data = _body()
    if name not in data:
        raise SetUpError(f"{name} is missing")
    return data[name]


def _app_of(vendor: Vendor, client_id: str) -> App:
    app = vendor.store.apps.get(client_id)
    if app is None:
        raise SetUpError(f"no app {client_id!r}")
    return app


def _account_of(vendor: Vendor, account_id: str) -> Account:
    account = vendor.find_account(account_id)
    if account is None:
        raise SetUpError(f"no account {account_id!r}")
    return account


def _add_world(app: Flask, vendors: Vendors) -> None:
    @app.get("/control/health")
    def health() -> Response:
        return jsonify({"status": "ok", **{name: vendor.url for name, vendor in vendors.items()}})

    @app.get("/control/<name>/settings")
    def settings(name: str) -> Response:
        return jsonify(_vendor(vendors, name).settings_data())

    @app.patch("/control/<name>/settings")
    def change_settings(name: str) -> Response:
        vendor = _vendor(vendors, name)
        vendor.change_settings(_body())
        return jsonify(vendor.settings_data())

    @app.get("/control/<name>/apps")
    def apps(name: str) -> Response:
        return jsonify([asdict(each) for each in _vendor(vendors, name).store.apps.values()])

    @app.put("/control/<name>/apps/<client_id>")
    def put_app(name: str, client_id: str) -> Response:
        vendor = _vendor(vendors, name)
        return jsonify(asdict(vendor.put_app(App.parse({**_body(), "client_id": client_id}))))

    @app.patch("/control/<name>/apps/<client_id>")
    def change_app(name: str, client_id: str) -> Response:
        vendor = _vendor(vendors, name)
        data = {**asdict(_app_of(vendor, client_id)), **_body(), "client_id": client_id}
        return jsonify(asdict(vendor.put_app(App.parse(data))))

    @app.put("/control/<name>/apps/<client_id>/secrets")
    def set_secrets(name: str, client_id: str) -> Response:
        vendor, data = _vendor(vendors, name), _body()
        changed = vendor.put_app(replace(_app_of(vendor, client_id), secrets=_needed("secrets")))
        if data.get("revoke_tokens", False):
            for grant in vendor.store.matching(lambda each: each.client_id == client_id):
                vendor.store.revoke(grant, "secret rotated", with_access=True)
        return jsonify(asdict(changed))


def _add_people(app: Flask, vendors: Vendors) -> None:
    @app.get("/control/<name>/accounts")
    def accounts(name: str) -> Response:
        return jsonify([account_data(each) for each in _vendor(vendors, name).store.accounts.values()])

    @app.post("/control/<name>/accounts")
    def add_account(name: str) -> Response:
        vendor = _vendor(vendors, name)
        return jsonify(account_data(vendor.put_account(vendor.new_account(_body()))))

    @app.patch("/control/<name>/accounts/<account_id>")
    def change_account(name: str, account_id: str) -> Response:
        vendor, data = _vendor(vendors, name), _body()
        account = _account_of(vendor, account_id)
        _assign(account, data, fixed={"id", "users"})
        return jsonify(account_data(account))

    @app.post("/control/<name>/accounts/<account_id>/users")
    def add_user(name: str, account_id: str) -> Response:
        vendor = _vendor(vendors, name)
        added = vendor.new_user(_body())
        _account_of(vendor, account_id).users.append(added)
        return jsonify(asdict(added))

    @app.patch("/control/<name>/accounts/<account_id>/users/<user_id>")
    def change_user(name: str, account_id: str, user_id: str) -> Response:
        user = _account_of(_vendor(vendors, name), account_id).user(user_id)
        if user is None:
            raise SetUpError(f"no user {user_id!r}")
        _assign(user, _body(), fixed={"id"})
        return jsonify(asdict(user))


def _assign(record: Account | User, changes: Mapping[str, Any], *, fixed: set[str]) -> None:
    known = {item.name for item in fields(record)} - fixed
    unknown = sorted(set(changes) - known)
    if unknown:
        raise SetUpError(f"cannot change {unknown}, only {sorted(known)}")
    for name, value in changes.items():
        setattr(record, name, value)


def _add_grants(app: Flask, vendors: Vendors) -> None:
    @app.post("/control/<name>/grants")
    def mint(name: str) -> Response:
        vendor = _vendor(vendors, name)
        return jsonify(grant_in_bulk(vendor, _body()))

    @app.get("/control/grants")
    def grants() -> Response:
        wanted = request.args
        chosen = [
            _grant_data(vendor, grant)
            for vendor in vendors.values()
            if wanted.get("vendor") in (None, vendor.name)
            for grant in vendor.store.matching(_filter(wanted))
        ]
        return jsonify(chosen)

    @app.post("/control/grants/<grant_id>/revoke")
    def revoke(grant_id: str) -> Response:
        data = _body()
        for vendor in vendors.values():
            grant = vendor.store.grants.get(grant_id)
            if grant is not None:
                reason = str(data.get("reason", "revoked by control"))
                vendor.store.revoke(grant, reason, with_access=bool(data.get("access_tokens", True)))
                return jsonify(_grant_data(vendor, grant))
        raise SetUpError(f"no grant {grant_id!r}")


def _filter(wanted: Mapping[str, str]) -> Any:
    def fits(grant: Grant) -> bool:
        known = {"app": grant.client_id, "account": grant.account_id, "user": grant.user_id, "id": grant.id}
        return all(wanted.get(name) in (None, value) for name, value in known.items())

    return fits


def _grant_data(vendor: Vendor, grant: Grant) -> dict[str, Any]:
    return {
        "id": grant.id, "vendor": vendor.name, "app": grant.client_id, "account": grant.account_id,
        "user": grant.user_id, "scopes": grant.scopes, "kind": grant.kind, "created_at": grant.created_at,
        "live": grant.live, "revoked": grant.revoked, "revoked_at": grant.revoked_at,
        "rotations": grant.rotations, "voided": len(grant.voided),
        "refresh_sha256": sha256(grant.refresh) if grant.refresh is not None else None,
        "access": [_access_data(vendor, access) for access in list(grant.access)],
    }  # fmt: skip


def _access_data(vendor: Vendor, access: Access) -> dict[str, Any]:
    return {
        "sha256": access.sha256,
        "issued_at": access.issued_at,
        "expires_at": access.expires_at,
        "revoked": access.revoked,
        "revoked_at": access.revoked_at,
        "state": vendor.access_state(access),
    }


def _add_faults(app: Flask, vendors: Vendors) -> None:
    @app.post("/control/<name>/faults")
    def add(name: str) -> Response:
        vendor, data = _vendor(vendors, name), _body()
        return jsonify(vendor.put_fault(data).describe())

    @app.get("/control/<name>/faults")
    def listing(name: str) -> Response:
        return jsonify(_vendor(vendors, name).faults.listing())

    @app.delete("/control/<name>/faults")
    def lift_all(name: str) -> Response:
        return jsonify({"lifted": _vendor(vendors, name).faults.lift()})

    @app.delete("/control/<name>/faults/<int:fault_id>")
    def lift(name: str, fault_id: int) -> Response:
        return jsonify({"lifted": _vendor(vendors, name).faults.lift(fault_id)})


def _add_truth(app: Flask, vendors: Vendors, *, clock: ShiftedClock) -> None:
    @app.get("/control/counters")
    def counters() -> Response:
        return jsonify({name: vendor.ledger.totals() for name, vendor in vendors.items()})

    @app.get("/control/<name>/requests")
    def requests(name: str) -> Response:
        since = request.args.get("since", 0, type=int)
        return jsonify(_vendor(vendors, name).ledger.requests(since))

    @app.get("/control/clock")
    def tell_time() -> Response:
        return jsonify({"now": clock.now(), "offset": clock.offset})

    @app.post("/control/clock")
    def advance() -> Response:
        clock.advance(float(_needed("advance")))
        return jsonify({"now": clock.now(), "offset": clock.offset})

    @app.post("/control/reset")
    def reset() -> Response:
        what = _body().get("what", "counters")
        if what == "all":
            clock.return_to_real()
        for vendor in vendors.values():
            _reset(vendor, what)
        return jsonify({"reset": what})


def _reset(vendor: Vendor, what: str) -> None:
    match what:
        case "counters":
            vendor.ledger.reset()
        case "faults":
            vendor.faults.lift()
        case "all":
            vendor.restore()
        case _:
            raise SetUpError("what is counters, faults or all")
