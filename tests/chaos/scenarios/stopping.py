"""Processes are asked to end while everybody asks them for something (P1, P2, P5).

Whoever was accepted is answered, refreshes that have begun are finished and stored, and the process ends by itself with 0. A
request that meets the closing door gets no answer and leaves no row in the trail: its caller asks again elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from tests.chaos.books import judge_answers, judge_links
from tests.chaos.hosts import Host
from tests.chaos.probing import Answer
from tests.chaos.scenarios.database import judge_trail
from tests.chaos.scenarios.leases import force_some
from tests.chaos.stage import Run, Stage, staged

__all__ = ["run"]


def run(run: Run) -> None:
    """A rolling restart in random order, a host a round, under load."""
    pace = run.pace
    names = [f"org-{number:02}" for number in range(pace.connections)]
    min_ttl = max(1.0, pace.life / 12)
    shared = "machine" if run.tally.database == "sqlite" else None
    with staged(run) as stage:
        for kind, name in (("web", "web1"), ("web", "web2"), ("worker", "worker1"), ("worker", "worker2")):
            stage.host(name, kind, state=shared)  # type: ignore[arg-type]
        stage.start(stage.hosts)
        stage.warm_up(names)
        stage.made.emulator.control.salesforce.misbehave("latency", delay=pace.latency)
        order: list[Host] = []
        with stage.probers(names, min_ttl=min_ttl, threads=4, rate=pace.rate) as probers:
            for _ in run.rounds():
                order = order or run.dice.sample(stage.hosts, len(stage.hosts))
                _round(stage, order.pop(), names)
        answers = probers.answers()
        judge_answers(stage, answers, min_ttl=min_ttl)
        judge_trail(stage, answers)
        _tell_closed_doors(stage, answers)


def _round(stage: Stage, host: Host, names: Sequence[str]) -> None:
    run = stage.run
    links = stage.bring(names)
    if host.kind == "web":
        # What a web process refreshes itself must be finished as well.
        force_some(stage, run.dice.sample(list(names), 3), [host])
    time.sleep(run.dice.uniform(0.3, 1.5 * run.pace.latency))
    began = time.monotonic()
    host.ask_to_end()
    run.tally.faults += 1
    code = host.wait_for_end()
    took = time.monotonic() - began
    run.say(f"{host.name} ended with {code} after {took:.1f} s")
    run.tally.require(code == 0, f"{host.name} ended with {code}")
    run.tally.require(took < run.pace.lease + 10, f"{host.name} took {took:.1f} s to end")
    stage.start([host])
    for link in stage.wait_until_settled(links, within=run.pace.life + 2 * run.pace.lease + 30):
        run.tally.break_(f"{link.name} did not come to rest")
    judge_links(stage, links)


def _tell_closed_doors(stage: Stage, answers: Sequence[Answer]) -> None:
    doors = [one for one in answers if not one.status and one.accepted]
    stage.run.tally.note(f"{len(doors)} requests met a closing door and left no row")
