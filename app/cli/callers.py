"""`caller`: who may ask, and for what."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

import click

from app.cli.opening import services
from app.cli.output import Output, OutputRefused, reporting
from app.cli.secret_input import read_bytes

if TYPE_CHECKING:
    from app.access.callers import Added, Caller, Registration
    from app.access.permissions import Permission

__all__ = ["caller"]

_name = click.argument("name")
_permission = click.argument("permission", metavar="ACTION@PATTERN")


@click.group()
def caller() -> None:
    """Who may ask for tokens, and for which.

    \b
    Actions: token:issue  connection:read  connection:manage  sync:read  sync:write
    A pattern is a connection's name, with * for any run of characters.
    """


@caller.command()
@_name
@click.option("--allow", multiple=True, metavar="ACTION@PATTERN", help="Give a permission; may be repeated.")
@click.option(
    "--jwks", type=click.File("rb"), help="Public keys (JWK Set): it signs instead of sharing a secret."
)
@click.option("--jwks-uri", help="The same, published by the caller under an https URL.")
@click.option("--allow-ip", multiple=True, metavar="CIDR", help="Accept it only from there; may be repeated.")
@click.option("--rate", type=float, help="Requests per second it may make.")
@reporting
def add(
    out: Output,
    name: str,
    *,
    allow: Sequence[str],
    jwks: IO[bytes] | None,
    jwks_uri: str | None,
    allow_ip: Sequence[str],
    rate: float | None,
) -> None:
    """Register a caller; prints its client_id and, this once, its client_secret.

    \b
    Example:
      drawbridge caller add apex --allow token:issue@hubspot-* --rate 20
    """
    permissions = [_parsed(text) for text in allow]
    keys = None if jwks is None else _key_set(jwks)
    with services() as opened:
        added = opened.callers.add(
            name, allow=permissions, jwks=keys, jwks_uri=jwks_uri, allow_ips=allow_ip, rate=rate
        )
        _tell_added(out, added)  # before anything else can fail: the secret is kept nowhere


@caller.command()
@_name
@_permission
@reporting
def allow(out: Output, name: str, permission: str) -> None:
    """Give a permission.

    \b
    Example:
      drawbridge caller allow apex token:issue@acme-hubspot
    """
    with services() as opened:
        changed = opened.callers.allow(name, _parsed(permission))
    out.tell(_shown(changed), f"{name} may {permission}.")


@caller.command()
@_name
@_permission
@reporting
def deny(out: Output, name: str, permission: str) -> None:
    """Take a permission away, exactly as it was given; it acts everywhere within a second.

    \b
    Example:
      drawbridge caller deny apex token:issue@acme-hubspot
    """
    with services() as opened:
        changed = opened.callers.deny(name, _parsed(permission))
    out.tell(_shown(changed), f"{name} no longer has {permission}.")


@caller.command("list")
@reporting
def list_(out: Output) -> None:
    """List the callers with their permissions; never a secret.

    \b
    Example:
      drawbridge caller list
    """
    with services() as opened:
        rows = [_registered(registration) for registration in opened.callers.list()]
    columns = {
        "name": "NAME",
        "client_id": "CLIENT ID",
        "enabled": "ENABLED",
        "way": "BY",
        "permissions": "PERMISSIONS",
        "last_used_at": "LAST ASKED",
    }
    out.table(rows, columns, nothing="No caller; add one: drawbridge caller add NAME --allow ACTION@PATTERN.")


@caller.command()
@_name
@click.option("--jwks", type=click.File("rb"), help="The new public keys of a caller that signs.")
@reporting
def rotate(out: Output, name: str, *, jwks: IO[bytes] | None) -> None:
    """Replace the secret; the old one and every token made with it are refused from now on.

    \b
    Example:
      drawbridge caller rotate apex
    """
    keys = None if jwks is None else _key_set(jwks)
    with services() as opened:
        added = opened.callers.rotate(name, jwks=keys)
        _tell_added(out, added)  # before anything else can fail: the secret is kept nowhere


@caller.command()
@_name
@reporting
def disable(out: Output, name: str) -> None:
    """Refuse a caller, tokens made before included, until it is enabled again.

    \b
    Example:
      drawbridge caller disable apex
    """
    with services() as opened:
        changed = opened.callers.disable(name)
    out.tell(_shown(changed), f"Disabled {name}.")


@caller.command()
@_name
@reporting
def enable(out: Output, name: str) -> None:
    """Accept a caller again; tokens made before stay refused.

    \b
    Example:
      drawbridge caller enable apex
    """
    with services() as opened:
        changed = opened.callers.enable(name)
    out.tell(_shown(changed), f"Enabled {name}.")


@caller.command()
@_name
@reporting
def remove(out: Output, name: str) -> None:
    """Remove a caller with its permissions.

    \b
    Example:
      drawbridge caller remove apex
    """
    with services() as opened:
        opened.callers.remove(name)
    out.tell({"name": name, "removed": True}, f"Removed {name}.")


def _parsed(text: str) -> Permission:
    from app.access.permissions import Permission

    return Permission.parse(text)


def _key_set(file: IO[bytes]) -> Mapping[str, Any]:
    try:
        data = json.loads(read_bytes(file))
    except ValueError:
        raise click.UsageError(f"{file.name} is not JSON.") from None
    if not isinstance(data, dict):
        raise click.UsageError(f"{file.name} holds no JWK Set.")
    return data


def _tell_added(out: Output, added: Added) -> None:
    secret = None if added.client_secret is None else added.client_secret.reveal()
    data = _shown(added.caller) | ({} if secret is None else {"client_secret": secret})
    lines = [f"client_id      {added.caller.client_id}"]
    if secret is not None:
        lines.append(f"client_secret  {secret}")
    try:
        out.hand_over(data, *lines)
    except OutputRefused as refused:
        if secret is None:
            raise
        raise OutputRefused(
            f"{refused.message} The secret is lost; make another: drawbridge caller rotate {added.caller.name}"
        ) from refused
    if secret is not None and not out.as_json:
        click.echo(
            "The secret is shown this once and kept nowhere; put it where the caller reads it.", err=True
        )


def _shown(one: Caller) -> dict[str, Any]:
    return {
        "name": one.name,
        "client_id": one.client_id,
        "enabled": one.enabled,
        "permissions": [str(permission) for permission in one.permissions],
        "allow_ips": [str(network) for network in one.allow_ips],
        "rate": one.rate,
    }


def _registered(registration: Registration) -> dict[str, Any]:
    return _shown(registration.caller) | {
        "way": registration.way,
        "jwks_uri": registration.jwks_uri,
        "created_at": registration.created_at,
        "last_used_at": registration.last_used_at,
    }
