"""`app`: the OAuth clients registered at the providers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

import click

from app.cli.opening import services
from app.cli.output import Output, reporting
from app.cli.secret_input import read_secrets

if TYPE_CHECKING:
    from app.bootstrap import Services
    from app.broker.apps import AppRow

__all__ = ["app"]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_secret_file = click.option(
    "--secret-file",
    type=click.File("rb"),
    help="File with the client secrets, newest first, one a line; - is standard input. Without it you are asked.",
)


@click.group()
def app() -> None:
    """OAuth clients at HubSpot and Salesforce. An app is named PROVIDER/NAME; PROVIDER alone is its `default`."""


@app.command("list")
@reporting
def list_(out: Output) -> None:
    """List the registered apps; never their secrets.

    \b
    Example:
      drawbridge app list
    """
    with services() as opened:
        rows = [_shown(opened, row) for row in opened.apps.list()]
    columns = {"app": "APP", "client_id": "CLIENT ID", "source": "FROM", "paused_until": "PAUSED UNTIL"}
    out.table(rows, columns, nothing="No app is registered; add one: drawbridge app add PROVIDER/NAME.")


@app.command()
@click.argument("reference", metavar="PROVIDER/NAME")
@click.option("--client-id", required=True, help="The client id (Salesforce: consumer key).")
@click.option(
    "--scopes", help="Scopes an install must grant, between spaces. Default: those of the settings."
)
@click.option("--optional-scopes", help="Scopes an install may grant, between spaces.")
@click.option(
    "--option", "options", multiple=True, metavar="KEY=VALUE", help="What the provider lets you set."
)
@click.option("--no-secret", is_flag=True, help="The client has no secret, or signs instead.")
@_secret_file
@reporting
def add(
    out: Output,
    reference: str,
    *,
    client_id: str,
    scopes: str | None,
    optional_scopes: str | None,
    options: Sequence[str],
    no_secret: bool,
    secret_file: IO[bytes] | None,
) -> None:
    """Register an OAuth client.

    \b
    Example:
      drawbridge app add salesforce/emea --client-id 3MVG9… --secret-file secret.txt \\
          --option login_url=https://emea.my.salesforce.com
    """
    provider, name = _split(reference)
    given = _options(options)
    secrets = () if no_secret else read_secrets(secret_file, what="Client secret")
    with services() as opened:
        row = opened.apps.add(
            provider,
            name,
            client_id=client_id,
            secrets=secrets,
            scopes=_scopes(opened, f"{provider}_scopes", scopes),
            optional_scopes=_scopes(opened, f"{provider}_optional_scopes", optional_scopes),
            options=given,
        )
        shown = _shown(opened, row)
    redirect = f"Register this redirect URI at {provider}: {shown['redirect_uri']}"
    out.tell(shown, f"Added {row.reference}.", redirect)


@app.command()
@click.argument("reference", metavar="PROVIDER/NAME")
@_secret_file
@reporting
def rotate(out: Output, reference: str, *, secret_file: IO[bytes] | None) -> None:
    """Replace the client secrets of an app; keep the old one second until the provider has dropped it.

    \b
    Example:
      drawbridge app rotate hubspot/eu --secret-file secrets.txt
    """
    secrets = read_secrets(secret_file, what="Client secret")
    with services() as opened:
        row = opened.apps.rotate(opened.apps.find(reference), secrets=secrets)
        shown = _shown(opened, row)
    out.tell(shown | {"secrets": len(secrets)}, f"{row.reference} has {len(secrets)} secret(s) now.")


@app.command()
@click.argument("reference", metavar="PROVIDER/NAME")
@reporting
def remove(out: Output, reference: str) -> None:
    """Forget an app that no connection goes through.

    \b
    Example:
      drawbridge app remove salesforce/emea
    """
    with services() as opened:
        row = opened.apps.find(reference)
        opened.apps.remove(row)
    out.tell({"app": row.reference, "removed": True}, f"Removed {row.reference}.")


def _shown(opened: Services, row: AppRow) -> dict[str, Any]:
    return {
        "app": row.reference,
        "provider": row.provider,
        "name": row.name,
        "source": row.source,
        "client_id": row.client_id,
        "scopes": row.scopes,
        "optional_scopes": row.optional_scopes,
        "options": row.options,
        "redirect_uri": opened.apps.redirect_uri(row.provider),
        "paused_until": row.open_until if row.open_until and row.open_until > opened.clock.now() else None,
        "paused_for": row.open_reason if row.open_until and row.open_until > opened.clock.now() else None,
        "created_at": row.created_at,
    }


def _split(reference: str) -> tuple[str, str]:
    provider, slash, name = reference.partition("/")
    if not slash or _NAME.fullmatch(name) is None:
        raise click.UsageError(
            "Name the app PROVIDER/NAME, like salesforce/emea; NAME has a-z, 0-9, '.', '_' and '-'."
        )
    return provider, name


def _options(pairs: Sequence[str]) -> Mapping[str, str]:
    if bad := [pair for pair in pairs if "=" not in pair]:
        raise click.UsageError(f"--option takes KEY=VALUE, not {bad[0]!r}.")
    return dict(pair.split("=", 1) for pair in pairs)


def _scopes(opened: Services, setting: str, given: str | None) -> tuple[str, ...]:
    if given is not None:
        return tuple(dict.fromkeys(given.replace(",", " ").split()))
    return tuple(getattr(opened.settings, setting, ()))
