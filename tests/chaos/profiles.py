"""How long and how often: `short` fits into a build, `long` has the times of an installation in service.

Both keep the proportions that matter. The provider is slow but inside its time-out; a lease outlasts the time-out by more
than the ten seconds that the settings demand; a freeze outlasts the lease, and the access token outlives the freeze.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

__all__ = ["PACES", "Pace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """The measures of one scenario in one profile; seconds."""

    rounds: int
    connections: int = 25
    timeout: float = 2.0
    lease: float = 12.2
    latency: float = 1.4
    life: int = 20
    freeze: float = 13.8
    outage: float = 4.0
    grace: float = 7.0
    rate: float = 8.0  # requests per second and thread of the probers
    reserve: int | None = None  # bytes of the audit reserve; None is the product's own
    deaths: int = 4  # processes that die in a round
    samples: int = 100  # refreshes over which windows are measured
    callers: int = 1000  # that report the same token at once
    spin: float = 6.0  # seconds somebody reports every token he gets
    on: tuple[str, ...] = ("postgresql", "sqlite")  # the databases it is for, unless one is asked for


_in_service: Final = partial(Pace, timeout=20.0, lease=45.0)  # the defaults of the settings
_POSTGRESQL: Final = ("postgresql",)
_SQLITE: Final = ("sqlite",)

PACES: Final[Mapping[str, Mapping[str, Pace]]] = {
    "short": {
        "leases": Pace(rounds=1, life=26),
        "database": Pace(
            rounds=6, connections=16, life=60, latency=0.6, outage=2.5, grace=4.0, on=_POSTGRESQL
        ),
        "stopping": Pace(rounds=2, connections=12, rate=15.0, on=_POSTGRESQL),
        "answers": Pace(rounds=1, connections=12, life=15, latency=0.0, deaths=3, samples=60, on=_SQLITE),
        "provider": Pace(rounds=1, connections=26, on=_POSTGRESQL),
        "disk": Pace(
            rounds=1, connections=12, life=120, latency=1.0, grace=60.0, rate=30.0, reserve=98_304, on=_SQLITE
        ),
        "rejected": Pace(rounds=1, connections=1, life=600, latency=1.0, on=_POSTGRESQL),
    },
    "long": {
        "leases": _in_service(rounds=9, latency=14.0, life=120, freeze=50.0),
        "database": _in_service(rounds=6, latency=5.0, life=300, outage=60.0, grace=60.0, on=_POSTGRESQL),
        "stopping": _in_service(rounds=8, latency=14.0, life=120, rate=10.0),
        "answers": Pace(rounds=5, life=60, latency=0.0, deaths=10, samples=3000),
        "provider": _in_service(rounds=4, connections=26, latency=14.0, life=120, outage=30.0),
        "disk": _in_service(
            rounds=3, connections=12, latency=5.0, life=900, grace=60.0, rate=150.0, on=_SQLITE
        ),
        "rejected": _in_service(rounds=3, connections=1, latency=3.0, life=600, spin=65.0, on=_POSTGRESQL),
    },
}
