"""The one page, and what its buttons do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import urlencode

from flask import Blueprint, Response, request

from app.broker import findings
from app.broker.connection import Connection
from app.errors import InvalidRequest
from app.telemetry import Event, log
from app.web.arguments import NAME_PATTERN, read_query
from app.web.asking import form_of_admin, require_admin, services, signed_in
from app.web.connections import force_refresh
from app.web.pages import page, see_other

__all__ = ["register"]

_ACTOR: Final = "admin:session"
_PAGE: Final = 100
# What the page says after an action; nothing a link could make it say is shown otherwise.
_SAID: Final[Mapping[str, str]] = {
    "refreshed": "was refreshed.",
    "disabled": "is disabled: nothing is handed out until it is enabled again.",
    "enabled": "is enabled.",
    "disconnecting": "is being disconnected: nothing is handed out any more.",
}


def register(blueprint: Blueprint) -> None:
    """Put the views on their paths."""
    blueprint.add_url_rule("/admin", "console", show, methods=["GET"])
    blueprint.add_url_rule("/admin/", "console_slash", lambda: see_other("/admin"), methods=["GET"])
    one = "/admin/connections/<name:name>"
    blueprint.add_url_rule(f"{one}/refresh", "refresh", refresh, methods=["POST"])
    blueprint.add_url_rule(f"{one}/disable", "disable", disable, methods=["POST"])
    blueprint.add_url_rule(f"{one}/enable", "enable", enable, methods=["POST"])
    blueprint.add_url_rule(f"{one}/disconnect", "ask_disconnect", ask_disconnect, methods=["GET"])
    blueprint.add_url_rule(f"{one}/disconnect", "disconnect", disconnect, methods=["POST"])


def show() -> Response:
    """Every connection, what needs a person, and the buttons."""
    session = signed_in()
    if session is None:
        return see_other("/admin/login")
    ours = services()
    query = read_query(request.environ.get("QUERY_STRING", ""), allowed=("after", "said", "name"))
    rows = ours.store.page(after=query.get("after", ""), limit=_PAGE + 1)
    apps = ours.apps.list()
    return page(
        "console.html",
        session=session,
        now=ours.clock.now(),
        connections=rows[:_PAGE],
        following=rows[_PAGE - 1].name if len(rows) > _PAGE else None,
        first=not query.get("after"),
        apps=apps,
        app_names={app.id: app.reference for app in apps},
        findings=ours.examiner.tell(findings.open_findings(ours.database)),
        held=ours.adoption.disagreement(),
        providers=ours.providers,
        name_pattern=NAME_PATTERN,
        said=_said(query),
    )


def refresh(name: str) -> Response:
    """Refresh now."""
    form_of_admin()
    force_refresh(services().store.named(name), actor=_ACTOR)
    return _back("refreshed", name)


def disable(name: str) -> Response:
    """Hand out nothing."""
    return _switch(name, services().revoker.disable, "disabled")


def enable(name: str) -> Response:
    """Undo that."""
    return _switch(name, services().revoker.enable, "enabled")


def ask_disconnect(name: str) -> Response:
    """Say what disconnecting does and have the name typed."""
    session = require_admin()
    connection = services().store.named(name)
    provider = services().apps.provider(connection.provider)
    return page("disconnect.html", session=session, connection=connection, provider=provider)


def disconnect(name: str) -> Response:
    """Disconnect, if the name was typed as it is."""
    _, form = form_of_admin("confirm", "uninstall")
    if form.get("confirm", "").strip() != name:
        raise InvalidRequest("The name typed is not the connection's; nothing was disconnected.")
    services().revoker.disconnect(name, uninstall=form.get("uninstall") == "yes", actor=_ACTOR)
    return _back("disconnecting", name)


def _switch(name: str, switch: Callable[..., Connection], said: str) -> Response:
    form_of_admin()
    switch(name, actor=_ACTOR)
    return _back(said, name)


def _back(said: str, name: str) -> Response:
    log(Event.ADMIN_ACTED, action=said, target=name)
    return see_other(f"/admin?{urlencode({'said': said, 'name': name})}")


def _said(query: Mapping[str, str]) -> tuple[str, str] | None:
    sentence = _SAID.get(query.get("said", ""))
    connection = services().store.by_name(query["name"]) if sentence and "name" in query else None
    return (connection.name, sentence) if connection is not None and sentence is not None else None
