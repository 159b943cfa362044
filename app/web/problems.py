"""Every error as an answer; the only place that knows how errors look on the wire.

    /oauth/…               RFC 6749 §5.2: {"error", "error_description"}
    /connect/…, /admin…    a page with a sentence for a person
    everything else        RFC 9457 application/problem+json

An exception that is none of ours is logged under the request's id and answered with that id and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, Final
from urllib.parse import quote

from flask import Flask, Response, render_template, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from app import errors
from app.errors import DrawbridgeError, StartRefused
from app.telemetry import Event, log, metrics
from app.web.counting import TOKEN_ENDPOINTS, route_of
from app.web.envelope import REQUEST_ID

__all__ = ["MEDIA_TYPE", "Kind", "Problem", "kinds", "register", "unreadable"]

MEDIA_TYPE: Final = "application/problem+json"

_INTERNAL: Final = DrawbridgeError
_BY_STATUS: Final[Mapping[int, type[DrawbridgeError]]] = {
    401: errors.Unauthenticated,
    403: errors.Forbidden,
    404: errors.NotFound,
    413: errors.TooLarge,
    414: errors.TooLarge,
    429: errors.RateLimited,
    431: errors.TooLarge,
    503: errors.Overloaded,
}
# RFC 6749 §5.2 and §4.1.2.1 have these words.
_OAUTH_WORDS: Final[Mapping[int, str]] = {
    401: "invalid_client",
    403: "unauthorized_client",
    500: "server_error",
}
_CHALLENGES: Final = ('Basic realm="drawbridge", charset="UTF-8"', 'Bearer realm="drawbridge"')
# Pages are for people with a cookie: a scheme browsers know would make them ask for a password nobody has.
_PAGE_CHALLENGE: Final = 'LoginLink realm="drawbridge"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is told about one failed request."""

    status: int
    code: str
    title: str
    detail: str
    hint: str
    retryable: bool = False
    retry_after: int | None = None
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One code, for the page that documents it."""

    code: str
    statuses: tuple[int, ...]
    title: str
    says: str
    hint: str
    retryable: bool


def register(app: Flask) -> None:
    """Let every error of the application be answered here."""
    app.register_error_handler(Exception, _answer)


def kinds() -> tuple[Kind, ...]:
    """Every code an answer can carry, by name."""
    found: dict[str, list[type[DrawbridgeError]]] = {}
    for error in _family(DrawbridgeError):
        if not issubclass(error, StartRefused):
            found.setdefault(error.code, []).append(error)
    return tuple(_kind(code, members) for code, members in sorted(found.items()))


def _answer(error: Exception) -> Response:
    problem = _of(error)
    if request.endpoint in TOKEN_ENDPOINTS:
        metrics.denials.labels(problem.code).inc()
    path = request.path
    if path.startswith("/oauth/"):
        response = _as_oauth(problem)
    elif path.startswith(("/connect/", "/admin/")) or path == "/admin":
        response = _as_page(problem)
    else:
        response = _as_problem(problem)
    response.headers.extend(problem.headers)
    response.headers["Cache-Control"] = "no-store"
    if problem.retry_after is not None:
        response.headers["Retry-After"] = str(problem.retry_after)
    return response


def _of(error: Exception) -> Problem:
    if isinstance(error, DrawbridgeError) and not isinstance(error, StartRefused):
        return _ours(error)
    if isinstance(error, HTTPException) and error.code is not None and error.code < 500:
        return _theirs(error)
    return _unknown(error)


def _ours(error: DrawbridgeError) -> Problem:
    if error.status >= 500 and not error.retryable:
        _tell(error, error.code)
    return Problem(
        status=error.status,
        code=error.code,
        title=error.title,
        detail=error.detail,
        hint=error.hint,
        retryable=error.retryable,
        retry_after=_wait(error),
    )


def unreadable(status: int) -> bytes:
    """The body of an answer to what the server could not read as a request, so that there is no path to name."""
    kind = _BY_STATUS.get(status, errors.InvalidRequest)
    sentence = {
        408: "The request did not come to its end in the time there is for it.",
        413: "The body is larger than anything that is taken here.",
        414: "The request line is longer than anything that is taken here.",
        417: "Nothing but 100-continue can be expected here.",
        431: "The header fields are larger than anything that is taken here.",
        501: "The transfer coding is none that is taken here.",
    }.get(status, "This is no HTTP request as RFC 9112 has them.")
    problem = Problem(status=status, code=kind.code, title=kind.title, detail=sentence, hint=kind.hint)
    return json.dumps(_body(problem)).encode()


def _theirs(error: HTTPException) -> Problem:
    """An error of the framework: a path, method or body it does not take. Its words are not passed on."""
    status = error.code or 400
    kind = _BY_STATUS.get(status, errors.InvalidRequest)
    methods = tuple(sorted(getattr(error, "valid_methods", None) or ()))
    allow = (("Allow", ", ".join(methods)),) if isinstance(error, MethodNotAllowed) else ()
    sentence = {
        400: "The request is malformed.",
        404: "There is nothing at this path.",
        405: f"This path takes {', '.join(methods)}.",
        413: "The body is larger than anything that is taken here.",
        415: "The body is not in a format that is taken here.",
    }.get(status, kind.title)
    return Problem(
        status=status, code=kind.code, title=kind.title, detail=sentence, hint=kind.hint, headers=allow
    )


def _unknown(error: Exception) -> Problem:
    _tell(error, _INTERNAL.code)
    return Problem(
        status=500,
        code=_INTERNAL.code,
        title=_INTERNAL.title,
        detail="Something failed that should not. The instance below names this incident in the log.",
        hint=_INTERNAL.hint,
    )


def _tell(error: Exception, code: str) -> None:
    log(
        Event.REQUEST_FAILED,
        exc_info=error,
        method=request.method,
        route=route_of(),
        code=code,
        incident=request.environ.get(REQUEST_ID, ""),
    )


def _wait(error: DrawbridgeError) -> int | None:
    if error.status not in (429, 503):
        return None
    return max(1, ceil(error.retry_after or 1.0))


# The three shapes


def _body(problem: Problem) -> dict[str, Any]:
    body: dict[str, Any] = {
        "type": f"/problems/{problem.code}",
        "title": problem.title,
        "status": problem.status,
        "detail": problem.detail,
        "code": problem.code,
        "hint": problem.hint,
        "retryable": problem.retryable,
    }
    if problem.retry_after is not None:
        body["retry_after_seconds"] = problem.retry_after
    return body


def _as_problem(problem: Problem) -> Response:
    # A reference that names this very request; what stands behind the path is the log's affair.
    body = {**_body(problem), "instance": f"{quote(request.path)}#{request.environ.get(REQUEST_ID, '')}"}
    response = Response(json.dumps(body), problem.status, content_type=MEDIA_TYPE)
    if problem.status == 401:
        for challenge in _CHALLENGES:
            response.headers.add("WWW-Authenticate", challenge)
    return response


def _as_oauth(problem: Problem) -> Response:
    word = (
        "temporarily_unavailable"
        if problem.retryable
        else _OAUTH_WORDS.get(problem.status, "invalid_request")
    )
    body = {"error": word, "error_description": problem.detail}
    response = Response(json.dumps(body), problem.status, content_type="application/json")
    response.headers["Pragma"] = "no-cache"  # RFC 6749 §5.1
    if problem.status == 401:
        response.headers["WWW-Authenticate"] = _CHALLENGES[0]
    return response


def _as_page(problem: Problem) -> Response:
    page = render_template(
        "error.html",
        problem=problem,
        incident=request.environ.get(REQUEST_ID, "") if problem.status == 500 else "",
    )
    response = Response(page, problem.status, content_type="text/html; charset=utf-8")
    if problem.status == 401:
        response.headers["WWW-Authenticate"] = _PAGE_CHALLENGE
    return response


# The list of codes


def _family(root: type[DrawbridgeError]) -> Iterator[type[DrawbridgeError]]:
    yield root
    for child in root.__subclasses__():
        # Tests may make errors of their own; documented is what the program has.
        if child.__module__.startswith("app."):
            yield from _family(child)


def _kind(code: str, members: Iterable[type[DrawbridgeError]]) -> Kind:
    first, *_ = members = tuple(members)
    return Kind(
        code=code,
        statuses=tuple(sorted({member.status for member in members})),
        title=first.title,
        says=(first.__doc__ or "").strip().partition("\n")[0],
        hint=first.hint,
        retryable=first.retryable,
    )
