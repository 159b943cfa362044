"""`python -m tests.chaos [--profile short|long] [--database postgresql|sqlite] [--rounds N] [--seed S] [--json]`.

Runs the scenarios side by side, each in a process of its own, and prints a table. Exit 0 when every promise held, 1 when one
was broken, 130 when it was interrupted; then the table shows what there is.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from app.telemetry import configure
from tests.chaos.child import BREAKS
from tests.chaos.profiles import PACES
from tests.chaos.scenarios import answers, database, disk, leases, provider, rejected, stopping
from tests.chaos.stage import Run
from tests.chaos.tally import Tally, draw
from tests.postgres import ExternalServer, PostgresServer, temporary_server

# Scenario, where it runs, how it runs; the longest first.
SCENARIOS: Final[Sequence[tuple[str, tuple[str, ...], Callable[[Run], None]]]] = (
    ("leases", ("postgresql", "sqlite"), leases.run),
    ("database", ("postgresql",), database.run),
    ("stopping", ("postgresql", "sqlite"), stopping.run),
    ("answers", ("postgresql", "sqlite"), answers.run),
    ("provider", ("postgresql", "sqlite"), provider.run),
    ("disk", ("sqlite",), disk.run),
    ("rejected", ("postgresql",), rejected.run),
)


def main() -> int:
    """Run what the command line asks for."""
    options = _parser().parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    if options.inside:
        return _run_inside(options)
    return _run_all(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Chaos, with real processes.")
    parser.add_argument("--profile", choices=sorted(PACES), default="short")
    parser.add_argument("--database", choices=["postgresql", "sqlite"], help="only what runs on this one")
    parser.add_argument("--rounds", type=int, help="rounds of every scenario, instead of the profile's")
    parser.add_argument("--seed", type=int, help="of the dice; printed, so that a run can be repeated")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object per scenario instead of the table"
    )
    parser.add_argument(
        "--only", action="append", choices=[name for name, _, _ in SCENARIOS], help="this scenario"
    )
    parser.add_argument("--at-once", type=int, default=5, help="scenarios side by side")
    parser.add_argument(
        "--break", dest="rule", choices=sorted(BREAKS), help="break this rule of the product on purpose"
    )
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep what the processes logged")
    parser.add_argument("--inside", metavar="SERVER", help=argparse.SUPPRESS)
    return parser


# One scenario, in a process of its own


def _run_inside(options: argparse.Namespace) -> int:
    configure("ERROR")  # the table is what this process has to say
    (name,) = options.only
    tally = Tally(name, options.database)
    began = time.monotonic()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="drawbridge-chaos-") as folder,
            _database(options, Path(folder)) as (url, server),
        ):
            pace = PACES[options.profile][name]
            if options.rounds:
                pace = replace(pace, rounds=options.rounds)
            dice = random.Random(f"{options.seed} {name} {options.database}")
            run = Run(pace, dice, options.seed, url, Path(folder), tally, server, options.rule)
            with contextlib.ExitStack() as afterwards:
                if options.logs:
                    afterwards.callback(_keep_logs, Path(folder), options.logs / f"{name}-{options.database}")
                next(each for title, _, each in SCENARIOS if title == name)(run)
    except KeyboardInterrupt:
        tally.interrupted = True
    except Exception as error:  # noqa: BLE001 - the table must show it beside the others
        traceback.print_exc()
        tally.break_(f"the scenario itself failed: {type(error).__name__}: {error}")
    tally.seconds = round(time.monotonic() - began, 1)
    print(tally.to_json(), flush=True)
    return 0


@contextmanager
def _database(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, PostgresServer | None]]:
    """An empty database; for the scenario that breaks PostgreSQL on a server of its own."""
    if options.database == "sqlite":
        yield f"sqlite:///{folder / 'drawbridge.db'}", None
    elif options.only == ["database"]:
        with temporary_server() as server:
            yield server.create_database(), server
    else:
        shared = ExternalServer(options.inside)
        url = shared.create_database()
        try:
            yield url, None
        finally:
            shared.drop_database(url)


def _keep_logs(folder: Path, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    for log in folder.glob("*.log"):
        shutil.copy(log, to)


# All of them


def _run_all(options: argparse.Namespace) -> int:
    options.seed = secrets.randbelow(1_000_000) if options.seed is None else options.seed
    print(f"profile {options.profile}, seed {options.seed}", file=sys.stderr, flush=True)
    chosen = [
        (name, kind)
        for name, kinds, _ in SCENARIOS
        for kind in kinds
        if kind == options.database or (not options.database and kind in PACES[options.profile][name].on)
        if not options.only or name in options.only
    ]
    with _server(chosen) as server_url:
        tallies, interrupted = _gather(options, chosen, server_url)
    if options.json:
        for tally in tallies:
            print(tally.to_json(), flush=True)
    else:
        print(draw(tallies), flush=True)
    if any(tally.broken for tally in tallies):
        return 1
    return 130 if interrupted else 0


@contextmanager
def _server(chosen: Sequence[tuple[str, str]]) -> Iterator[str]:
    if not any(kind == "postgresql" for _, kind in chosen):
        yield "none"
        return
    with temporary_server() as server:
        yield server.url()


def _gather(
    options: argparse.Namespace, chosen: Sequence[tuple[str, str]], server_url: str
) -> tuple[list[Tally], bool]:
    """The tallies in the order of the table. An interrupt asks all scenarios for what they have."""
    children: list[subprocess.Popen[str]] = []
    stopping = threading.Event()

    def carry_out(name: str, kind: str) -> Tally | None:
        if stopping.is_set():
            return None
        command = _command(options, name, kind, server_url)
        # In a session of its own: an interrupt typed at the terminal comes from here, once.
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        children.append(child)
        said, _ = child.communicate()
        return _last_words(said, name, kind)

    with ThreadPoolExecutor(options.at_once) as pool:
        futures = [pool.submit(carry_out, *pair) for pair in chosen]
        try:
            wait(futures)
        except KeyboardInterrupt:
            stopping.set()
            for child in children:
                if child.poll() is None:
                    child.send_signal(signal.SIGINT)
    tallies = [tally for future in futures if (tally := future.result()) is not None]
    return tallies, stopping.is_set()


def _command(options: argparse.Namespace, name: str, kind: str, server_url: str) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "tests.chaos",
        "--inside",
        server_url,
        "--only",
        name,
        "--database",
        kind,
    ]
    command += ["--profile", options.profile, "--seed", str(options.seed)]
    command += ["--break", options.rule] if options.rule else []
    command += ["--logs", str(options.logs.absolute())] if options.logs else []
    return command + (["--rounds", str(options.rounds)] if options.rounds else [])


def _last_words(said: str, name: str, kind: str) -> Tally:
    try:
        return Tally.from_json(said.strip().splitlines()[-1])
    except (ValueError, IndexError, KeyError, TypeError):
        return Tally(name, kind, broken=["the scenario's process ended without a word"])


if __name__ == "__main__":
    raise SystemExit(main())
