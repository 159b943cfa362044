"""Run all tests: `./drawbridge test [--without PART] [--install-only] [pytest's own arguments]`.

The launcher has put the Python packages of the development group into the environment this runs in. What else
the tests need is looked for, installed where this process may install, and otherwise fails by name: a part is
left out only by somebody's word, and then it is printed. The exit code is pytest's.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import psycopg

from tests.postgres import URL_VARIABLE, PostgresUnavailableError, find_binaries

ROOT = Path(__file__).parents[1]
BROWSER_VARIABLE = "DRAWBRIDGE_TEST_BROWSER"
PROCESSES_VARIABLE = "DRAWBRIDGE_TEST_PROCESSES"
BROWSER_PROGRAMS = ("chromium-headless-shell", "chromium", "google-chrome")


class MissingPartError(Exception):
    """A part the tests need is not here and cannot be installed; the message names it and the next step."""


def main(arguments: list[str]) -> None:
    """Make the parts ready, print which are used and become pytest, whose exit code this then is."""
    parser = argparse.ArgumentParser(
        prog="./drawbridge test",
        description="Install what the tests need and run them all. Other arguments go to pytest.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--without", action="append", default=[], choices=sorted(PARTS), help="leave a part out"
    )
    parser.add_argument("--install-only", action="store_true", help="make the parts ready and run nothing")
    options, for_pytest = parser.parse_known_args(arguments)
    for part, ready in PARTS.items():
        try:
            say(f"{part}: left out on request" if part in options.without else f"{part}: {ready()}")
        except MissingPartError as error:
            say(f"{part}: MISSING. {error}; or leave it out with --without {part}")
            sys.exit(1)
    if not options.install_only:
        become_pytest(
            [*side_by_side(for_pytest), *(f"--without-{part}" for part in options.without), *for_pytest]
        )


def side_by_side(for_pytest: list[str]) -> list[str]:
    """Return how pytest shares the tests among processes; a debugger, or a number given by hand, goes without.

    Many tests wait for clocks and processes, so there is one process more than cores.
    """
    if any(argument.startswith(("-n", "--numprocesses", "--pdb", "--trace")) for argument in for_pytest):
        return []
    number = os.environ.get(PROCESSES_VARIABLE) or str((os.cpu_count() or 1) + 1)
    return ["--numprocesses", number, "--dist", "worksteal"]


def become_pytest(arguments: list[str]) -> NoReturn:
    """Replace this process by pytest in the project's folder, so that signals and exit code are its own."""
    say("running: " + " ".join(["pytest", *arguments]))
    os.chdir(ROOT)
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *arguments])  # noqa: S606


def ready_postgres() -> str:
    """Return which PostgreSQL the tests will use."""
    named = os.environ.get(URL_VARIABLE)
    if not named:
        return f"a temporary server from {postgres_binaries()}"
    address = urlsplit(named)
    try:
        psycopg.connect(named, connect_timeout=10).close()
    except psycopg.Error as error:
        raise MissingPartError(
            f"{URL_VARIABLE} names {address.hostname}:{address.port}, which does not answer ({error}); "
            "correct it or unset it"
        ) from error
    return f"the server {address.hostname}:{address.port} named by {URL_VARIABLE}"


def postgres_binaries() -> Path:
    """Return the directory of the binaries a temporary server is made from."""
    try:
        return find_binaries()
    except PostgresUnavailableError as error:
        raise MissingPartError(str(error)) from error


def ready_browser() -> str:
    """Return the headless browser the tests will drive, installing Debian's when there is none and we may."""
    if not any((ROOT / "tests" / "browser").glob("**/test_*.py")):
        return "no test needs one"
    program = os.environ.get(BROWSER_VARIABLE) or find_browser() or install_browser()
    if not os.access(program, os.X_OK):
        raise MissingPartError(
            f"{BROWSER_VARIABLE} names {program}, which is not a program; correct it or unset it"
        )
    os.environ[BROWSER_VARIABLE] = program  # the fixtures of tests/browser start this one
    return program


def find_browser() -> str | None:
    """Return the first Chromium on PATH."""
    return next((found for name in BROWSER_PROGRAMS if (found := shutil.which(name))), None)


def install_browser() -> str:
    """Install Debian's headless Chromium, which root on Debian may, and return its path."""
    package = BROWSER_PROGRAMS[0]
    by_hand = f"no Chromium was found; apt-get install {package}, or name one in {BROWSER_VARIABLE}"
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise MissingPartError(by_hand)
    say(f"browser: installing {package} with apt-get …")
    quietly = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for step in (["update"], ["install", "--yes", "--no-install-recommends", package]):
        done = subprocess.run(
            ["apt-get", "--quiet", "--quiet", *step],
            env=quietly,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise MissingPartError(f"apt-get {step[0]} failed ({done.stderr.strip()}); {by_hand}")
    return find_browser() or f"/usr/bin/{package}"


def say(line: str) -> None:
    """Print one line about the run at once, ahead of what pytest prints."""
    print(f"drawbridge test: {line}", flush=True)


PARTS: dict[str, Callable[[], str]] = {"postgres": ready_postgres, "browser": ready_browser}


if __name__ == "__main__":
    main(sys.argv[1:])
