"""The provider is slow, breaks off, is down or has had enough of us (P1, P2, P3, P9).

Two kinds of connections stand side by side: Salesforce's, whose refresh tokens rotate, and HubSpot's, whose do not. Each
meets a fault of its own at its refresh. Where the provider carried the request out and the answer never came, a rotating
connection is lost whatever anybody does; it must be found out gently. Every other must be kept, and storms of 503 and 429
must not be blamed on anybody's grant.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Final

from emulator.model import VendorName
from tests.chaos.books import judge_answers, judge_links
from tests.chaos.stage import Run, Stage, staged

__all__ = ["run"]

_VENDORS: Final[Sequence[VendorName]] = ("salesforce", "hubspot")
_Strike = Callable[[Stage, str, VendorName], None]


def run(run: Run) -> None:
    """Rounds in which every refresh meets something; the last third of each is a storm over the whole provider."""
    pace = run.pace
    half = pace.connections // 2
    names = {vendor: [f"{vendor}-{number:02}" for number in range(half)] for vendor in _VENDORS}
    everybody = [name for some in names.values() for name in some]
    min_ttl = max(1.0, pace.life / 12)
    with staged(run) as stage:
        for kind, name in (("web", "web1"), ("web", "web2"), ("worker", "worker1")):
            stage.host(name, kind)  # type: ignore[arg-type]
        stage.start(stage.hosts)
        for vendor, some in names.items():
            stage.warm_up(some, vendor)
        with stage.probers(everybody, min_ttl=min_ttl) as probers:
            try:
                for _ in run.rounds():
                    _round(stage, names)
            finally:
                judge_answers(stage, probers.answers(), min_ttl=min_ttl)


def _round(stage: Stage, names: dict[VendorName, list[str]]) -> None:
    pace, dice = stage.run.pace, stage.run.dice
    for vendor, some in names.items():
        strikes = cycle(dice.sample(_STRIKES, len(_STRIKES)))
        for name, strike in zip(some, strikes, strict=False):
            strike(stage, name, vendor)
    links = [link for vendor, some in names.items() for link in stage.bring(some, vendor)]
    time.sleep(dice.uniform(pace.latency, 2 * pace.latency))
    _storm(stage, seconds=pace.outage)
    for link in stage.wait_until_settled(links, within=2 * pace.life + 2 * pace.lease + 30):
        stage.run.tally.break_(f"{link.name} did not come to rest")
    for vendor in _VENDORS:
        stage.made.emulator.control.vendor(vendor).behave()
    judge_links(stage, links)


def _storm(stage: Stage, *, seconds: float) -> None:
    """For a while every request of either kind is turned away, with the words of a provider that is down or busy."""
    for vendor in _VENDORS:
        control = stage.made.emulator.control.vendor(vendor)
        if stage.run.dice.random() < 0.5:
            control.misbehave("status", status=503, seconds=seconds)
        else:
            control.misbehave("status", status=429, retry_after=1, seconds=seconds)
        stage.run.tally.faults += 1


def _slow(share: float) -> _Strike:
    """Slow by a share of the time-out; above one the answer comes when nobody waits for it any more."""

    def strike(stage: Stage, name: str, vendor: VendorName) -> None:
        delay = share * stage.run.pace.timeout
        stage.misbehave("latency", name, vendor=vendor, delay=delay, count=1)

    return strike


def _reset_after(stage: Stage, name: str, vendor: VendorName) -> None:
    """Carried out, and the connection breaks before the answer."""
    stage.misbehave("drop", name, vendor=vendor, when="after", count=1)


def _reset_before(stage: Stage, name: str, vendor: VendorName) -> None:
    """Broken off without being carried out, which looks the same from here."""
    stage.misbehave("drop", name, vendor=vendor, when="before", count=1)


def _cut(stage: Stage, name: str, vendor: VendorName) -> None:
    stage.misbehave("truncated", name, vendor=vendor, count=1)


def _down(stage: Stage, name: str, vendor: VendorName) -> None:
    stage.misbehave("status", name, vendor=vendor, status=503, count=3)


def _page(stage: Stage, name: str, vendor: VendorName) -> None:
    stage.misbehave("html", name, vendor=vendor, status=503, count=1)


def _busy(stage: Stage, name: str, vendor: VendorName) -> None:
    stage.misbehave("status", name, vendor=vendor, status=429, retry_after=2, count=2)


# With a time-out of 20 s: 0.1 s, 1 s, 5 s, 14 s, 19 s, 30 s and 60 s.
_STRIKES: Final[Sequence[_Strike]] = (
    _slow(0.005),
    _slow(0.05),
    _slow(0.25),
    _slow(0.7),
    _slow(0.95),
    _slow(1.5),
    _slow(3.0),
    _reset_after,
    _reset_before,
    _cut,
    _down,
    _page,
    _busy,
)
