"""`admin`: how a person gets into the console."""

from __future__ import annotations

import click

from app.cli.opening import ACTOR, services
from app.cli.output import Output, reporting

__all__ = ["admin"]


@click.group()
def admin() -> None:
    """The people who run this installation."""


@admin.command("login-link")
@reporting
def login_link(out: Output) -> None:
    """Make a link that signs one browser in as an admin, once, within ten minutes.

    \b
    Example:
      drawbridge admin login-link
    """
    from app.telemetry import Event

    with services() as opened:
        token, expires_at = opened.admins.make_login()
        opened.access.record(ACTOR, Event.ADMIN_LOGIN_LINK_MADE)
        url = f"{opened.settings.public_url}/admin/login?token={token.reveal()}"
    out.tell({"url": url, "expires_at": expires_at}, url)
    if not out.as_json:
        click.echo("Works once, for ten minutes. Whoever has it is admin.", err=True)
