"""Signing in by a one-time link from the server's own command line, and out again."""

from __future__ import annotations

import re
from typing import Final

from flask import Blueprint, Response, request

from app.errors import Unauthenticated
from app.secret import Secret
from app.telemetry import Event, log
from app.web.arguments import read_query
from app.web.asking import admin_cookie, form_of_admin, form_of_page, services, signed_in
from app.web.pages import page, see_other

__all__ = ["register"]

_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{20,128}")


def register(blueprint: Blueprint) -> None:
    """Put the views on their paths."""
    blueprint.add_url_rule("/admin/login", "login", show_login, methods=["GET"])
    blueprint.add_url_rule("/admin/login", "sign_in", sign_in, methods=["POST"])
    blueprint.add_url_rule("/admin/logout", "sign_out", sign_out, methods=["POST"])


def show_login() -> Response:
    """With a link's token a button that signs in; without one, how to get a link. Uses nothing up."""
    query = read_query(request.environ.get("QUERY_STRING", ""), allowed=("token",))
    if "token" not in query:
        return see_other("/admin") if signed_in() else page("login.html", token=None)
    token = _token(query)
    if not services().admins.may_sign_in(token):
        raise Unauthenticated("This login link is unknown, was used already, or has expired.")
    return page("login.html", token=token)


def sign_in() -> Response:
    """Use the link up and open a session."""
    token = _token(form_of_page(("token",)))
    ours = services()
    try:
        key = ours.admins.sign_in(token)
    except Unauthenticated as error:
        ours.denials.unknown("login_link")
        log(Event.ADMIN_SIGN_IN_FAILED, reason=error.code)
        raise
    # On record before the browser holds the key; a session nobody holds the key of is worth nothing.
    _record(Event.ADMIN_SIGNED_IN, key)
    response = see_other("/admin")
    admin_cookie().write(response, key)
    return response


def sign_out() -> Response:
    """End the session."""
    session, _ = form_of_admin()
    services().admins.sign_out(session.key)
    _record(Event.ADMIN_SIGNED_OUT, session.key)
    response = see_other("/admin/login")
    admin_cookie().clear(response)
    return response


def _record(event: Event, key: Secret) -> None:
    name = key.sha256()[:12]  # names the session without being its key
    services().access.record("admin:session", event, target=name)
    log(event, session=name)


def _token(given: dict[str, str]) -> Secret:
    token = given.get("token", "")
    if _TOKEN.fullmatch(token) is None:
        raise Unauthenticated("This is not a login link. Make one with: drawbridge admin login-link.")
    return Secret(token)
