"""`connection`: the linked accounts."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import click

from app.cli.opening import ACTOR, services
from app.cli.output import Output, OutputRefused, as_text, reporting
from app.cli.sealed_file import sealed_file
from app.cli.secret_input import read_bytes, read_secret

if TYPE_CHECKING:
    from app.bootstrap import Services
    from app.broker.connection import Connection
    from app.broker.doctor import Diagnosis, Vitals
    from app.secret import Secret

__all__ = ["connection"]

_PAGE: Final = 500
_POLL: Final = 0.25  # seconds between two looks while another process refreshes
_ABOUT_PRINTED: Final = (
    "It is not certain that what was printed must not be used. Look at `drawbridge connection show {name}`: if exported_at"
    " says when, it is the connection's only copy; if it says nothing, destroy it and export again."
)
_name = click.argument("name")
_app = click.option("--app", "app_name", metavar="APP", help="The app, as PROVIDER/NAME or PROVIDER.")


@click.group()
def connection() -> None:
    """Linked accounts: connect, look, move, switch off, disconnect."""


@connection.command()
@_name
@click.option(
    "--app", "app_name", metavar="APP", required=True, help="The app, as PROVIDER/NAME or PROVIDER."
)
@click.option("--grant", type=click.Choice(["jwt_bearer", "client_credentials"]), required=True)
@click.option("--subject", help="jwt_bearer: the user to act for.")
@click.option(
    "--key-file", type=click.File("rb"), help="jwt_bearer: private key in PEM; - is standard input."
)
@reporting
def add(
    out: Output, name: str, *, app_name: str, grant: Any, subject: str | None, key_file: IO[bytes] | None
) -> None:
    """Connect an account without a browser, by a grant that mints its tokens.

    \b
    Example:
      drawbridge connection add sf-prod --app salesforce/emea --grant jwt_bearer \\
          --subject integration@example.com --key-file server.key
    """
    if (grant == "jwt_bearer") != (subject is not None) or (grant == "jwt_bearer") != (key_file is not None):
        raise click.UsageError(
            "--grant jwt_bearer takes --subject and --key-file; client_credentials takes neither."
        )
    key = None if key_file is None else read_secret(key_file)
    with services() as opened:
        row = opened.connect.add_minted(
            opened.apps.find(app_name), name=name, grant_type=grant, subject=subject, private_key=key
        )
        shown = _shown(opened, row)
    out.tell(shown, f"Connected {row.name} ({row.provider} {row.account_id}).")


@connection.command()
@_name
@click.option(
    "--app", "app_name", metavar="APP", required=True, help="The app, as PROVIDER/NAME or PROVIDER."
)
@reporting
def link(out: Output, name: str, *, app_name: str) -> None:
    """Make a one-time URL with which somebody else connects an account, within 24 hours.

    With the name of an existing connection it is for connecting that account again.

    \b
    Example:
      drawbridge connection link acme-hubspot --app hubspot
    """
    with services() as opened:
        row = opened.apps.find(app_name)
        token, expires_at = opened.connect.make_link(row, name=name)
        url = f"{opened.settings.public_url}/connect/{row.provider}?link={token.reveal()}"
    out.tell({"url": url, "name": name, "app": row.reference, "expires_at": expires_at}, url)


@connection.command("list")
@_app
@click.option("--state", help="Only those in this state: healthy, retrying, needs_reconnect, disabled, …")
@reporting
def list_(out: Output, *, app_name: str | None, state: str | None) -> None:
    """List connections by name; never a token.

    \b
    Example:
      drawbridge connection list --state needs_reconnect
    """
    with services() as opened:
        app_id = None if app_name is None else opened.apps.find(app_name).id
        found = list(_all(opened, app_id=app_id, state=state))
        told = opened.examiner.vitals(found)
        rows = [_shown(opened, row, told[row.id]) for row in found]
    columns = {
        "name": "NAME",
        "app": "APP",
        "account_id": "ACCOUNT",
        "state": "STATE",
        "expires_at": "TOKEN EXPIRES",
        "last_error": "LAST ERROR",
    }
    out.table(rows, columns, nothing="No connection; make one: drawbridge connection link NAME --app APP.")


@connection.command()
@_name
@reporting
def show(out: Output, name: str) -> None:
    """Show one connection: state, expiry, scopes, last refresh, last error; never a token.

    \b
    Example:
      drawbridge connection show acme-hubspot
    """
    with services() as opened:
        shown = _shown(opened, opened.store.named(name))
    width = max(map(len, shown))
    lines = (f"{key.ljust(width)}  {as_text(value)}" for key, value in shown.items())
    out.tell(shown, *lines)


@connection.command()
@_name
@reporting
def doctor(out: Output, name: str) -> None:
    """Say what is the matter with a connection: whose fault it is, who mends it, and how. Exit code 0 when it is well.

    \b
    Example:
      drawbridge connection doctor acme-hubspot
    """
    with services() as opened:
        row = opened.store.named(name)
        found = opened.examiner.examine(row)
    data = {"name": row.name, "state": row.state, "healthy": found.healthy} | asdict(found)
    out.tell(data, *_diagnosed(row, found))
    if not found.healthy:
        raise click.exceptions.Exit(1)


@connection.command("import")
@click.option(
    "--key-file", type=click.File("rb"), help="Private key (X25519, PEM): the lines were made by `export`."
)
@click.option(
    "--app",
    "app_name",
    metavar="APP",
    help="The app of lines that name none; default: the provider's default.",
)
@click.option(
    "--replace",
    is_flag=True,
    help="Store lines over tokens that are in use here and were refreshed since, too.",
)
@reporting
def import_(out: Output, *, key_file: IO[bytes] | None, app_name: str | None, replace: bool) -> None:
    """Read connections from standard input, one JSON object a line, and store each that is in order.

    Fields: provider, app, account_id, user_id, access_token, refresh_token, expires_at, scopes, instance_url,
    name; provider, account_id and one of the tokens are needed. Exit code 1 when a line failed; the others are stored.
    The same lines may be imported again: one whose connection has newer tokens by now is refused.

    \b
    Example:
      drawbridge connection import < connections.jsonl
      drawbridge connection import --key-file private.pem < moved.txt
    """
    key = None if key_file is None else read_secret(key_file)
    results: list[dict[str, Any]] = []
    with services() as opened, out.progress("importing") as move:
        default = None if app_name is None else opened.apps.find(app_name).name
        lines = list(_lines(key, default))
        for result in opened.transfer.import_lines(lines, replace=replace):
            data = {
                "line": result.line,
                "outcome": result.outcome,
                "name": result.name,
                "problem": result.problem,
            }
            results.append(data)
            move(result.line, len(lines))
            if not out.as_json:
                click.echo(f"line {result.line}: {result.outcome} {result.name or result.problem}")
    failed = sum(result["outcome"] == "failed" for result in results)
    stored = len(results) - failed
    out.tell({"stored": stored, "failed": failed, "results": results}, f"{stored} stored, {failed} failed.")
    if failed:
        raise click.ClickException(
            f"{failed} of {len(results)} lines were not stored; correct them and import them again."
        )


@connection.command()
@_name
@click.option(
    "--to",
    "key_file",
    type=click.File("rb"),
    required=True,
    help="Public key (X25519, PEM) of who takes it over.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write there instead of standard output.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@reporting
def export(out: Output, name: str, *, key_file: IO[bytes], output: Path | None, yes: bool) -> None:
    """Seal a connection for another installation, which takes it over: it is never refreshed here again.

    A file that exists is not overwritten. What is being written is called FILE.partial; only after the connection was
    marked as moved it is renamed to FILE. Where FILE.partial stays behind, `connection show` tells with exported_at whether
    it is the only copy.

    \b
    Example:
      openssl genpkey -algorithm X25519 -out private.pem       (there)
      openssl pkey -in private.pem -pubout -out public.pem     (there)
      drawbridge connection export acme-hubspot --to public.pem --output moved.txt
    """
    public_key = read_bytes(key_file)
    if not yes:
        click.confirm(f"{name} will never be refreshed here again. Export it?", abort=True, err=True)
    if output is None:
        _export_printed(out, name, public_key)
        return
    with sealed_file(output) as file, services() as opened:
        opened.transfer.export(
            name,
            public_key_pem=public_key,
            deliver=lambda sealed: file.deliver(base64.b64encode(sealed).decode()),
        )
        file.give_name()
    out.tell({"name": name, "file": str(output)}, f"Wrote {output}; import it there with --key-file.")


@connection.command()
@_name
@reporting
def refresh(out: Output, name: str) -> None:
    """Refresh the token of a connection now and wait for the result.

    \b
    Example:
      drawbridge connection refresh acme-hubspot
    """
    from app.telemetry import Event

    with services() as opened:
        before = opened.store.named(name)
        ending = opened.refresher.ask(before).result()
        detail = {"generation": before.generation}
        opened.access.record(
            ACTOR, Event.REFRESH_ENDED, target=name, outcome=ending.kind.value, detail=detail
        )
        if ending.error is not None:
            raise ending.error
        shown = _shown(opened, _next_generation(opened, before))
    out.tell(shown, f"Refreshed {name}; its token lives until {as_text(shown['expires_at'])}.")


@connection.command()
@_name
@reporting
def disable(out: Output, name: str) -> None:
    """Hand out and refresh nothing of a connection until it is enabled again; the grant is kept.

    \b
    Example:
      drawbridge connection disable acme-hubspot
    """
    with services() as opened:
        shown = _shown(opened, opened.revoker.disable(name))
    out.tell(shown, f"Disabled {name}.")


@connection.command()
@_name
@reporting
def enable(out: Output, name: str) -> None:
    """Undo `disable`.

    \b
    Example:
      drawbridge connection enable acme-hubspot
    """
    with services() as opened:
        shown = _shown(opened, opened.revoker.enable(name))
    out.tell(shown, f"Enabled {name}.")


@connection.command()
@_name
@click.argument("new_name")
@reporting
def rename(out: Output, name: str, new_name: str) -> None:
    """Give a connection another name; permissions go by name, so look at them, too.

    \b
    Example:
      drawbridge connection rename hubspot-1111111 acme-hubspot
    """
    with services() as opened:
        shown = _shown(opened, opened.revoker.rename(name, new_name))
    out.tell(shown, f"{name} is {new_name} now.")


@connection.command()
@_name
@click.option("--yes", is_flag=True, help="Do not ask for the name.")
@click.option(
    "--uninstall",
    is_flag=True,
    help="HubSpot: also remove the app from the whole account, for all its users.",
)
@click.option("--yes-uninstall", is_flag=True, help="Do not ask about --uninstall.")
@reporting
def disconnect(out: Output, name: str, *, yes: bool, uninstall: bool, yes_uninstall: bool) -> None:
    """Hand out nothing from now on, give the grant back at the provider and destroy the tokens.

    \b
    Example:
      drawbridge connection disconnect acme-hubspot
    """
    with services() as opened:
        row = opened.store.named(name)
        if not yes:
            _ask_typed(
                f"This disconnects {row.provider} account {row.account_id}. Type its name to go on", name
            )
        if uninstall and not yes_uninstall:
            question = f"This removes the app from the WHOLE {row.provider} account {row.account_id}, for all its users."
            _ask_typed(f"{question} Type uninstall to go on", "uninstall")
        shown = _shown(opened, opened.revoker.disconnect(name, uninstall=uninstall))
    out.tell(shown, f"{name} is being disconnected; the worker gives the grant back at {row.provider}.")


def _ask_typed(question: str, expected: str) -> None:
    if click.prompt(question, err=True) != expected:
        raise click.ClickException("That is not it; nothing was changed.")


def _all(opened: Services, *, app_id: str | None, state: str | None) -> Iterator[Connection]:
    after = ""
    while page := opened.store.page(after=after, limit=_PAGE, app_id=app_id, state=state):
        yield from page
        after = page[-1].name


def _next_generation(opened: Services, before: Connection) -> Connection:
    """The connection once its generation has moved; another process may be at it, for as long as a lease."""
    from app.errors import RefreshInProgress

    give_up = opened.clock.elapsed() + opened.settings.lease_seconds
    while (now := opened.store.named(before.name)).generation == before.generation:
        if opened.clock.elapsed() > give_up:
            raise RefreshInProgress("Another process refreshes this connection and has not finished.")
        opened.clock.sleep(_POLL)
    return now


def _shown(opened: Services, row: Connection, told: Vitals | None = None) -> dict[str, Any]:
    return {
        "name": row.name,
        "app": opened.apps.row(row.app_id).reference,
        "provider": row.provider,
        "account_id": row.account_id,
        "user_id": row.user_id or None,
        "state": row.state,
        "grant": row.grant_type,
        "generation": row.generation,
        "expires_at": row.expires_at,
        "scopes_wanted": row.scopes_wanted,
        "scopes_granted": row.scopes_granted,
        "instance_url": row.instance_url,
        "last_refresh_at": row.last_refresh_at,
        "last_used_at": row.last_used_at,
        "last_error": row.last_error,
        "last_error_at": row.last_error_at,
        "retry_at": row.retry_at,
        "exported_at": row.exported_at,
        "created_at": row.created_at,
        "connected_at": row.connected_at,
    } | asdict(told or opened.examiner.vitals([row])[row.id])


def _diagnosed(row: Connection, found: Diagnosis) -> Iterator[str]:
    """A diagnosis as people read it."""
    yield f"{row.name}: {row.state}. {found.sentence}"
    if not found.healthy:
        yield f"  fault     {found.fault} ({found.cause}, by {found.code})"
        yield f"  who       {found.who}"
        yield f"  how       {found.how}"
    yield from (f"  evidence  {line}" for line in found.evidence)
    for other in found.others:
        yield f"It may also be ({other.cause}): {other.sentence}"
        yield f"  who       {other.who}"
        yield f"  how       {other.how}"
        yield from (f"  evidence  {line}" for line in other.evidence)


def _lines(key: Secret | None, app: str | None) -> Iterator[str]:
    """The lines of standard input, opened if they are sealed; one that is odd is left for the import to refuse."""
    for raw in sys.stdin.buffer:
        line = raw.decode(errors="surrogateescape")
        clear = line if key is None or not line.strip() else _opened(key, line)
        yield clear if app is None else _with_app(clear, app)


def _opened(key: Secret, line: str) -> str:
    from app.crypto.sealed_box import open_from
    from app.errors import Unopenable

    try:
        return open_from(key, base64.b64decode(line.strip(), validate=True)).decode()
    except (Unopenable, ValueError):  # of other bytes, not Base64, not ASCII, not UTF-8
        return "does not open"


def _with_app(line: str, app: str) -> str:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return line
    return json.dumps({"app": app} | data) if isinstance(data, dict) else line


def _export_printed(out: Output, name: str, public_key: bytes) -> None:
    """Export to standard output, which has to take it before the connection is marked as moved."""
    from app.broker.transfer import ExportUnclear
    from app.errors import DrawbridgeError

    printed = False

    def deliver(sealed: bytes) -> None:
        nonlocal printed
        line = base64.b64encode(sealed).decode()
        try:
            out.hand_over({"name": name, "sealed": line}, line)
        except OutputRefused as refused:
            raise OutputRefused(f"{refused.message} Nothing was exported.") from refused
        printed = True

    with services() as opened:
        try:
            opened.transfer.export(name, public_key_pem=public_key, deliver=deliver)
        except ExportUnclear:
            click.echo(_ABOUT_PRINTED.format(name=name), err=True)
            raise
        except DrawbridgeError:
            if printed:
                click.echo("Nothing was exported; what was printed must not be used.", err=True)
            raise
