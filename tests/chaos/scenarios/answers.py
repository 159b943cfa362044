"""A process dies between the provider's answer and the commit (P1).

Before the journal's fsync the answer is lost, and with it the only good refresh token: nobody can prevent that, so it must
be found out, the old token left alone while an access token lives, and the connection come to rest as `lost_answer`. After
the fsync nothing is lost: the next process of the host stores the answer, and the provider is not asked again.

The windows that P1 names are measured over all refreshes: how long an answer is read but not yet on the disk, and how long
after the last look at the clock the request has not left yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.chaos.books import judge_answers, judge_links
from tests.chaos.hosts import Host
from tests.chaos.stage import Link, Run, Stage, staged

__all__ = ["run"]

_MOMENTS: Final = ("before_fsync", "after_fsync")
_WINDOWS: Final = {
    "unsaved": "answer read -> journal fsynced",
    "unsent": "last clock check -> request written",
}


def run(run: Run) -> None:
    """Rounds of dying at one moment and the other, then many refreshes that only measure."""
    pace = run.pace
    names = [f"org-{number:02}" for number in range(pace.connections)]
    min_ttl = max(1.0, pace.life / 12)
    shared = "machine" if run.tally.database == "sqlite" else None
    samples = run.directory / "samples"
    with staged(run) as stage:
        web = stage.host("web1", "web", state=shared)
        mortal = {
            moment: stage.host(
                moment.replace("_", "-"),
                "worker",
                state=shared,
                CHAOS_DIE=moment,
                CHAOS_ARMED=str(run.directory / moment),
                CHAOS_SAMPLES=str(samples),
            )
            for moment in _MOMENTS
        }
        first = mortal["after_fsync"]
        stage.start([web, first])
        stage.warm_up(names)
        first.close()
        with stage.probers(names, min_ttl=min_ttl) as probers:
            try:
                for _ in run.rounds():
                    _round(stage, mortal, names)
                _refresh_many(stage, first, names, samples)
            finally:
                judge_answers(stage, probers.answers(), min_ttl=min_ttl)
                _tell_windows(stage, samples)


def _round(stage: Stage, mortal: dict[str, Host], names: Sequence[str]) -> None:
    """One connection after the other meets its moment; then all of them come to rest."""
    run = stage.run
    links: list[Link] = []
    expected = 0
    for name in run.dice.sample(list(names), run.pace.deaths):
        moment = run.dice.choice(_MOMENTS) if links else "before_fsync"
        expected += moment == "before_fsync"
        links += _die(stage, mortal[moment], name, moment)
    survivor = mortal["after_fsync"]
    stage.start([survivor])
    for link in stage.wait_until_settled(links, within=run.pace.life + 2 * run.pace.lease + 30):
        run.tally.break_(f"{link.name} did not come to rest")
    before = run.tally.window
    judge_links(stage, links)
    run.tally.require(
        run.tally.window - before == expected,
        f"{expected} answers were lost before the fsync, but {run.tally.window - before} were found out",
    )
    survivor.close()


def _die(stage: Stage, host: Host, name: str, moment: str) -> list[Link]:
    """Have the host refresh this connection and die at its moment; after the fsync the next start must store the answer."""
    run = stage.run
    stage.start([host])
    (run.directory / moment).write_text(stage.rows()[name].id)
    links = stage.bring([name])
    if not host.wait_for_death(within=60.0):
        raise RuntimeError(f"{host.name} refreshed nothing")
    run.tally.faults += 1
    if moment == "after_fsync":
        stage.start([host])
        late = stage.wait_until_settled(links, within=30)
        run.tally.require(not late, f"{name}: the next process did not store the journaled answer")
        asked = [
            request
            for request in stage.made.emulator.control.salesforce.requests()
            if request.grant_id == links[0].grant_id
        ]
        run.tally.require(len(asked) == 1, f"{name}: the provider was asked {len(asked)} times")
        host.close()
    return links


def _refresh_many(stage: Stage, worker: Host, names: Sequence[str], samples: Path) -> None:
    """Nothing goes wrong here; the windows are measured under the load of as many refreshes as fit."""
    stage.start([worker])
    rounds = 0
    while _count(samples) < stage.run.pace.samples:
        rounds += 1
        links = stage.bring(names)
        late = stage.wait_until_settled(links, within=60)
        if late:
            raise RuntimeError("refreshes that nothing hinders did not end")
        judge_links(stage, links)
    stage.run.say(f"{rounds} rounds that only measure")


def _count(samples: Path) -> int:
    return len(_read(samples)["unsaved"])


def _read(samples: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in _WINDOWS}
    if samples.exists():
        for line in samples.read_text().splitlines():
            name, seconds = line.split()
            found[name].append(float(seconds))
    return found


def _tell_windows(stage: Stage, samples: Path) -> None:
    for name, durations in _read(samples).items():
        ordered = sorted(1000 * seconds for seconds in durations)
        stage.run.tally.require(bool(ordered), f"{_WINDOWS[name]}: never measured")
        if ordered:
            p50, p99 = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
            stage.run.tally.note(
                f"window {_WINDOWS[name]}: p50 {p50:.2f} ms, p99 {p99:.2f} ms, max {ordered[-1]:.2f} ms "
                f"({len(ordered)} refreshes)"
            )
