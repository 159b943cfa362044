"""One schedule: what the seed decides beforehand, the run, and the healing after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from tests.simulation.checks import Violation
from tests.simulation.host import Process
from tests.simulation.provider import FATES
from tests.simulation.schedule import Step
from tests.simulation.template import Template
from tests.simulation.world import World

__all__ = ["Outcome", "run_schedule"]

_BAD_FATES: Final = tuple(name for name in FATES if name != "good")
# Where faults lie in wait, and among how many visits to such a point.
_TRAPS: Final = {
    "db.begin": 20,
    "db.statement": 140,
    "db.commit": 20,
    "db.committed": 20,
    "http.connect": 5,
    "http.check": 5,
    "http.checked": 5,
    "http.stamped": 5,
    "http.written": 5,
    "http.answered": 5,
    "disk.open": 6,
    "disk.rename": 3,
    "disk.write": 4,
    "disk.fsync": 8,
    "disk.synced": 8,
    "disk.cut": 4,
    "audit": 20,
}


@dataclass(slots=True)
class Outcome:
    """What a schedule came to."""

    seed: int
    steps: int = 0
    seconds: float = 0.0
    violation: str | None = None
    counts: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    windows: Counter[str] = field(default_factory=Counter)
    trace: list[Step] = field(default_factory=list)


def run_schedule(
    seed: int,
    template: Template,
    directory: Path,
    *,
    keep_all_steps: bool = False,
    prepare: Callable[[World], None] | None = None,
) -> Outcome:
    """Run one schedule to its end, or to the first broken promise; `prepare` may change what the seed decided."""
    world = World(template, directory, seed=seed, keep_all_steps=keep_all_steps)
    outcome = Outcome(seed)
    with world.running():
        try:
            end = _plan(world)
            if prepare is not None:
                prepare(world)
            world.scheduler.run(end)
            _heal(world)
        except Violation as violation:
            outcome.violation = str(violation)
        outcome.steps, outcome.seconds = world.scheduler.steps, world.scheduler.now
        outcome.trace = list(world.scheduler.trace)
    outcome.counts, outcome.faults, outcome.windows = world.checks.counts, world.faults, world.checks.windows
    return outcome


# What the seed decides


def _plan(world: World) -> float:
    random = world.random
    provider = world.provider
    provider.names_life = random.random() < 0.6
    # Where nobody names a life, 15 minutes are assumed until it is learned; none is shorter.
    provider.life = random.choice((60.0, 200.0, 900.0) if provider.names_life else (900.0, 2000.0))
    names = ["rotating"] * (random.random() < 0.85) + ["steady"] * (random.random() < 0.3)
    names += ["second"] * (random.random() < 0.2) + ["minted"] * (random.random() < 0.15)
    names = names or ["rotating"]
    world.keep_only(names)
    kinds = list(world.template.kinds)
    for name in names:
        world.add_account(name, kinds.index(name) + 1, age=provider.life * random.uniform(0.4, 1.02))
    for _ in range(random.choice((1, 2, 2, 3))):
        world.add_place()
    for number in range(random.choice((2, 2, 2, 3, 3, 4))):
        world.boot(world.places[number % len(world.places)], number)
    world.checks.look()
    end = provider.life * random.uniform(0.3, 1.1) + 25.0
    _plan_calls(world, end)
    _plan_weather(world, end)
    _plan_faults(world)
    _plan_admin(world, end)
    return end


def _plan_calls(world: World, end: float) -> None:
    random = world.random
    for _ in range(random.randrange(3, 8)):
        moment = random.random() * end
        name = random.choice(list(world.accounts))
        for _ in range(random.choice((1, 1, 2, 5))):
            world.scheduler.call_at(moment + 0.3 * random.random(), partial(_call, world, name))


def _call(world: World, name: str) -> None:
    random, living = world.random, world.living()
    if not living:
        return
    process = random.choice(living)
    min_ttl = random.choice((None, None, 1.0, 5.0, world.provider.life / 4))
    max_wait = random.choice((None, None, 0.0, 3.0, 30.0))
    world.ask(process, name, min_ttl=min_ttl, max_wait=max_wait, reject=random.random() < 0.08)


def _plan_weather(world: World, end: float) -> None:
    random, weather = world.random, world.provider.weather
    weather.share = random.choice((0.0, 0.1, 0.3, 0.6))
    weather.kinds = tuple(random.sample(_BAD_FATES, random.choice((1, 3, 6))))
    # No provider is slower than a time-out and a lease together: one that carries a request out later than that cannot be
    # told from one that lost it.
    weather.latest = random.choice((3.0, 8.0, world.lease))
    for _ in range(random.choice((0, 0, 1, 2))):
        start = end * random.random()
        long = random.choice((3.0, 20.0, 50.0))
        kind = random.choice(
            ("unavailable", "limited", "unreachable", "client_refused", "failed_before", "dropped")
        )
        weather.spells.append((start, start + long, kind))
        world.faults[f"spell {kind}"] += 1


def _plan_faults(world: World) -> None:
    random = world.random
    for _ in range(random.choice((0, 1, 2, 3, 5))):
        kind = random.choice(list(_TRAPS))
        name, befall = random.choice(_FAULTS)
        world.trap(kind, random.randrange(1, _TRAPS[kind] + 1), _counted(world, name, befall))


def _counted(world: World, name: str, befall: Callable[[World, Process], None]) -> Callable[[Process], None]:
    def spring(process: Process) -> None:
        world.faults[name] += 1
        befall(world, process)

    return spring


def _back_after(world: World) -> float | None:
    return world.random.choice((0.2, 3.0, world.lease + 2, world.provider.life, None))


def _kill(world: World, process: Process) -> None:
    world.kill(process, back_after=_back_after(world))


def _power(world: World, process: Process) -> None:
    world.power_off(process.place, back_after=_back_after(world) or 5.0)


def _freeze(world: World, process: Process) -> None:
    life = world.provider.life
    world.freeze(process, world.random.choice((1.0, 6.0, world.lease + 1, life * 0.7, life * 1.1)))


def _cut_off(world: World, process: Process) -> None:
    process.cut_off_until = world.scheduler.now + world.random.choice((0.5, 8.0, 40.0))


def _fail_next(fault: str) -> Callable[[World, Process], None]:
    def befall(_world: World, process: Process) -> None:
        process.next_fault = fault

    return befall


def _slow_down(world: World, process: Process) -> None:
    process.slow_until = world.scheduler.now + world.random.choice((2.0, 10.0))


def _fill_disk(world: World, process: Process) -> None:
    process.place.full = process.place.was_full = True
    place = process.place

    def room() -> None:
        place.full = False

    world.scheduler.call_at(world.scheduler.now + 60.0 * world.random.random(), room)


def _break_audit(world: World, _process: Process) -> None:
    world.audit_fails_until = world.scheduler.now + 5.0 * world.random.random()


_FAULTS: Final[tuple[tuple[str, Callable[[World, Process], None]], ...]] = (
    ("kill", _kill),
    ("kill", _kill),
    ("power", _power),
    ("freeze", _freeze),
    ("freeze", _freeze),
    ("database cut off", _cut_off),
    ("database slow", _slow_down),
    ("statement fails", _fail_next("error")),
    ("commit refused", _fail_next("commit_refused")),
    ("commit unknown", _fail_next("commit_unknown")),
    ("disk full", _fill_disk),
    ("audit fails", _break_audit),
)


def _plan_admin(world: World, end: float) -> None:
    random = world.random
    for _ in range(random.choice((0, 0, 1, 2, 3))):
        moment = end * random.random()
        what, act = random.choice(_ORDERS)
        world.faults[f"admin {what}"] += 1
        name = random.choice(list(world.accounts))
        world.scheduler.call_at(moment, partial(act, world, name))


def _switch(world: World, name: str) -> None:
    world.order(f"disable {name}", lambda process: process.revoker.disable(name))
    world.scheduler.call_at(
        world.scheduler.now + world.random.choice((0.1, 5.0, 60.0)),
        lambda: world.order(f"enable {name}", lambda process: process.revoker.enable(name)),
    )


def _reconnect(world: World, name: str) -> None:
    if not world.accounts[name].minted:
        world.order(f"reconnect {name}", lambda process: world.reconnect(process, name))


def _remove(world: World, name: str) -> None:
    if world.accounts[name].minted:
        return
    world.order(f"disconnect {name}", lambda process: world.disconnect(process, name))
    if world.random.random() < 0.7:
        world.scheduler.call_at(
            world.scheduler.now + world.random.choice((0.1, 3.0, 100.0)), lambda: _reconnect(world, name)
        )


def _import(world: World, name: str) -> None:
    if not world.accounts[name].minted:
        world.order(f"import {name}", lambda process: world.bring_in(process, name))


def _export(world: World, name: str) -> None:
    world.order(f"export {name}", lambda process: world.export(process, name))


def _rekey(world: World, _name: str) -> None:
    world.order("rekey", world.rekey)


def _revoke_upstream(world: World, name: str) -> None:
    account = world.accounts[name]
    if not account.minted:
        world.provider.revoke(account.families[-1], "its owner")


def _back_up_and_restore(world: World, _name: str) -> None:
    world.take_backup()
    for later in (10.0, world.provider.life * 0.4, world.provider.life * 0.8):
        world.scheduler.call_at(world.scheduler.now + later, world.restore)


_ORDERS: Final[tuple[tuple[str, Callable[[World, str], None]], ...]] = (
    ("switch", _switch),
    ("reconnect", _reconnect),
    ("reconnect", _reconnect),
    ("remove", _remove),
    ("import", _import),
    ("export", _export),
    ("rekey", _rekey),
    ("rekey", _rekey),
    ("revoke upstream", _revoke_upstream),
    ("restore", _back_up_and_restore),
)


# The end: no more faults; everything whose grant lives must come right


def _heal(world: World) -> None:
    world.healing = True
    world.scheduler.note("healing")
    world.provider.weather.share, world.provider.weather.spells = 0.0, []
    world.audit_fails_until = 0.0
    for place in world.places:
        place.full = False
    for process in list(world.processes):
        process.cut_off_until, process.slow_until, process.next_fault = 0.0, 0.0, ""
        if process.frozen:
            process.frozen = False
            world.scheduler.thaw(process)
        world.revive(process.place, process.number)
    world.scheduler.run(world.scheduler.now + 3.0)
    world.adopt_everywhere()
    for name in world.accounts:
        row = world.checks.rows.get(name)
        if row is not None and row.admin_state == "disabled":
            _enable(world, name)
    _wait_until_settled(world)


def _enable(world: World, name: str) -> None:
    world.order(f"enable {name}", lambda process: process.revoker.enable(name))


def _wait_until_settled(world: World) -> None:
    scheduler = world.scheduler
    # A last try waits for the access token's end; a refused connection for a lease; removals for their hold.
    limit = scheduler.now + world.provider.life + 400.0
    pause = 4.0
    problem: str | None = "nothing was tried"
    while problem is not None and scheduler.now < limit:
        scheduler.run(min(scheduler.now + pause, limit))
        pause = min(pause * 1.3, world.provider.life / 6, 60.0)
        problem = world.checks.unsettled()
        living = world.living()
        if problem is not None and living:
            world.adopt_everywhere()
            world.ask(world.random.choice(living), problem.split()[-1], max_wait=3.0)
    if problem is not None:
        world.checks.violated("liveness", problem)


Prepare = Callable[[World], Any]
