"""How a browser is answered: pages nobody keeps, and redirects after each form."""

from __future__ import annotations

from flask import Response, render_template

__all__ = ["page", "see_other"]


def page(template: str, **values: object) -> Response:
    """A page."""
    response = Response(render_template(template, **values), content_type="text/html; charset=utf-8")
    response.headers["Cache-Control"] = "no-store"
    return response


def see_other(url: str) -> Response:
    """303, so that reloading repeats no form; without a body, for the address may hold a state."""
    return Response(b"", 303, headers={"Location": url, "Cache-Control": "no-store"})
