"""`migrate`, `check` and `adopt`: the installation as a whole."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from app.cli.opening import read_settings, services
from app.cli.output import Output, reporting
from app.errors import ConfigurationFault, DrawbridgeError

if TYPE_CHECKING:
    from app.settings import Settings

__all__ = ["adopt", "check", "migrate"]


@click.command(short_help="Bring the database up to date.")
@reporting
def migrate(out: Output) -> None:
    """Bring the database up to date; safe to run from several hosts at once, and again.

    \b
    Example:
      drawbridge migrate
    """
    from app.bootstrap import prepare_database
    from app.telemetry import configure

    settings = read_settings()
    configure(settings.log_level)  # as much a part of serving as the processes after it: `up` begins with it
    changed = prepare_database(settings)
    out.tell(
        {"changed": changed},
        "The database is up to date." if changed else "The database was up to date already.",
    )


@click.command(short_help="List what is wrong with settings, keys, database.")
@reporting
def check(out: Output) -> None:
    """List everything that is wrong with settings, keys and database; exit code 1 if anything is.

    \b
    Example:
      drawbridge check
    """
    from app.telemetry import configure

    configure("CRITICAL")
    notes: list[str] = []
    try:
        settings = read_settings()
    except ConfigurationFault as fault:
        faults = list(fault.faults)
    else:
        faults = [
            *_faults(lambda: _look_at_state(settings)),
            *_faults(lambda: _look_at_data(settings, notes)),
        ]
    out.tell(
        {"ok": not faults, "faults": faults, "notes": notes}, *(faults or ["Everything is in order."]), *notes
    )
    if faults:
        raise SystemExit(1)


@click.command(short_help="Refresh from this database after a restore or copy.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@reporting
def adopt(out: Output, *, yes: bool) -> None:
    """Declare that no other installation uses this data any more, so that refreshing goes on.

    Needed after restoring a backup or copying the database: two installations that refresh the same grants revoke each
    other's tokens. Restart the serving processes afterwards.

    \b
    Example:
      drawbridge adopt
    """
    with services() as opened:
        reason = opened.adoption.disagreement()
        if reason is not None:
            click.echo(reason.says, err=True)
        if not yes:
            click.confirm(
                "Is every other installation with this data stopped for good?", abort=True, err=True
            )
        was = opened.adoption.adopt()
    said = was.code if was else None
    line = (
        "Adopted; refreshing goes on."
        if was
        else "Nothing was in the way; this installation goes on as it was."
    )
    out.tell({"adopted": True, "was": said}, line)


def _faults(look: Callable[[], None]) -> list[str]:
    try:
        look()
    except ConfigurationFault as fault:
        return list(fault.faults)
    except DrawbridgeError as fault:
        return [fault.detail]
    return []


def _look_at_state(settings: Settings) -> None:
    try:
        settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=settings.state_dir) as file:
            os.fsync(file.fileno())
    except OSError as fault:
        raise ConfigurationFault(
            [f"DRAWBRIDGE_STATE_DIR ({settings.state_dir}) cannot be written: {fault.strerror}."]
        ) from None


def _look_at_data(settings: Settings, notes: list[str]) -> None:
    """Keys first, for they can be wrong before there is a database; then the database, then both together."""
    from app.broker.installation import unlock
    from app.clock import Clock
    from app.crypto.keyring import Keyring
    from app.db.engine import open_databases
    from app.db.migrate import require_current

    keyring = Keyring.load(settings)
    database, audit_database = open_databases(settings, Clock())
    with contextlib.ExitStack() as ending:
        ending.callback(database.dispose)
        ending.callback(audit_database.dispose)
        file = database.url.database
        if database.dialect == "sqlite" and file and not Path(file).exists():
            notes.append("There is no database yet; `drawbridge up` or `drawbridge migrate` makes it.")
            return
        require_current(database, audit_database)
        unlock(database, keyring)
