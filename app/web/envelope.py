"""What every answer carries, put on outside of Flask so that nothing can be answered without it, static files and crashes
included, and so that the hand-out path pays for a list and not for hooks.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["REQUEST_ID", "Envelope"]

REQUEST_ID: Final = "drawbridge.request_id"
"""Where the id of a request stands in its WSGI environment; made here, never taken from the client."""

_POLICY: Final = (
    "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_USUAL: Final = (
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)
_DATA: Final = (("X-Content-Type-Options", "nosniff"), ("Content-Security-Policy", "default-src 'none'"))
_YEAR: Final = 31_536_000

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None]


class Envelope:
    """A WSGI application around another; `https` says that PUBLIC_URL is, so that browsers may be held to it."""

    def __init__(self, app: WSGIApplication, *, https: bool) -> None:
        self._app = app
        hsts = (("Strict-Transport-Security", f"max-age={_YEAR}"),) if https else ()
        self._usual = (*_USUAL, *hsts, ("Content-Security-Policy", f"{_POLICY}; form-action 'self'"))
        # Browsers hold the redirects behind a form to form-action too, and a provider sends people on through hosts that
        # nobody can list (a My Domain, a region), so the page that begins a trip cannot have it.
        self._connect = (*_USUAL, *hsts, ("Content-Security-Policy", _POLICY))
        self._data = (*_DATA, *hsts)
        # Unique over processes and starts without asking the system for random bytes at each request.
        self._origin = secrets.token_hex(6)
        self._numbers = itertools.count(1)

    def stamp(self, environ: WSGIEnvironment) -> tuple[tuple[str, str], ...]:
        """Give the request its id; what an answer to it carries beside its own headers."""
        request_id = environ[REQUEST_ID] = f"{self._origin}-{next(self._numbers):x}"
        return (*self._headers_for(environ.get("PATH_INFO", "")), ("X-Request-ID", request_id))

    def _headers_for(self, path: str) -> tuple[tuple[str, str], ...]:
        if path.startswith("/v1/"):
            return self._data  # JSON for programs: most of what only holds browsers to something is left out
        return self._connect if path.startswith("/connect/") else self._usual

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        ours = self.stamp(environ)

        def begin(status: str, headers: list[tuple[str, str]], exc_info: _ExcInfo | None = None) -> Any:
            return start_response(status, [*headers, *ours], exc_info)

        return self._app(environ, begin)
