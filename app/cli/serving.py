"""`up`, `web`, `worker` and `demo`: the processes that serve."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import click

from app.cli.opening import ROOT, read_settings
from app.cli.output import Output, reporting

__all__ = ["demo", "program_environment", "up", "web", "with_whole_paths", "worker"]


_DEMO: Final = "emulator.demo"
_NAMES_A_FILE: Final = re.compile(r"DRAWBRIDGE_[A-Z_]+_FILE")


@click.command(short_help="A tour with both vendors emulated; touches nothing of yours.")
@click.option("--exit", "leave", is_flag=True, help="End after the tour instead of staying up.")
@reporting
def demo(out: Output, *, leave: bool) -> None:
    """Show the whole main job on this machine, with an emulated HubSpot and Salesforce; touches nothing of yours.

    \b
    Example:
      drawbridge demo --exit
    """
    # Only its name is known here: to the product the emulator is one more host.
    if importlib.util.find_spec(_DEMO.partition(".")[0]) is None:
        raise click.ClickException(
            "The demo is not part of this installation; run it from the project's folder."
        )
    flags = [*(["--exit"] if leave else []), *(["--json"] if out.as_json else [])]
    _become(["-m", _DEMO, *flags], program_environment())


@click.command(short_help="Serve HTTP.")
@reporting
def web(out: Output) -> None:
    """Serve HTTP; several may run on several hosts over one PostgreSQL. Stop it with SIGTERM.

    \b
    Example:
      DRAWBRIDGE_BIND=0.0.0.0:8080 drawbridge web
    """
    settings = read_settings()  # the faults come as sentences from here, not as a traceback out of a server
    if out.as_json:
        out.tell({"kind": "web", "pid": os.getpid(), "bind": settings.bind, "url": settings.public_url})
        sys.stdout.flush()
    command = ["-m", "gunicorn", "--config", str(ROOT / "config" / "gunicorn.conf.py")]
    _become(command, with_whole_paths(program_environment()))


@click.command(short_help="Refresh ahead of time; carry out disconnects.")
@reporting
def worker(out: Output) -> None:
    """Refresh tokens before they run out and carry out what was disconnected; several may run. Stop it with SIGTERM.

    \b
    Example:
      drawbridge worker
    """
    from app.bootstrap import bootstrap
    from app.jobs.worker import Worker
    from app.telemetry import configure

    settings = read_settings()
    configure(settings.log_level)
    running = Worker(bootstrap(settings, kind="worker"))
    # A refresh that has begun is always finished, however often somebody asks: cutting it off could cost the grant.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: running.stop())
    if out.as_json:
        out.tell({"kind": "worker", "pid": os.getpid()})
        sys.stdout.flush()
    running.run()


@click.command(short_help="Migrate, then web and worker under one supervisor.")
@reporting
def up(out: Output) -> None:
    """Bring the database up to date, then run web and worker together. Stop it with SIGTERM or Ctrl-C.

    \b
    Example:
      drawbridge up
    """
    from app.cli.supervisor import Supervisor
    from app.clock import Clock

    settings = read_settings()
    supervisor = Supervisor(
        {"web": _own("web"), "worker": _own("worker")},
        clock=Clock(),
        environment=program_environment(),
        # A running refresh may take as long as its lease; ten seconds more to store it, and some to wind up.
        patience=settings.lease_seconds + 30.0,
    )
    supervisor.prepare(_own("migrate"))
    url = settings.public_url

    def ready() -> None:
        login = "drawbridge admin login-link"
        out.tell(
            {"url": url, "pid": os.getpid()}, f"Drawbridge runs at {url}", f"Sign in as an admin: {login}"
        )
        sys.stdout.flush()

    raise SystemExit(supervisor.run(bind=settings.bind, ready=ready))


def program_environment() -> dict[str, str]:
    """The environment of a child that is to find this program wherever the caller stands."""
    path = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{path}" if path else str(ROOT)}


def with_whole_paths(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with the files it names made absolute: gunicorn works in the program's folder, not the caller's."""
    return {
        name: str(Path(value).absolute()) if value and _NAMES_A_FILE.fullmatch(name) else value
        for name, value in environment.items()
    }


def _own(command: str) -> list[str]:
    return [sys.executable, "-P", "-m", "app", command]


def _become(arguments: list[str], environment: Mapping[str, str]) -> None:
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-P", *arguments], environment)  # noqa: S606 - our own modules
