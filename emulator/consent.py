"""The pages a person sees: choose an account and a user, approve or deny, or read why it cannot go on."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from urllib.parse import urlencode

from flask import Response, g, request

from emulator.faults import Fault
from emulator.model import Account, App

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body{{font:16px sans-serif;max-width:40rem;margin:3rem auto}}
button{{font-size:1rem;margin-right:1rem}}
</style>
</head><body><h1>{title}</h1>
{body}
</body></html>
"""


def page(title: str, body: str, *, status: int = 200) -> Response:
    """Render a page; `body` is HTML, `title` is text."""
    response = Response(PAGE.format(title=escape(title), body=body), status, mimetype="text/html")
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Frame-Options"] = "DENY"
    return response


def consent_page(vendor: str, app: App, *, scopes: Iterable[str], accounts: Iterable[Account]) -> Response:
    """Ask for consent; the form posts `choice` (account:user) and `decision` to the same URL."""
    options = "".join(
        f'<option value="{escape(account.id)}:{escape(user.id)}">'
        f"{escape(account.domain)} ({escape(account.id)}), {escape(user.name)}</option>"
        for account in accounts
        for user in account.users
    )
    items = "".join(f"<li><code>{escape(scope)}</code></li>" for scope in scopes)
    body = f"""<p><strong>{escape(app.name)}</strong> asks for access to your {escape(vendor)} account:</p>
<ul>{items}</ul>
<form method="post">
<p><label>Account and user <select name="choice" id="choice">{options}</select></label></p>
<button name="decision" value="approve" id="approve">Approve</button>
<button name="decision" value="deny" id="deny">Deny</button>
</form>"""
    return page(f"Connect {app.name} to {vendor}", body)


def error_page(vendor: str, error: str, *, message: str, status: int = 400) -> Response:
    """Show an error on the vendor's own page, never at the callback."""
    body = f'<p id="error" data-error="{escape(error)}">{escape(message)}</p>'
    return page(f"{vendor}: the app cannot be connected", body, status=status)


def to_callback(answer: dict[str, str]) -> Response:
    """Send the browser back with an answer and the state it brought along (RFC 6749 section 4.1.2)."""
    if "state" in request.args:
        answer = {**answer, "state": request.args["state"]}
    target = request.args["redirect_uri"]
    response = Response("", 302)
    response.headers["Location"] = f"{target}{'&' if '?' in target else '?'}{urlencode(answer)}"
    return response


def consent_fault(kind: str) -> Fault | None:
    """Find the fault of this kind that struck the current consent."""
    return next((fault for fault in g.faults if fault.kind == kind), None)
