"""The root of the command line, and what a failure looks like."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import PurePath
from typing import Any, Final, NoReturn

import click

from app.cli.admin import admin
from app.cli.apps import app
from app.cli.audit import audit
from app.cli.callers import caller
from app.cli.connections import connection
from app.cli.installation import adopt, check, migrate
from app.cli.keys import keys
from app.cli.serving import demo, up, web, worker
from app.errors import ConfigurationFault, DrawbridgeError, InvalidRequest, Unauthenticated

__all__ = ["main", "program"]


# Hints that speak to the author of an HTTP request, and the one that says nothing.
_FOR_OTHERS: Final = frozenset({DrawbridgeError.hint, InvalidRequest.hint, Unauthenticated.hint})


class Refused(click.ClickException):
    """What we refuse or fail at, as a person reads it; exit code 1."""

    exit_code = 1

    def __init__(self, error: DrawbridgeError) -> None:
        self._faults = error.faults if isinstance(error, ConfigurationFault) else (error.detail,)
        self._hint = "" if error.hint in _FOR_OTHERS else error.hint
        super().__init__(error.detail)

    def show(self, file: Any = None) -> None:
        """Print each fault on a line of its own, then what can be done about it."""
        for fault in self._faults:
            click.echo(f"drawbridge: {fault}", err=True)
        if self._hint:
            click.echo(f"  {self._hint}", err=True)


class Program(click.Group):
    """A group in the order its commands were written down, whose failures are sentences."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order a newcomer needs them."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; whatever goes wrong becomes a sentence and exit code 1."""
        try:
            return super().invoke(ctx)
        except DrawbridgeError as error:
            raise Refused(error) from error
        except BrokenPipeError:
            _stop_writing()
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            raise click.ClickException(_our_fault(error)) from error


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Settings come from the environment (DRAWBRIDGE_…) over config/settings.toml; `check` lists what is wrong.",
)
def program() -> None:
    """Drawbridge: keeps the OAuth tokens of HubSpot and Salesforce accounts and hands them to whom you allow.

    \b
    A first look, with both vendors emulated:   drawbridge demo
    The real thing on one machine:              drawbridge up
    """


for command in (demo, up, web, worker, migrate, check, adopt, admin, app, connection, caller, keys, audit):
    program.add_command(command)


def main() -> NoReturn:
    """Run the command line and exit."""
    program(prog_name="drawbridge")
    raise SystemExit(0)


def _our_fault(error: Exception) -> str:
    """An error nobody foresaw, without its message: that may quote a secret."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = "/".join(PurePath(frame.filename).parts[-3:])
    reason = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
    return f"{type(error).__name__}{reason} at {place}:{frame.lineno}. This is a fault of the program; please report it."


def _stop_writing() -> NoReturn:
    """Whoever read our output has gone; that is its right. Nothing may be flushed into the closed pipe at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)
