"""Callers of a living token while the provider fails, hangs, or a crowd waits for another connection.

    python -m bench.undisturbed [--rounds 10] [--seconds 2] [--database sqlite]

One connection has ten minutes left; others have nothing and make trouble. Each round measures the callers of the first one
undisturbed, while the provider answers 503, while it hangs for 30 s, and while three quarters of all threads wait for other
connections. Promised: every caller gets 200, none of their requests touches the provider, and the median over the rounds of
each disturbed p99 is at most twice the undisturbed one plus 20 ms. Exit 0 when that held.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from app.access.permissions import Permission
from app.bootstrap import Services
from app.db.schema import apps, connections
from bench import load
from bench.servers import database, token_request
from emulator import Control
from tests.installation import HUBSPOT, Installation, installation
from tests.processes import free_port, web

_WORKERS, _THREADS = 2, 16
_SOCKETS = 4
_OTHERS = 8


def main() -> int:
    """Run it and print what happened."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as directory,
        database(options.database, Path(directory)) as url,
        installation(url, Path(directory)) as made,
    ):
        return _run(made, options)


def _run(made: Installation, options: argparse.Namespace) -> int:
    host = made.host("command")
    client_id, secret, account = _prepare(made, host)
    port = free_port()
    environ = made.environment(host="bench", LOG_LEVEL="ERROR") | {
        "DRAWBRIDGE_WEB_WORKERS": str(_WORKERS),
        "DRAWBRIDGE_WEB_THREADS": str(_THREADS),
    }
    request = token_request("/v1/connections/living/token", client_id, secret)
    control = made.emulator.control
    control.reset("counters")
    p99: dict[str, list[float]] = {}
    wrong = 0
    with web(environ, log=made.directory / "web.log", port=port):
        load.run("127.0.0.1", port, request, sockets=_SOCKETS, seconds=1.0)
        troubles = _troubles(host, control, port=port, client_id=client_id, secret=secret)
        for number in range(options.rounds):
            for name, trouble in troubles.items():
                with trouble():
                    result = load.run("127.0.0.1", port, request, sockets=_SOCKETS, seconds=options.seconds)
                wrong += sum(count for status, count in result.statuses.items() if status not in (0, 200))
                p99.setdefault(name, []).append(1000 * result.percentile(0.99))
            print(
                f"round {number + 1}: " + "  ".join(f"{name} {of[-1]:.1f} ms" for name, of in p99.items()),
                flush=True,
            )
    touched = sum(1 for seen in control.hubspot.requests() if seen.account == account)
    return _judge(
        p99, wrong=wrong, touched=touched, refreshes=control.hubspot.totals().endpoints.get("token", 0)
    )


def _judge(p99: dict[str, list[float]], *, wrong: int, touched: int, refreshes: int) -> int:
    calm = statistics.median(p99["undisturbed"])
    allowed = 2 * calm + 20
    for name, values in p99.items():
        print(f"{name:22s} p99 median {statistics.median(values):6.1f} ms (allowed {allowed:.1f})")
    print(
        f"answers other than 200: {wrong}   provider requests for this connection: {touched} (for others: {refreshes})"
    )
    held = (
        not wrong
        and not touched
        and refreshes
        and all(statistics.median(of) <= allowed for of in p99.values())
    )
    print("holds" if held else "DOES NOT HOLD")
    return 0 if held else 1


def _prepare(made: Installation, host: Services) -> tuple[str, str, str]:
    control = made.emulator.control
    control.hubspot.change_app(HUBSPOT, token_lifetime=600)
    living, *others = control.hubspot.grant_many(HUBSPOT, 1 + _OTHERS)
    lines = [
        {"name": "living", "access_token": living.access_token, "expires_at": living.expires_at},
        *({"name": f"other-{number}"} for number in range(_OTHERS)),
    ]
    texts = [
        json.dumps(
            {"provider": "hubspot", "account_id": grant.account, "refresh_token": grant.refresh_token, **line}
        )
        for line, grant in zip(lines, [living, *others], strict=True)
    ]
    problems = [result.problem for result in host.transfer.import_lines(texts) if result.problem]
    if problems:
        raise RuntimeError(str(problems))
    caller = host.callers.add("bench", allow=[Permission.parse("token:issue@*")], rate=100_000.0)
    assert caller.client_secret is not None
    return caller.caller.client_id, caller.client_secret.reveal(), living.account


def _troubles(
    host: Services, control: Control, *, port: int, client_id: str, secret: str
) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    credentials = base64.b64encode(f"{client_id}:{secret}".encode()).decode()

    def trouble(kind: str, *, count: int, **fault: Any) -> Callable[[], AbstractContextManager[None]]:
        @contextmanager
        def during() -> Iterator[None]:
            control.hubspot.misbehave(kind, **fault)
            with _callers(port, credentials, count=count):
                time.sleep(0.5)  # until they have asked
                yield
            control.hubspot.behave()
            _forget_failures(host)

        return during

    return {
        "undisturbed": nullcontext,
        "provider 503": trouble("status", count=4, status=503),
        "provider hangs 30 s": trouble("hang", count=4, delay=30),
        "crowd waits": trouble("hang", count=_WORKERS * _THREADS, delay=30),
    }


def _forget_failures(host: Services) -> None:
    """Back to the start, so that each round meets the same trouble and not a back-off of the one before."""
    until = time.monotonic() + 30
    with host.database.read() as transaction:
        busy = (
            sa.select(sa.func.count()).select_from(connections).where(connections.c.open_attempt.is_not(None))
        )
        while transaction.execute(busy).scalar_one() and time.monotonic() < until:
            time.sleep(0.1)
    with host.database.write() as transaction:
        transaction.execute(sa.update(apps).values(failures=0, open_until=None, open_reason=None))
        transaction.execute(sa.update(connections).values(failures=0, retry_at=None, health="healthy"))


@contextmanager
def _callers(port: int, credentials: str, *, count: int) -> Iterator[None]:
    """Callers that keep asking for connections which have no token."""
    stop = threading.Event()

    def ask(number: int) -> None:
        while not stop.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            path = f"/v1/connections/other-{number % _OTHERS}/token?max_wait=3"
            connection.request("GET", path, headers={"Authorization": f"Basic {credentials}"})
            connection.getresponse().read()
            connection.close()
            stop.wait(0.2)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    raise SystemExit(main())
