"""Who is asking: a caller by its Authorization header, an admin by a cookie, and from which address.

Forwarded headers are believed from the proxies the settings name and from nobody else.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

from flask import Response, current_app, request

from app.access.callers import Caller
from app.access.permissions import Action
from app.bootstrap import Services
from app.broker.admins import AdminSession
from app.errors import Forbidden, Unauthenticated
from app.secret import Secret
from app.settings import Settings
from app.web.arguments import read_form

if TYPE_CHECKING:
    from collections.abc import Collection

    from _typeshed.wsgi import WSGIEnvironment

__all__ = [
    "ADMIN_SECONDS",
    "Cookie",
    "admin_cookie",
    "ask_caller",
    "browser_cookie",
    "client_address",
    "form_of_admin",
    "form_of_page",
    "require_admin",
    "require_same_site",
    "require_somewhere",
    "services",
    "signed_in",
]

ADMIN_SECONDS: Final = 12 * 3600
_TRIP_SECONDS: Final = 30 * 60  # ten minutes at the provider, and fifteen to undo
_LONGEST_COOKIE: Final = 128


def services() -> Services:
    """The services of the application that answers this request."""
    found: Services = current_app.extensions["drawbridge"]
    return found


# Callers


def ask_caller() -> Caller:
    """The caller of this request; raises `Unauthenticated`, `Forbidden` or `RateLimited`."""
    environ = request.environ
    ours = services()
    return ours.authentication.authenticate(
        environ.get("HTTP_AUTHORIZATION"), address=client_address(environ, ours.settings)
    )


def require_somewhere(caller: Caller, action: Action) -> None:
    """Pass when the caller has this action on any name at all; raises `Forbidden`, on record, otherwise."""
    held = any(permission.action == action for permission in caller.permissions)
    if not held or (caller.scopes is not None and action not in caller.scopes):
        services().access.require(caller, action, "*")


def client_address(environ: WSGIEnvironment, settings: Settings) -> str | None:
    """Where the request came from; behind trusted proxies the right-most address that is not one of them.

    What stands further left was written by whoever sent the request and proves nothing.
    """
    address: str | None = environ.get("REMOTE_ADDR") or None
    if not settings.trusted_proxies:
        return address
    hops = [hop.strip() for hop in environ.get("HTTP_X_FORWARDED_FOR", "").split(",") if hop.strip()]
    while hops and _is_trusted(address, settings):
        address = _bare(hops.pop())
    return address


def _is_trusted(address: str | None, settings: Settings) -> bool:
    try:
        found = ip_address(address or "")
    except ValueError:
        return False
    return any(
        (getattr(found, "ipv4_mapped", None) or found) in network for network in settings.trusted_proxies
    )


def _bare(hop: str) -> str:
    """A hop without its port: 192.0.2.1:5000 and [2001:db8::1]:5000 are how some proxies write."""
    if hop.startswith("["):
        return hop[1:].partition("]")[0]
    return hop.partition(":")[0] if hop.count(":") == 1 else hop


# Cookies


class Cookie:
    """One cookie of ours: bound to this very host where PUBLIC_URL is https, out of reach of scripts."""

    def __init__(self, name: str, settings: Settings, *, seconds: int) -> None:
        self._secure = settings.public_url.startswith("https://")
        self._name = f"__Host-drawbridge-{name}" if self._secure else f"drawbridge-{name}"
        self._seconds = seconds

    def read(self) -> Secret | None:
        """What the browser sent, None where it sent nothing that we could have set."""
        value = request.cookies.get(self._name, "")
        plausible = 0 < len(value) <= _LONGEST_COOKIE and value.isascii() and value.isprintable()
        return Secret(value) if plausible else None

    def write(self, response: Response, value: Secret) -> None:
        """Set it. Lax, because the way back from a provider is a navigation from another site."""
        response.set_cookie(
            self._name,
            value.reveal(),
            max_age=self._seconds,
            path="/",
            secure=self._secure,
            httponly=True,
            samesite="Lax",
        )

    def clear(self, response: Response) -> None:
        """Have the browser forget it."""
        response.delete_cookie(self._name, path="/", secure=self._secure, httponly=True, samesite="Lax")


def admin_cookie() -> Cookie:
    """The key of an admin's session."""
    return Cookie("admin", services().settings, seconds=ADMIN_SECONDS)


def browser_cookie() -> Cookie:
    """What binds a trip to the browser it began in."""
    return Cookie("trip", services().settings, seconds=_TRIP_SECONDS)


# Admins and forms


def signed_in() -> AdminSession | None:
    """The admin session of this browser, None where there is none."""
    key = admin_cookie().read()
    return None if key is None else services().admins.session(key)


def require_admin() -> AdminSession:
    """The admin session; raises `Unauthenticated`."""
    session = signed_in()
    if session is None:
        raise Unauthenticated("Sign in first: drawbridge admin login-link prints a link that does.")
    return session


def form_of_admin(*allowed: str) -> tuple[AdminSession, dict[str, str]]:
    """Session and fields of a form an admin posted; raises `Unauthenticated`, or `Forbidden` where it may be forged."""
    session = require_admin()
    form = form_of_page(("csrf", *allowed))
    if Secret(form.pop("csrf", "")) != session.csrf:
        raise Forbidden("This form is too old or was not made for you. Load the page again.")
    return session, form


def form_of_page(allowed: Collection[str]) -> dict[str, str]:
    """The fields of a form that was posted from a page of ours."""
    require_same_site()
    return read_form(request.get_data(), request.headers.get("Content-Type"), allowed=allowed)


def require_same_site() -> None:
    """Refuse what another site's page has sent (Fetch Metadata; where a browser has none, Origin).

    Our own forms come with `Origin: null`, because our pages tell browsers to send no referrer; so that alone says nothing.
    """
    site = request.headers.get("Sec-Fetch-Site")
    origin = request.headers.get("Origin")
    if site is not None:
        foreign = site != "same-origin"
    else:
        foreign = origin is not None and origin != "null" and origin.lower() != _own_origin()
    if foreign:
        raise Forbidden("This form was sent from another site.")


def _own_origin() -> str:
    return services().settings.public_url.rstrip("/").lower()
