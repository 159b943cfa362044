"""Whoever holds a lease is killed or frozen while the provider takes its time (P1, P2, P3).

Each round brings all connections in anew, so that they are refreshed at once, by two workers and, where somebody forces it,
by two web processes that compete for the same leases. One host is killed at a random moment and started again, another is
frozen until its leases have run out. A third of the requests never reach the provider's books: those must be recovered,
although nobody here can know that the old token is still good.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from tests.chaos.books import judge_answers, judge_links
from tests.chaos.hosts import Host
from tests.chaos.probing import Caller
from tests.chaos.stage import Run, Stage, staged

__all__ = ["force_some", "run"]


def run(run: Run) -> None:
    """Rounds of killing and freezing."""
    pace = run.pace
    names = [f"org-{number:02}" for number in range(pace.connections)]
    min_ttl = max(1.0, pace.life / 12)
    with staged(run) as stage:
        _open_hosts(stage)
        stage.warm_up(names)
        stage.made.emulator.control.salesforce.misbehave("latency", delay=pace.latency)
        with stage.probers(names, min_ttl=min_ttl) as probers:
            held: Counter[str] = Counter()
            try:
                for _ in run.rounds():
                    _round(stage, names, held)
            finally:
                run.tally.note(
                    f"leases held when struck: {held['killed']} by killed, {held['frozen']} by frozen hosts"
                )
                judge_answers(stage, probers.answers(), min_ttl=min_ttl)


def _open_hosts(stage: Stage) -> None:
    # On one machine all processes have one state folder; several hosts have one each.
    shared = "machine" if stage.run.tally.database == "sqlite" else None
    for name in ("web1", "web2"):
        stage.host(name, "web", state=shared)
    for name in ("worker1", "worker2"):
        stage.host(name, "worker", state=shared)
    stage.start(stage.hosts)


def _round(stage: Stage, names: Sequence[str], held: Counter[str]) -> None:
    pace, dice = stage.run.pace, stage.run.dice
    for name in dice.sample(list(names), len(names) // 3):
        stage.misbehave("drop", name, count=1)
    links = stage.bring(names)
    force_some(stage, dice.sample(list(names), 6), stage.webs)
    held.update(_strike(stage, names))
    late = stage.wait_until_settled(links, within=pace.life + 2 * pace.lease + 6 * pace.latency)
    for link in late:
        stage.run.tally.break_(f"{link.name} did not come to rest")
    judge_links(stage, links)


def force_some(stage: Stage, names: Sequence[str], hosts: Sequence[Host]) -> None:
    """Have web processes compete with the workers for leases; the answers do not matter here."""

    def force(host: Host, name: str) -> None:
        caller = Caller(host, stage.credentials)
        caller.ask(name, "POST", f"/v1/connections/{name}/refresh", body={})
        caller.close()

    for name in names:
        host = stage.run.dice.choice(list(hosts))
        threading.Thread(target=force, args=(host, name), daemon=True).start()


def _strike(stage: Stage, names: Sequence[str]) -> dict[str, int]:
    """Both faults on one time line, each at a random moment of the waves of requests that follow an import.

    Who is struck is drawn from those who hold leases just then. When the frozen host's leases have run out and it is still
    frozen, somebody tries to refresh everything elsewhere. Returns how many leases were held.
    """
    run, pace, dice = stage.run, stage.run.pace, stage.run.dice
    victims = _Victims(stage)
    kill_at, freeze_at = (dice.uniform(0.6, 1.3 * pace.latency) for _ in range(2))
    steps: list[tuple[float, Callable[[], None]]] = [
        (kill_at, victims.kill),
        (kill_at + dice.uniform(0.3, 2.0), victims.restart),
        (freeze_at, victims.freeze),
        (freeze_at + pace.lease + 0.1, lambda: _press(stage, names)),
        (freeze_at + pace.freeze, victims.thaw),
    ]
    began = time.monotonic()
    for at, act in sorted(steps, key=lambda step: step[0]):
        time.sleep(max(0.0, began + at - time.monotonic()))
        act()
    victims.wait()
    run.tally.faults += 2
    return victims.held


def _press(stage: Stage, names: Sequence[str]) -> None:
    """Each web host that can is told to refresh one connection after the other."""

    def press(host: Host) -> None:
        caller = Caller(host, stage.credentials)
        for name in names:
            caller.ask(name, "POST", f"/v1/connections/{name}/refresh", body={})
        caller.close()

    for host in stage.webs:
        if not host.down_within(time.time(), time.time()):
            threading.Thread(target=press, args=(host,), daemon=True).start()


class _Victims:
    """One host that is killed and started again, and another that is frozen and let go."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._struck: dict[str, Host] = {}
        self.held: dict[str, int] = {}

    def kill(self) -> None:
        self._draw("killed").kill()

    def restart(self) -> None:
        self._struck["killed"].launch()

    def freeze(self) -> None:
        self._draw("frozen").freeze()

    def thaw(self) -> None:
        self._struck["frozen"].thaw()

    def wait(self) -> None:
        self._struck["killed"].wait_until_serving()

    def _draw(self, fate: str) -> Host:
        stage = self._stage
        leases = {host.name: stage.leases_of(host) for host in stage.hosts}
        standing = [host for host in stage.hosts if host not in self._struck.values()]
        holders = [host for host in standing if leases[host.name]]
        chosen = stage.run.dice.choice(holders or standing)
        self._struck[fate], self.held[fate] = chosen, leases[chosen.name]
        stage.run.say(f"{chosen.name} is {fate} with {leases[chosen.name]} leases")
        return chosen
