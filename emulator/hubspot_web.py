"""HubSpot's HTTP face: consent pages, four versions of the token endpoint, and two protected resources."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from flask import Flask, Response, g, request

from emulator.consent import consent_fault, consent_page, error_page, page, to_callback
from emulator.hubspot import HubSpot, bearer
from emulator.ledger import TokenRequest
from emulator.minting import sha256
from emulator.model import Access, Account, App, Grant, User
from emulator.serving import json_response, staged
from emulator.vendor import RefusedError

VERSIONS = ("v3", "2026-03", "2026-09")
TITLE = "HubSpot"


def build(hubspot: HubSpot) -> Flask:
    """Build the Flask app that serves this HubSpot."""
    app = Flask("emulator.hubspot")
    _add_authorize(app, hubspot)
    _add_token(app, hubspot)
    _add_v1(app, hubspot)
    _add_resources(app, hubspot)
    return app


def _add_authorize(app: Flask, hubspot: HubSpot) -> None:
    @app.get("/oauth/authorize")
    @app.get("/oauth/<hub_id>/authorize")
    @staged(hubspot, "authorize")
    def show_consent(hub_id: str | None = None) -> Response:
        try:
            client, scopes, optional = _checked_request(hubspot)
            accounts = _choices(hubspot, hub_id)
        except RefusedError as refused:
            return error_page(TITLE, refused.name, message=refused.detail or refused.name)
        return consent_page(TITLE, client, scopes=[*scopes, *optional], accounts=accounts)

    @app.post("/oauth/authorize")
    @app.post("/oauth/<hub_id>/authorize")
    @staged(hubspot, "authorize")
    def decide(hub_id: str | None = None) -> Response:
        try:
            return _decide(hubspot, hub_id)
        except RefusedError as refused:
            return error_page(TITLE, refused.name, message=refused.detail or refused.name)

    @app.route("/elsewhere", methods=["GET", "POST"])
    @staged(hubspot, "elsewhere")
    def elsewhere() -> Response:
        return json_response({"status": "error", "message": "nobody should have followed that redirect"}, 404)


def _checked_request(hubspot: HubSpot) -> tuple[App, list[str], list[str]]:
    client = hubspot.store.apps.get(request.args.get("client_id", ""))
    if client is None:
        raise RefusedError("BAD_CLIENT_ID", "invalid client id")
    if request.args.get("redirect_uri", "") not in client.redirect_uris:
        raise RefusedError("BAD_REDIRECT_URI", "the redirect URL is not one of the app's")
    if client.pkce_required and not request.args.get("code_challenge"):
        raise RefusedError("BAD_CODE_VERIFIER", "this app needs a code challenge")
    if request.args.get("code_challenge_method", "S256") != "S256":
        raise RefusedError("BAD_CODE_VERIFIER", "only S256 is understood")
    scopes = request.args.get("scope", "").split()
    optional = request.args.get("optional_scope", "").split()
    hubspot.check_request(client, scopes=scopes, optional=optional)
    return client, scopes, optional


def _choices(hubspot: HubSpot, hub_id: str | None) -> list[Account]:
    accounts = [account for account in list(hubspot.store.accounts.values()) if account.active]
    if hub_id is None:
        return accounts
    chosen = [account for account in accounts if account.id == hub_id]
    if not chosen:
        raise RefusedError("BAD_HUB", "you have no access to this account")
    return chosen


def _decide(hubspot: HubSpot, hub_id: str | None) -> Response:
    client, scopes, optional = _checked_request(hubspot)
    if request.form.get("decision") != "approve":
        return _denied(hubspot)
    account, user = _chosen(hubspot, _choices(hubspot, hub_id))
    if not user.may_install:
        raise RefusedError("PERMISSION", "installing apps takes super admin or marketplace access rights")
    granted = hubspot.granted_scopes(client, account, scopes=scopes, optional=optional)
    code = hubspot.issue_code(
        client,
        account,
        user=user,
        scopes=granted,
        redirect_uri=request.args["redirect_uri"],
        challenge=request.args.get("code_challenge"),
    )
    return to_callback({"code": code.value})


def _denied(hubspot: HubSpot) -> Response:
    """A refusal ends on HubSpot's page; only on request does the callback hear of it."""
    if hubspot.settings.deny_redirects or consent_fault("deny_redirect") is not None:
        return to_callback({"error": "access_denied", "error_description": "The user declined"})
    return page("App not connected", '<p id="denied">You declined. You can close this page.</p>')


def _chosen(hubspot: HubSpot, offered: list[Account]) -> tuple[Account, User]:
    account_id, _, user_id = request.form.get("choice", "").partition(":")
    swap = consent_fault("other_account")
    if swap is not None:
        account_id, user_id = str(swap.options.get("account", "")), str(swap.options.get("user", ""))
        offered = list(hubspot.store.accounts.values())
    account = next((each for each in offered if each.id == account_id), None)
    user = account.user(user_id or None) if account is not None else None
    if account is None or user is None:
        raise RefusedError("BAD_HUB", "choose an account and a user")
    return account, user


def _add_token(app: Flask, hubspot: HubSpot) -> None:
    @app.post("/oauth/v1/token")
    @staged(hubspot, "token")
    def token_v1() -> Response:
        # Version 1 also read secrets from the query; that is why it is being switched off.
        return _token(hubspot, request.values)

    for version in VERSIONS:
        _add_version(app, hubspot, version=version)


def _add_version(app: Flask, hubspot: HubSpot, *, version: str) -> None:
    @app.post(f"/oauth/{version}/token", endpoint=f"token-{version}")
    @staged(hubspot, "token")
    def token() -> Response:
        return _token(hubspot, request.form)

    @app.post(f"/oauth/{version}/token/introspect", endpoint=f"introspect-{version}")
    @staged(hubspot, "introspect")
    def introspect() -> Response:
        client, _ = hubspot.authenticate(request.form)
        return json_response(hubspot.introspect(client, request.form.get("token", "")))

    @app.post(f"/oauth/{version}/token/revoke", endpoint=f"revoke-{version}")
    @staged(hubspot, "revoke")
    def revoke() -> Response:
        client, _ = hubspot.authenticate(request.form)
        hubspot.revoke(request.form.get("token", ""), client_id=client.client_id)
        return Response("", 200)


def _token(hubspot: HubSpot, fields: Mapping[str, str]) -> Response:
    entry: TokenRequest = g.entry
    hubspot.throttle()
    client, entry.secret_index = hubspot.authenticate(fields)
    match fields.get("grant_type"):
        case "authorization_code":
            grant, access = hubspot.exchange_code(client, fields)
        case "refresh_token":
            grant, access = hubspot.refresh(client, fields.get("refresh_token", ""), entry=entry)
        case "client_credentials":
            grant, access = hubspot.app_token(client, fields.get("scope", "").split())
        case _:
            raise RefusedError("BAD_GRANT_TYPE")
    entry.grant_id = grant.id
    entry.account, entry.user = grant.account_id or None, grant.user_id or None
    return json_response(hubspot.token_answer(grant, access))


def _add_v1(app: Flask, hubspot: HubSpot) -> None:
    @app.get("/oauth/v1/access-tokens/<token>")
    @staged(hubspot, "introspect")
    def describe_access(token: str) -> Response:
        access = hubspot.store.access(token)
        if access is None or hubspot.access_state(access) != "live":
            return _unknown_token(hubspot)
        grant = hubspot.store.grants[access.grant_id]
        description = hubspot.access_description(access, grant=grant)
        kept = {
            name: value
            for name, value in description.items()
            if name not in ("active", "token_use", "client_id")
        }
        return json_response({**kept, "token_type": "access"})

    @app.get("/oauth/v1/refresh-tokens/<token>")
    @staged(hubspot, "introspect")
    def describe_refresh(token: str) -> Response:
        grant = hubspot.store.grant_of_refresh(sha256(token))
        if grant is None or not grant.live or grant.refresh != token:
            return _unknown_token(hubspot)
        description = hubspot.introspect(hubspot.store.apps[grant.client_id], token)
        kept = {
            name: value
            for name, value in description.items()
            if name not in ("active", "token_use", "app_id")
        }
        return json_response({**kept, "token_type": "refresh"})

    @app.delete("/oauth/v1/refresh-tokens/<token>")
    @staged(hubspot, "revoke")
    def delete_refresh(token: str) -> Response:
        hubspot.revoke(token)
        return Response("", 204)


def _unknown_token(hubspot: HubSpot) -> Response:
    body = {"status": "error", "message": "token does not exist", "correlationId": str(uuid.uuid4())}
    return json_response(body, 404)


def _add_resources(app: Flask, hubspot: HubSpot) -> None:
    for version in VERSIONS:

        @app.get(f"/account-info/{version}/details", endpoint=f"details-{version}")
        @staged(hubspot, "api")
        def details() -> Response:
            grant = _caller(hubspot)
            return json_response(_details(hubspot.store.accounts[grant.account_id]))

        @app.delete(f"/appinstalls/{version}/external-install", endpoint=f"uninstall-{version}")
        @staged(hubspot, "api")
        def uninstall() -> Response:
            hubspot.uninstall(_caller(hubspot))
            return Response("", 204)


def _caller(hubspot: HubSpot) -> Grant:
    token = bearer()
    access = hubspot.store.access(token) if token is not None else None
    state = hubspot.access_state(access)
    hubspot.ledger.note_call(state)
    if access is None:
        raise RefusedError("INVALID_AUTHENTICATION")
    if state == "expired":
        g.expired_at = access.expires_at
        raise RefusedError("EXPIRED_AUTHENTICATION", _expired_text(hubspot, access))
    grant = hubspot.store.grants[access.grant_id]
    account = hubspot.store.accounts.get(grant.account_id)
    if state == "revoked" or account is None or not account.active:
        raise RefusedError("NOT_INSTALLED")
    if account.migrating is not None:
        g.retry_after = account.migrating
        raise RefusedError("MIGRATING")
    if "oauth" not in grant.scopes:
        raise RefusedError("MISSING_SCOPES")
    return grant


def _expired_text(hubspot: HubSpot, access: Access) -> str:
    age = int(hubspot.clock.now() - access.expires_at)
    for unit, size in (("day", 86400), ("minute", 60)):
        if age >= size:
            return f"The OAuth token used to make this call expired {age // size} {unit}(s) ago."
    return f"The OAuth token used to make this call expired {age} second(s) ago."


def _details(account: Account) -> dict[str, Any]:
    region = "" if account.hublet == "na1" else f"-{account.hublet}"
    return {
        "portalId": int(account.id),
        "accountType": "DEVELOPER_TEST",
        "timeZone": "US/Eastern",
        "companyCurrency": "USD",
        "additionalCurrencies": [],
        "utcOffset": "-05:00",
        "utcOffsetMilliseconds": -18_000_000,
        "uiDomain": f"app{region}.hubspot.com",
        "dataHostingLocation": account.hublet,
    }
