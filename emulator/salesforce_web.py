"""Salesforce's HTTP face: authorize, token, revoke, introspect, userinfo, identity, and a small REST API."""

from __future__ import annotations

import re
from typing import Any

from flask import Flask, Response, g, request

from emulator import salesforce_data
from emulator.consent import consent_fault, consent_page, error_page, to_callback
from emulator.ledger import TokenRequest
from emulator.model import Account, App, Grant, User
from emulator.salesforce import (
    JWT_BEARER,
    REFRESH_SCOPES,
    Client,
    Salesforce,
    session_token,
)
from emulator.salesforce_answers import PROBLEMS
from emulator.serving import json_response, staged
from emulator.vendor import RefusedError

TITLE = "Salesforce"
OLDEST_VERSION = 31
NEWEST_VERSION = 68


def build(salesforce: Salesforce) -> Flask:
    """Build the Flask app that serves this Salesforce."""
    app = Flask("emulator.salesforce")
    _add_authorize(app, salesforce)
    _add_oauth(app, salesforce)
    _add_identity(app, salesforce)
    _add_rest(app, salesforce)
    return app


def _add_authorize(app: Flask, salesforce: Salesforce) -> None:
    @app.route("/services/oauth2/authorize", methods=["GET", "POST"])
    @staged(salesforce, "authorize")
    def authorize() -> Response:
        try:
            client = _known_client(salesforce)
        except RefusedError as refused:
            return error_page(TITLE, PROBLEMS[refused.name][1], message=PROBLEMS[refused.name][2])
        try:
            scopes = _checked_scopes(client)
        except RefusedError as refused:
            _, error, description = PROBLEMS[refused.name]
            return to_callback({"error": error, "error_description": refused.detail or description})
        if request.method == "GET":
            accounts = [account for account in list(salesforce.store.accounts.values()) if account.active]
            return consent_page(TITLE, client, scopes=scopes, accounts=accounts)
        return _decide(salesforce, client, scopes=scopes)

    @app.route("/elsewhere", methods=["GET", "POST"])
    @staged(salesforce, "elsewhere")
    def elsewhere() -> Response:
        return json_response({"error": "not_found", "error_description": "nobody should have followed"}, 404)


def _known_client(salesforce: Salesforce) -> App:
    client = salesforce.store.apps.get(request.args.get("client_id", ""))
    if client is None:
        raise RefusedError("invalid_client_id")
    if request.args.get("redirect_uri", "") not in client.redirect_uris:
        raise RefusedError("redirect_uri_mismatch")
    return client


def _checked_scopes(client: App) -> list[str]:
    if request.args.get("response_type") != "code":
        raise RefusedError("invalid_request", "response_type must be code")
    if client.pkce_required and not request.args.get("code_challenge"):
        raise RefusedError("invalid_request", "missing required code challenge")
    if request.args.get("code_challenge_method", "S256") != "S256":
        raise RefusedError("invalid_request", "code_challenge_method must be S256")
    asked = request.args.get("scope", "").split() or sorted(client.declared)
    allowed = client.declared | (REFRESH_SCOPES if client.declared & REFRESH_SCOPES else set())
    if set(asked) - allowed:
        raise RefusedError("invalid_scope")
    return asked


def _decide(salesforce: Salesforce, client: App, *, scopes: list[str]) -> Response:
    if request.form.get("decision") != "approve":
        error = salesforce.settings.deny_error
        return to_callback({"error": error, "error_description": "end-user denied authorization"})
    chosen = _chosen(salesforce)
    if chosen is None:
        return error_page(TITLE, "invalid_request", message="choose an org and a user")
    account, user = chosen
    available = set(scopes) if account.scopes is None else set(account.scopes)
    code = salesforce.issue_code(
        client,
        account,
        user=user,
        scopes=[scope for scope in scopes if scope in available],
        redirect_uri=request.args["redirect_uri"],
        challenge=request.args.get("code_challenge"),
    )
    return to_callback({"code": code.value})


def _chosen(salesforce: Salesforce) -> tuple[Account, User] | None:
    account_id, _, user_id = request.form.get("choice", "").partition(":")
    swap = consent_fault("other_account")
    if swap is not None:
        account_id, user_id = str(swap.options.get("account", "")), str(swap.options.get("user", ""))
    account = salesforce.store.accounts.get(account_id)
    user = account.user(user_id or None) if account is not None else None
    return None if account is None or user is None else (account, user)


def _add_oauth(app: Flask, salesforce: Salesforce) -> None:
    @app.post("/services/oauth2/token")
    @staged(salesforce, "token")
    def token() -> Response:
        return _token(salesforce, g.entry)

    @app.route("/services/oauth2/revoke", methods=["GET", "POST"])
    @staged(salesforce, "revoke")
    def revoke() -> Response:
        salesforce.revoke(request.values.get("token", ""))
        return Response("", 200)

    @app.post("/services/oauth2/introspect")
    @staged(salesforce, "introspect")
    def introspect() -> Response:
        client = salesforce.authenticate(needs_secret=True)
        return json_response(salesforce.introspect(client.app, request.form.get("token", "")))


def _token(salesforce: Salesforce, entry: TokenRequest) -> Response:
    refresh: str | None = None
    match request.form.get("grant_type"):
        case "authorization_code":
            client = _client(salesforce, entry)
            grant, access = salesforce.exchange_code(client.app, request.form)
            refresh = grant.refresh
        case "refresh_token":
            client = _client(salesforce, entry, needs_secret=_secret_needed(salesforce, entry.app))
            token = request.form.get("refresh_token", "")
            grant, access, rotated = salesforce.refresh(client.app, token, entry=entry)
            refresh = grant.refresh if rotated else None
        case "client_credentials":
            client = _client(salesforce, entry)
            grant, access = salesforce.service_grant(client.app)
        case kind if kind == JWT_BEARER:
            client, grant, access = salesforce.bearer_grant(request.form.get("assertion", ""))
        case _:
            raise RefusedError("unsupported_grant_type")
    entry.app = client.app.client_id
    entry.grant_id, entry.account, entry.user = grant.id, grant.account_id, grant.user_id
    return json_response(salesforce.token_answer(client, grant, access=access, refresh=refresh))


def _client(salesforce: Salesforce, entry: TokenRequest, *, needs_secret: bool = True) -> Client:
    client = salesforce.authenticate(needs_secret=needs_secret)
    entry.secret_index = client.index
    return client


def _secret_needed(salesforce: Salesforce, client_id: str | None) -> bool:
    app = salesforce.store.apps.get(client_id or "")
    return app is None or app.secret_required_for_refresh


def _add_identity(app: Flask, salesforce: Salesforce) -> None:
    @app.route("/services/oauth2/userinfo", methods=["GET", "POST"])
    @staged(salesforce, "api")
    def userinfo() -> Response:
        used = salesforce.use(session_token())
        return _bad_token() if used is None else json_response(_userinfo(salesforce, used[1]))

    @app.get("/id/<org_id>/<user_id>")
    @staged(salesforce, "api")
    def identity(org_id: str, user_id: str) -> Response:
        used = salesforce.use(session_token())
        if used is None or (used[1].account_id, used[1].user_id) != (org_id, user_id):
            return _bad_token()
        info = _userinfo(salesforce, used[1])
        return json_response(
            {
                "id": info["sub"],
                "user_id": user_id,
                "organization_id": org_id,
                "username": info["preferred_username"],
                "email": info["email"],
                "active": True,
            }
        )


def _bad_token() -> Response:
    return Response("Bad_OAuth_Token", 403, mimetype="text/plain")


def _userinfo(salesforce: Salesforce, grant: Grant) -> dict[str, Any]:
    user = salesforce.store.accounts[grant.account_id].user(grant.user_id)
    name = user.name if user is not None else ""
    return {
        "sub": salesforce.identity_url(grant),
        "user_id": grant.user_id,
        "organization_id": grant.account_id,
        "preferred_username": name,
        "email": name,
        "name": name.partition("@")[0],
    }


def _add_rest(app: Flask, salesforce: Salesforce) -> None:
    root = "/services/data/<version>"

    @app.get("/services/data/")
    @staged(salesforce, "api")
    def versions() -> Response:
        listed = range(OLDEST_VERSION, NEWEST_VERSION + 1)
        return json_response(
            [{"version": f"{n}.0", "url": f"/services/data/v{n}.0", "label": f"v{n}"} for n in listed]
        )

    @app.get(f"{root}/")
    @staged(salesforce, "api")
    def resources(version: str) -> Response:
        _session(salesforce, version)
        names = ("limits", "sobjects", "query")
        return _api_response({name: f"/services/data/{version}/{name}" for name in names})

    @app.get(f"{root}/limits")
    @app.get(f"{root}/limits/")
    @staged(salesforce, "api")
    def limits(version: str) -> Response:
        _session(salesforce, version)
        return _api_response({"DailyApiRequests": {"Max": 15000, "Remaining": 14982}})

    @app.get(f"{root}/sobjects")
    @app.get(f"{root}/sobjects/")
    @staged(salesforce, "api")
    def sobjects(version: str) -> Response:
        _session(salesforce, version)
        types = [salesforce_data.described(kind) for kind in salesforce_data.PREFIXES]
        return _api_response({"encoding": "UTF-8", "maxBatchSize": 200, "sobjects": types})

    @app.get(f"{root}/query")
    @app.get(f"{root}/query/")
    @staged(salesforce, "api")
    def query(version: str) -> Response:
        grant = _session(salesforce, version)
        answer = salesforce_data.query(grant.account_id, request.args.get("q", ""), version=version)
        return _api_response(answer)

    _add_records(app, salesforce, root=root)


def _add_records(app: Flask, salesforce: Salesforce, *, root: str) -> None:
    @app.get(f"{root}/sobjects/<kind>/describe")
    @staged(salesforce, "api")
    def describe(version: str, kind: str) -> Response:
        grant = _session(salesforce, version)
        salesforce_data.records(grant.account_id, kind)
        fields = [{"name": name, "label": name} for name in salesforce_data.FIELDS[kind]]
        return _api_response({**salesforce_data.described(kind), "fields": fields})

    @app.get(f"{root}/sobjects/<kind>/<record_id>")
    @staged(salesforce, "api")
    def record(version: str, kind: str, record_id: str) -> Response:
        grant = _session(salesforce, version)
        for row in salesforce_data.records(grant.account_id, kind):
            if record_id in (row["Id"], row["Id"][:15]):
                return _api_response(salesforce_data.with_attributes(kind, row, version=version))
        raise RefusedError("NOT_FOUND")


def _session(salesforce: Salesforce, version: str) -> Grant:
    number = re.fullmatch(r"v(\d+)\.0", version)
    if number is None or int(number[1]) > NEWEST_VERSION:
        raise RefusedError("NOT_FOUND")
    if int(number[1]) < OLDEST_VERSION:
        raise RefusedError("UNSUPPORTED_API_VERSION")
    used = salesforce.use(session_token())
    if used is None:
        raise RefusedError("INVALID_SESSION_ID")
    return used[1]


def _api_response(data: Any) -> Response:
    response = json_response(data)
    response.headers["Sforce-Limit-Info"] = "api-usage=18/15000"
    return response
