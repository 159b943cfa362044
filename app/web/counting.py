"""Counting requests by their route and status, and telling of slow ones.

The route is the template, never the path, which holds names. Hand-outs answered in front of Flask do not come by here: they
are counted by `TokenViews.count`, and how long they take is `hand_out_seconds`, for who asks for a token may wish to wait.
"""

from __future__ import annotations

from typing import Final

from flask import Flask, Response, g, request

from app.clock import Clock
from app.telemetry import Event, log, metrics

__all__ = ["TOKEN_ENDPOINTS", "register", "route_of"]

TOKEN_ENDPOINTS: Final = frozenset({"token_get", "token_post"})
_SLOW: Final = 5.0  # seconds; what asks a provider answers within that unless the provider is slow
_BEGAN: Final = "began"


def register(app: Flask, clock: Clock) -> None:
    """Have every request that Flask answers counted, whatever becomes of it."""

    def begin() -> None:
        g.began = clock.elapsed()

    def end(response: Response) -> Response:
        route = route_of()
        metrics.requests.labels(route, str(response.status_code)).inc()
        if request.endpoint not in TOKEN_ENDPOINTS and _BEGAN in g:
            seconds = clock.elapsed() - g.began
            metrics.request_seconds.labels(route).observe(seconds)
            if seconds > _SLOW:
                log(Event.REQUEST_SLOW, method=request.method, route=route, seconds=round(seconds, 3))
        return response

    app.before_request(begin)
    app.after_request(end)


def route_of() -> str:
    """The template of the present request's path; `none` where nothing is at it."""
    return request.url_rule.rule if request.url_rule else "none"
