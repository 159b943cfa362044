"""A thousand connections with tokens of sixty seconds, kept up by one worker under steady hand-outs.

    python -m bench.keep_fresh [--connections 1000] [--life 60] [--minutes 5] [--rate 100] [--database sqlite]

Every token handed out is compared with what the emulated provider knows of it. Promised: none was expired or had less left
than asked for (`min_ttl=10`), and after the first minute no caller waited for a refresh. Exit 0 when that held.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import http.client
import json
import random
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from app.access.permissions import Permission
from bench.servers import database
from emulator import Control
from tests.installation import HUBSPOT, Installation, installation
from tests.processes import free_port, web, worker

_MIN_TTL = 10


@dataclass(slots=True)
class Tally:
    """What the callers saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    too_short: int = 0
    seen: dict[str, float] = field(default_factory=dict)  # digest → latest second it was handed out
    latencies: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def main() -> int:
    """Run it and print what happened."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--life", type=int, default=60)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--rate", type=float, default=100.0, help="hand-outs per second")
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as directory,
        database(options.database, Path(directory)) as url,
        installation(url, Path(directory), hubspot_app={"token_lifetime": options.life}) as made,
    ):
        return _run(made, options)


def _run(made: Installation, options: argparse.Namespace) -> int:
    names, credentials = _prepare(made, options)
    port = free_port()
    environ = made.environment(host="bench", LOG_LEVEL="WARNING", METRICS_TOKEN="m" * 32)
    with (
        web(environ, log=made.directory / "web.log", port=port),
        worker(made.environment(host="worker", LOG_LEVEL="WARNING"), log=made.directory / "worker.log"),
    ):
        tally, waited = _load(port, names, credentials, options)
    return _judge(made.emulator.control, tally, waited, options)


def _prepare(made: Installation, options: argparse.Namespace) -> tuple[list[str], str]:
    """Import the connections as somebody would who brings them from elsewhere."""
    host = made.host("command")
    control = made.emulator.control
    minted = control.hubspot.grant_many(HUBSPOT, options.connections)
    lines = [
        json.dumps(
            {
                "provider": "hubspot",
                "account_id": grant.account,
                "access_token": grant.access_token,
                "refresh_token": grant.refresh_token,
                "expires_at": grant.expires_at,
            }
        )
        for grant in minted
    ]
    results = list(host.transfer.import_lines(lines))
    names = [result.name for result in results if result.name]
    if len(names) != options.connections:
        raise RuntimeError(f"import failed: {[result for result in results if result.problem][:3]}")
    caller = host.callers.add("bench", allow=[Permission.parse("token:issue@*")], rate=100_000.0)
    assert caller.client_secret is not None
    pair = f"{caller.caller.client_id}:{caller.client_secret.reveal()}"
    return names, base64.b64encode(pair.encode()).decode()


def _load(
    port: int, names: list[str], credentials: str, options: argparse.Namespace
) -> tuple[Tally, list[tuple[float, float]]]:
    tally = Tally()
    stop = threading.Event()
    threads = [
        threading.Thread(target=_caller, args=(port, names, credentials, options.rate / 8, tally, stop, seed))
        for seed in range(8)
    ]
    for thread in threads:
        thread.start()
    waited = []
    began = time.monotonic()
    while (passed := time.monotonic() - began) < options.minutes * 60:
        time.sleep(min(10.0, options.minutes * 60 - passed + 0.1))
        waited.append((time.monotonic() - began, _waited(port)))
        print(
            f"{waited[-1][0]:5.0f} s  {sum(tally.statuses.values())} hand-outs {dict(tally.statuses)}  "
            f"waited so far {waited[-1][1]:.0f}",
            flush=True,
        )
    stop.set()
    for thread in threads:
        thread.join()
    return tally, waited


def _caller(
    port: int,
    names: list[str],
    credentials: str,
    rate: float,
    tally: Tally,
    stop: threading.Event,
    seed: int,
) -> None:
    pick = random.Random(seed)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    due = time.monotonic()
    while not stop.wait(max(0.0, due - time.monotonic())):
        due += 1 / rate
        began = time.monotonic()
        path = f"/v1/connections/{pick.choice(names)}/token?min_ttl={_MIN_TTL}"
        connection.request("GET", path, headers={"Authorization": f"Basic {credentials}"})
        answer = connection.getresponse()
        body = json.loads(answer.read())
        now = time.time()
        with tally.lock:
            tally.statuses[answer.status] += 1
            tally.latencies.append(time.monotonic() - began)
            if answer.status == 200:
                tally.too_short += body["expires_in"] < _MIN_TTL
                tally.seen[hashlib.sha256(body["access_token"].encode()).hexdigest()] = now
    connection.close()


def _waited(port: int) -> float:
    """How many hand-outs waited for a refresh, by the product's own count."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {'m' * 32}"})
    text = connection.getresponse().read().decode()
    connection.close()
    lines = [line for line in text.splitlines() if line.startswith("drawbridge_hand_outs_total{")]
    if not lines:
        raise RuntimeError("the metrics hold no hand-outs")
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if 'way="waited"' in line)


def _judge(
    control: Control, tally: Tally, waited: list[tuple[float, float]], options: argparse.Namespace
) -> int:
    truth = {
        access.sha256: access.expires_at
        for grant in control.grants(vendor="hubspot")
        for access in grant.access
    }
    unknown = [digest for digest in tally.seen if digest not in truth]
    expired = [digest for digest, at in tally.seen.items() if digest in truth and truth[digest] < at]
    after_first_minute = [count for at, count in waited if at >= 60]
    late = after_first_minute[-1] - after_first_minute[0] if len(after_first_minute) > 1 else 0
    latencies = sorted(tally.latencies)
    totals = control.hubspot.totals()
    print(
        f"{options.connections} connections, tokens of {options.life} s, {options.minutes:g} min, {options.database}\n"
        f"hand-outs            {sum(tally.statuses.values())} {dict(tally.statuses)}\n"
        f"refreshes            {totals.endpoints.get('token', 0)}\n"
        f"expired handed out   {len(expired)}\n"
        f"unknown to provider  {len(unknown)}\n"
        f"below min_ttl={_MIN_TTL}     {tally.too_short}\n"
        f"waited, first minute {waited[0][1] if len(waited) == 1 else next((c for a, c in waited if a >= 60), 0):.0f}\n"
        f"waited, afterwards   {late:.0f}\n"
        f"latency              p50 {1000 * latencies[len(latencies) // 2]:.1f} ms, "
        f"p99 {1000 * latencies[int(len(latencies) * 0.99)]:.1f} ms, max {1000 * latencies[-1]:.1f} ms"
    )
    held = not expired and not unknown and not tally.too_short and late == 0 and set(tally.statuses) == {200}
    print("holds" if held else "DOES NOT HOLD")
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
