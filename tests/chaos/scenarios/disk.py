"""The disk fills up under an SQLite installation (P1, P2, P5).

Database, journal and audit reserve lie on a small file system of their own. When it is full the hand-outs go on out of the
reserve; when that is used up too they are refused, for what cannot be recorded may not leave. Once there is room again
everything goes on by itself: the rows are in the trail, and what the provider answered meanwhile is stored.

Where no file system may be mounted the processes are forbidden to let files grow (RLIMIT_FSIZE). To SQLite that is not a
full disk but a failing one, so then it is the grace that ends the hand-outs, and the table says so.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

from tests.chaos.books import judge_answers, judge_links
from tests.chaos.hosts import Host
from tests.chaos.probing import Answer, Probers
from tests.chaos.scenarios.database import judge_trail
from tests.chaos.stage import Run, Stage, staged

__all__ = ["run"]

_SIZE: Final = "192m"
_ROW: Final = 1000  # bytes that a row takes in the reserve at most, with its share of a batch
_HEALED: Final = 4.0  # seconds within which a process notices that there is room again
_PATIENCE: Final = 120.0


def run(run: Run) -> None:
    """Rounds of filling the disk until hand-outs are refused, and freeing it."""
    pace = run.pace
    names = [f"org-{number:02}" for number in range(pace.connections)]
    with (
        _disk(run) as disk,
        staged(run, directory=disk.folder, OUTAGE_GRACE_SECONDS=f"{pace.grace:g}") as stage,
    ):
        _open_hosts(stage)
        stage.warm_up(names)
        stage.made.emulator.control.salesforce.misbehave("latency", delay=pace.latency)
        full: list[tuple[float, float]] = []
        with stage.probers(names[: pace.connections // 2], min_ttl=1.0, threads=4, rate=pace.rate) as probers:
            for _ in run.rounds():
                _round(stage, disk, probers, names, full)
        answers = probers.answers()
        judge_answers(stage, answers, min_ttl=1.0, excused=lambda answer: _may_refuse(answer, full))
        judge_trail(stage, answers)


def _open_hosts(stage: Stage) -> None:
    reserve = stage.run.pace.reserve
    settings = {"CHAOS_RESERVE": str(reserve)} if reserve else {}
    for kind, name in (("web", "web1"), ("web", "web2"), ("worker", "worker1")):
        stage.host(name, kind, state="machine", **settings)  # type: ignore[arg-type]
    stage.start(stage.hosts)


def _round(
    stage: Stage, disk: Disk, probers: Probers, names: Sequence[str], full: list[tuple[float, float]]
) -> None:
    run = stage.run
    links = stage.bring(names[run.pace.connections // 2 :])
    time.sleep(run.dice.uniform(0.0, 2 * run.pace.latency))
    began = time.time()
    disk.fill(stage.hosts)
    run.tally.faults += 1
    run.say("full")
    refused = _wait_for_refusals(stage, disk, probers, began)
    disk.free(stage.hosts)
    freed = time.time()
    full.append((began, freed + _HEALED))
    run.say(f"refused after {freed - began:.1f} s, freed")
    _require_reserve_used(stage, probers.answers(), began, refused, freed)
    for link in stage.wait_until_settled(links, within=2 * run.pace.lease + 60):
        run.tally.break_(f"{link.name} did not come to rest after the disk was freed")
    _require_healed(stage, probers, freed)
    judge_links(stage, links)


def _wait_for_refusals(stage: Stage, disk: Disk, probers: Probers, began: float) -> dict[str, float]:
    """Keep it full until every web process refuses; when each did for the first time."""
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        disk.top_up()
        refused: dict[str, float] = {}
        for answer in probers.answers():
            if answer.begin > began and answer.status == 503:
                refused.setdefault(answer.host.name, answer.end)
        if len(refused) == len(stage.webs):
            return refused
        time.sleep(0.2)
    stage.run.tally.break_("the reserve was never used up: nothing was refused")
    return refused


def _require_reserve_used(
    stage: Stage, answers: Sequence[Answer], began: float, refused: dict[str, float], freed: float
) -> None:
    """Before the first refusal the reserve must have taken what fits into it."""
    fits = (stage.run.pace.reserve or 4 * 1024 * 1024) // _ROW
    for host in stage.webs:
        until = refused.get(host.name, freed)
        handed = sum(one.status == 200 and one.host is host and began < one.end <= until for one in answers)
        stage.run.tally.require(handed >= fits, f"{host.name} refused after {handed} hand-outs; {fits} fit")
        stage.run.tally.note(
            f"{host.name}: {handed} hand-outs on a full disk in {until - began:.1f} s, then 503"
        )


def _require_healed(stage: Stage, probers: Probers, freed: float) -> None:
    time.sleep(max(0.0, freed + _HEALED + 1.0 - time.time()))
    for host in stage.webs:
        later = [one for one in probers.answers() if one.host is host and one.begin > freed + _HEALED]
        stage.run.tally.require(
            bool(later) and all(one.status == 200 for one in later), f"{host.name} did not heal"
        )
        stage.run.tally.require(not host.died(), f"{host.name} died")


def _may_refuse(answer: Answer, full: Sequence[tuple[float, float]]) -> bool:
    return any(began < answer.end and answer.begin < until for began, until in full)


class Disk(Protocol):
    """Something that can be full."""

    folder: Path

    def fill(self, hosts: Sequence[Host]) -> None: ...

    def top_up(self) -> None: ...

    def free(self, hosts: Sequence[Host]) -> None: ...


@contextlib.contextmanager
def _disk(run: Run) -> Iterator[Disk]:
    folder = run.directory / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "drawbridge-chaos", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        run.tally.note("no file system could be mounted: files were forbidden to grow instead (RLIMIT_FSIZE)")
        yield _Limit(folder, run.pace.reserve or 4 * 1024 * 1024)
        return
    try:
        yield _Tmpfs(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class _Tmpfs:
    """A file system in memory, filled by one more file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self, _hosts: Sequence[Host]) -> None:
        self.top_up()

    def top_up(self) -> None:
        """Take whatever has become free, to the last block."""
        descriptor = os.open(self._filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            for size in (1 << 20, 1 << 12):
                with contextlib.suppress(OSError):
                    while True:
                        os.write(descriptor, bytes(size))
        finally:
            os.close(descriptor)

    def free(self, _hosts: Sequence[Host]) -> None:
        self._filler.unlink()


class _Limit:
    """No file of the hosts may grow beyond the largest there is."""

    def __init__(self, folder: Path, reserve: int) -> None:
        self.folder = folder
        self._reserve = reserve

    def fill(self, hosts: Sequence[Host]) -> None:
        largest = max(file.stat().st_size for file in self.folder.glob("*-wal"))
        self._limit(hosts, max(largest, self._reserve))

    def top_up(self) -> None:
        """The limit stands."""

    def free(self, hosts: Sequence[Host]) -> None:
        self._limit(hosts, resource.RLIM_INFINITY)

    def _limit(self, hosts: Sequence[Host], size: int) -> None:
        for pid in (pid for host in hosts for pid in host.processes()):
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))
