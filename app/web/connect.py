"""The browser's trip to a provider's consent page and back.

    GET  /connect/{provider}            says what will happen; for a signed-in admin, or with ?link=TOKEN
    POST /connect/{provider}            begins it (CSRF token, or the link's own one-time token)
    GET  /connect/{provider}/callback   where the provider sends the browser back to
    POST /connect/{provider}/undo       takes back what this browser has just connected

A GET begins nothing: mail scanners and previews follow links, and a link is good for one trip.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from flask import Blueprint, Response, request
from werkzeug.exceptions import MethodNotAllowed

from app.broker.admins import AdminSession
from app.broker.apps import AppRow
from app.broker.connect import CallbackRefused, Connected
from app.broker.connection import Connection
from app.broker.store import check_name
from app.errors import DrawbridgeError, InvalidRequest, NotFound
from app.oauth2.provider import Provider
from app.secret import Secret
from app.telemetry import Event, log, metrics
from app.web.arguments import read_query
from app.web.asking import browser_cookie, form_of_admin, form_of_page, require_admin, services
from app.web.pages import page, see_other

__all__ = ["blueprint"]

blueprint: Final = Blueprint("connect", __name__)

_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{20,128}")
_BROWSER: Final = re.compile(r"[A-Za-z0-9_-]{43}")
_LONGEST_STATE: Final = 256
_ADMIN_FIELDS: Final = ("app", "name", "connection")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What a trip would do."""

    provider: Provider
    app: AppRow
    name: str | None
    connection: Connection | None
    started_by: str


@blueprint.get("/connect/<provider>")
def show(provider: str) -> Response:
    """Say what will happen and offer to begin."""
    vendor = services().apps.provider(provider)
    query = read_query(request.environ.get("QUERY_STRING", ""), allowed=("link", *_ADMIN_FIELDS))
    if "link" in query:
        token = _link_token(query)
        return _plan_page(_plan_of_link(vendor, token, use=False), link=token, session=None)
    session = require_admin()
    return _plan_page(_plan_of_admin(vendor, query), link=None, session=session)


@blueprint.post("/connect/<provider>")
def start(provider: str) -> Response:
    """Begin: bind the trip to this browser and send it to the provider."""
    vendor = services().apps.provider(provider)
    plan = _posted_plan(vendor)
    cookie = browser_cookie()
    known = cookie.read()
    begun = services().connect.start(
        plan.app,
        name=None if plan.connection else plan.name,
        connection=plan.connection,
        started_by=plan.started_by,
        browser=known if known is not None and _BROWSER.fullmatch(known.reveal()) else None,
    )
    target = plan.connection.name if plan.connection else plan.name or ""
    services().access.record(
        plan.started_by, Event.CONNECT_STARTED, target=target, detail={"app": plan.app.reference}
    )
    response = see_other(begun.url)
    cookie.write(response, begun.browser)
    return response


@blueprint.get("/connect/<provider>/callback")
def come_back(provider: str) -> Response:
    """End the trip with what the provider sent; a page says what came of it."""
    if request.method != "GET":
        raise MethodNotAllowed(valid_methods=["GET"])  # a HEAD would use the trip up
    services().apps.provider(provider)
    # RFC 6749 §4.1.2: parameters that are not known must be ignored; repeated ones still are no answer of a provider.
    query = read_query(request.environ.get("QUERY_STRING", ""), allowed=None)
    state = query.get("state")
    if state is not None and len(state) > _LONGEST_STATE:
        raise InvalidRequest("The state is longer than any we make.")
    browser = browser_cookie().read()
    try:
        connected = services().connect.finish(
            provider,
            state=state,
            code=Secret(query["code"]) if query.get("code") else None,
            error=query.get("error"),
            browser=browser,
        )
    except DrawbridgeError as error:
        log(Event.CONNECT_FAILED, provider=provider, code=error.code)
        metrics.connects.labels(provider, error.code).inc()
        raise
    metrics.connects.labels(provider, "connected").inc()
    assert browser is not None  # the trip was bound to it
    return _done_page(connected, browser=browser)


@blueprint.post("/connect/<provider>/undo")
def undo(provider: str) -> Response:
    """Disconnect what this browser has just connected."""
    form = form_of_page(("connection", "token"))
    browser = browser_cookie().read()
    # Only a browser that has been on a trip asks the database.
    connection = services().store.by_name(form.get("connection", "")) if browser is not None else None
    if browser is None or connection is None or connection.provider != provider:
        raise CallbackRefused("There is nothing to take back here.")
    services().connect.check_undo(connection, form.get("token", ""), key=browser)
    services().revoker.disconnect(connection.name, actor="browser:undo")
    return page("undone.html", connection=connection, provider=services().apps.provider(provider))


# What would be done


def _posted_plan(vendor: Provider) -> _Plan:
    form = form_of_page(("link", "csrf", *_ADMIN_FIELDS))
    if "link" in form:
        return _plan_of_link(vendor, _link_token(form), use=True)
    _, form = form_of_admin(*_ADMIN_FIELDS)
    return _plan_of_admin(vendor, form)


def _plan_of_link(vendor: Provider, token: Secret, *, use: bool) -> _Plan:
    links = services().connect
    # Looked at before it is used up: one for another provider stays good.
    if links.look_at_link(token).app.provider != vendor.name:
        raise NotFound("This link is for another provider.")
    link = links.use_link(token) if use else links.look_at_link(token)
    return _Plan(
        provider=vendor,
        app=link.app,
        name=link.name,
        connection=link.connection,
        started_by=f"link:{token.sha256()[:12]}",
    )


def _plan_of_admin(vendor: Provider, given: dict[str, str]) -> _Plan:
    """`connection` to connect that one again; else `app`, by default the one called default, and perhaps a `name`."""
    connection = services().store.named(check_name(given["connection"])) if given.get("connection") else None
    if connection is not None:
        app = services().apps.row(connection.app_id)
    else:
        app = services().apps.find(f"{vendor.name}/{given.get('app') or 'default'}")
    if app.provider != vendor.name:
        raise NotFound(f"{connection.name if connection else app.name} is not at {vendor.title}.")
    name = check_name(given["name"]) if given.get("name") and connection is None else None
    return _Plan(provider=vendor, app=app, name=name, connection=connection, started_by="admin:session")


def _link_token(given: dict[str, str]) -> Secret:
    token = given.get("link", "")
    if len(given) > 1:
        raise InvalidRequest("A link says everything by itself; nothing else may come with it.")
    if _TOKEN.fullmatch(token) is None:
        raise InvalidRequest("This is not a connect link.")
    return Secret(token)


# Pages


def _plan_page(plan: _Plan, *, link: Secret | None, session: AdminSession | None) -> Response:
    return page("connect.html", plan=plan, link=link, session=session)


def _done_page(connected: Connected, *, browser: Secret) -> Response:
    connection = connected.connection
    return page(
        "connected.html",
        connected=connected,
        connection=connection,
        provider=services().apps.provider(connection.provider),
        undo=services().connect.undo_token(connection, key=browser),
    )
