"""The authenticated, authorised, audited hand-out beside a bare Flask route that returns the same bytes.

    python -m bench.handout [--rounds 7] [--seconds 3] [--database sqlite …] [--workers 1 …] [--sockets 16 …]

Both run under the same gunicorn settings at the same time and get the load in turn, product and bare route
alternating, so that a machine that slows down slows both. With as many workers as the machine has cores, load and
database compete with both for them, so it is measured with one worker process and with two. Printed: the ratio of each
round's pair, its median, and what the project promises: at least 0.65 of the bare route's rate, a p99 not above its
p99, each worker below 90 MB resident.
"""

from __future__ import annotations

import argparse
import itertools
import json
import socket
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import load
from bench.load import Result
from bench.servers import bare_route, database, memory_of_workers, token_request
from tests.installation import Installation, connect, installation
from tests.processes import Server, free_port, web

_THREADS = 16


def main() -> int:
    """Measure, print a table (or JSON), and say whether the promises hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--database", action="append", choices=["sqlite", "postgresql"])
    parser.add_argument("--sockets", action="append", type=int)
    parser.add_argument(
        "--workers", action="append", type=int, help="gunicorn workers of both; default 1 and 2"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for kind, workers in itertools.product(
        options.database or ["sqlite", "postgresql"], options.workers or [1, 2]
    ):
        with (
            tempfile.TemporaryDirectory() as directory,
            database(kind, Path(directory)) as url,
            installation(url, Path(directory), hubspot_app={"token_lifetime": 7200}) as made,
        ):
            rows += _measure(kind, workers, made, options)
    if options.json:
        print(json.dumps(rows, indent=1))
    held = all(
        row["ratio"] >= 0.65 and row["p99_ms"] <= row["bare_p99_ms"] and row["rss_mb"] < 90 for row in rows
    )
    print("holds" if held else "DOES NOT HOLD", file=sys.stderr)
    return 0 if held else 1


def _measure(
    kind: str, workers: int, made: Installation, options: argparse.Namespace
) -> list[dict[str, Any]]:
    request, body = _prepare(made)
    body_file = made.directory / "bare.json"
    body_file.write_bytes(body)
    settings = {"DRAWBRIDGE_WEB_WORKERS": str(workers), "DRAWBRIDGE_WEB_THREADS": str(_THREADS)}
    port, bare_port = free_port(), free_port()
    environ = made.environment(host="bench", LOG_LEVEL="WARNING") | settings
    bare_environ = settings | {"BARE_BODY": str(body_file)}
    with (
        web(environ, log=made.directory / "web.log", port=port) as product,
        bare_route(bare_environ, log=made.directory / "bare.log", port=bare_port) as bare,
    ):
        _check(product, request)
        return [
            {"workers": workers} | _compare(kind, product, bare, request, sockets=sockets, options=options)
            for sockets in options.sockets or [16, 64]
        ]


def _prepare(made: Installation) -> tuple[bytes, bytes]:
    host = made.host("command")
    connection = connect(host, made, "hubspot", name="bench")
    caller = host.callers.add("bench", allow=[], rate=100_000.0)
    assert caller.client_secret is not None
    from app.access.permissions import Permission

    host.callers.allow("bench", Permission.parse("token:issue@bench"))
    request = token_request(
        f"/v1/connections/{connection.name}/token", caller.caller.client_id, caller.client_secret.reveal()
    )
    token = host.issuer.issue(caller.caller, connection.name)
    sample = {
        "access_token": token.access_token.reveal() if token.access_token else "",
        "token_type": "Bearer",
        "expires_at": "2030-01-01T00:00:00Z",
        "expires_in": 1800,
        "scopes": list(token.scopes),
        "connection": token.connection,
        "provider": token.provider,
        "account_id": token.account_id,
        "generation": token.generation,
    }
    return request, json.dumps(sample, separators=(",", ":")).encode()


def _check(product: Server, request: bytes) -> None:
    """One hand-out by hand: a bench of error answers would be a fine number of nothing."""
    with socket.create_connection((product.host, product.port), timeout=30) as sock:
        sock.sendall(request)
        answer = sock.recv(65536)
    if not answer.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"no hand-out: {answer[:300]!r}")


def _run(server: Server, request: bytes, *, sockets: int, seconds: float) -> Result:
    return load.run(server.host, server.port, request, sockets=sockets, seconds=seconds)


def _compare(
    kind: str, product: Server, bare: Server, request: bytes, *, sockets: int, options: argparse.Namespace
) -> dict[str, Any]:
    for server in (product, bare):
        _run(server, request, sockets=sockets, seconds=1.0)  # warm
    pairs: list[tuple[Result, Result]] = [
        (
            _run(product, request, sockets=sockets, seconds=options.seconds),
            _run(bare, request, sockets=sockets, seconds=options.seconds),
        )
        for _ in range(options.rounds)
    ]
    bad = sum(
        count
        for one, other in pairs
        for result in (one, other)
        for status, count in result.statuses.items()
        if status not in (0, 200)
    )
    if bad:
        raise RuntimeError(f"{bad} answers were not 200")
    memory = max(rss for rss, _ in memory_of_workers(product))
    row: dict[str, Any] = {
        "database": kind,
        "sockets": sockets,
        "rate": statistics.median(one.rate for one, _ in pairs),
        "bare_rate": statistics.median(other.rate for _, other in pairs),
        "ratio": statistics.median(one.rate / other.rate for one, other in pairs),
        "ratios": [round(one.rate / other.rate, 3) for one, other in pairs],
        "p50_ms": 1000 * statistics.median(one.percentile(0.5) for one, _ in pairs),
        "bare_p50_ms": 1000 * statistics.median(other.percentile(0.5) for _, other in pairs),
        "p99_ms": 1000 * statistics.median(one.percentile(0.99) for one, _ in pairs),
        "bare_p99_ms": 1000 * statistics.median(other.percentile(0.99) for _, other in pairs),
        "rss_mb": memory,
        "bare_rss_mb": max(rss for rss, _ in memory_of_workers(bare)),
    }
    print(
        "{database:10s} {of} worker(s) {sockets:3d} sockets  {rate:6.0f}/s of {bare_rate:6.0f}/s bare = {ratio:.2f}   "
        "p50 {p50_ms:5.1f} ms (bare {bare_p50_ms:5.1f})  p99 {p99_ms:5.1f} ms (bare {bare_p99_ms:5.1f})  "
        "worker {rss_mb:.0f} MB (bare {bare_rss_mb:.0f})".format(of=len(memory_of_workers(product)), **row),
        flush=True,
    )
    return row


if __name__ == "__main__":
    raise SystemExit(main())
