"""Callers report that the provider refused their token, all at once, too late, or without end.

A thousand reports of one token over two web processes cost the provider one refresh, and everybody gets the new token. Who
reports a token that is not the current one any more gets the current one, and the provider hears nothing. Who reports every
token that he gets cannot make it spin: one forced refresh per connection in thirty seconds.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import resource
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

from tests.chaos.hosts import Host
from tests.chaos.probing import Answer, Caller
from tests.chaos.stage import Link, Run, Stage, staged

__all__ = ["run"]

_PATIENCE: Final = 60.0
_FORCED_EVERY: Final = 30.0


def run(run: Run) -> None:
    """A fresh connection a round: the storm, the stragglers, then the one who does not stop."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a thousand sockets here and as many over there
    with staged(run) as stage:
        for name in ("web1", "web2"):
            stage.host(name, "web", WEB_THREADS="32")
        stage.start(stage.hosts)
        stage.made.emulator.control.salesforce.misbehave("latency", delay=run.pace.latency)
        for number in run.rounds():
            _round(stage, f"org-{number:02}")


def _round(stage: Stage, name: str) -> None:
    (link,) = stage.bring([name])
    old = _current(stage, name)
    new = _storm(stage, link, old.digest)
    _stragglers(stage, link, old.digest, new)
    _spin(stage, link)
    stage.run.tally.connection_rounds += 1


def _current(stage: Stage, name: str) -> Answer:
    """What both hosts hand out; asking makes them know it."""
    answers = [Caller(host, stage.credentials).token(name, "min_ttl=1") for host in stage.webs]
    stage.run.tally.require(
        all(one.status == 200 for one in answers) and len({one.digest for one in answers}) == 1,
        f"{name}: the hosts disagree before it begins",
    )
    return answers[0]


def _refreshes(stage: Stage, link: Link) -> int:
    requests = stage.made.emulator.control.salesforce.requests()
    return sum(request.grant_id == link.grant_id for request in requests)


def _storm(stage: Stage, link: Link, old: str) -> str:
    run = stage.run
    before = _refreshes(stage, link)
    ends = asyncio.run(_report_together(stage, link.name, old, callers=run.pace.callers))
    refreshes = _refreshes(stage, link) - before
    run.tally.faults += len(ends)
    run.tally.hand_outs += sum(end.digest != "" for end in ends)
    digests = Counter(end.digest for end in ends)
    run.tally.require(refreshes == 1, f"{link.name}: {len(ends)} reports cost {refreshes} refreshes")
    run.tally.require(
        len(digests) == 1 and "" not in digests and old not in digests,
        f"{link.name}: {len(ends)} reports were answered with {len(digests)} different tokens "
        f"({digests.get('', 0)} with none, {digests.get(old, 0)} with the refused one)",
    )
    waits = sorted(end.seconds for end in ends)
    run.tally.note(
        f"{len(ends)} reports at once: {refreshes} refresh, all answered within {waits[-1]:.1f} s, "
        f"{sum(end.tries for end in ends) - len(ends)} told to come again"
    )
    return digests.most_common(1)[0][0]


def _stragglers(stage: Stage, link: Link, old: str, new: str) -> None:
    """Reports of the token before, when everybody has the new one."""
    time.sleep(1.0)
    before = _refreshes(stage, link)
    ends = asyncio.run(_report_together(stage, link.name, old, callers=stage.run.pace.callers // 10))
    stage.run.tally.require(
        {end.digest for end in ends} == {new},
        f"{link.name}: a late report was not answered with the current token",
    )
    stage.run.tally.require(
        _refreshes(stage, link) == before,
        f"{link.name}: late reports cost {_refreshes(stage, link) - before} refreshes",
    )
    stage.run.tally.faults += len(ends)


def _spin(stage: Stage, link: Link) -> None:
    """One caller on each host reports whatever it gets, again and again."""
    run = stage.run
    before, began = _refreshes(stage, link), time.monotonic()
    callers = [Caller(host, stage.credentials) for host in stage.webs]
    reports = 0
    while time.monotonic() - began < run.pace.spin:
        for caller in callers:
            held = caller.token(link.name, "min_ttl=1")
            caller.ask(
                link.name, "POST", f"/v1/connections/{link.name}/token", body=_report(held.digest, wait=0.2)
            )
            reports += 1
    seconds = time.monotonic() - began
    refreshes = _refreshes(stage, link) - before
    most = math.ceil(seconds / _FORCED_EVERY)
    run.tally.faults += reports
    run.tally.require(
        refreshes <= most, f"{link.name}: {refreshes} refreshes in {seconds:.0f} s, allowed are {most}"
    )
    run.tally.note(f"{reports} reports of every token got, in {seconds:.0f} s: {refreshes} refreshes")


def _report(digest: str, *, wait: float) -> dict[str, Any]:
    return {"rejected": digest, "min_ttl": 1, "max_wait": wait}


# A thousand callers on one thread


@dataclass(frozen=True, slots=True)
class _End:
    digest: str  # empty when no token came
    tries: int
    seconds: float


async def _report_together(stage: Stage, name: str, rejected: str, *, callers: int) -> list[_End]:
    start = asyncio.Event()
    webs = stage.webs
    tasks = [
        asyncio.create_task(_patient(webs[number % len(webs)], stage.credentials, name, rejected, start))
        for number in range(callers)
    ]
    await asyncio.sleep(0)
    start.set()
    return list(await asyncio.gather(*tasks))


async def _patient(host: Host, credentials: str, name: str, rejected: str, start: asyncio.Event) -> _End:
    """A good caller: comes again when it is told to."""
    await start.wait()
    began = time.monotonic()
    tries = 0
    while time.monotonic() - began < _PATIENCE:
        tries += 1
        status, headers, said = await _post(host, credentials, name, _report(rejected, wait=3.0))
        if status == 200:
            token = said["access_token"]
            return _End(hashlib.sha256(token.encode()).hexdigest(), tries, time.monotonic() - began)
        if status != 503:
            break
        await asyncio.sleep(float(headers.get("retry-after", "1")))
    return _End("", tries, time.monotonic() - began)


async def _post(
    host: Host, credentials: str, name: str, body: dict[str, Any]
) -> tuple[int, dict[str, str], dict[str, Any]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", host.port)
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/connections/{name}/token HTTP/1.1\r\nHost: localhost\r\nAuthorization: Basic {credentials}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    try:
        writer.write(head.encode() + content)
        raw = await reader.read()
    finally:
        writer.close()
    top, _, rest = raw.partition(b"\r\n\r\n")
    lines = top.decode().split("\r\n")
    headers = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in lines[1:])}
    return int(lines[0].split()[1]), headers, json.loads(rest)
