"""The simulation finds what it is there to find: each test breaks the protocol at one place and must see a promise broken.

A mutation replaces a piece of the real source, and fails as soon as that piece is not there any more. Most are found by the
plain schedules; where a fault needs a rare moment, the schedules are bent towards it, and the unbroken code is shown to
keep its promises in the very schedule that found the fault.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from app.broker import connection as connection_module
from app.broker import journal as journal_module
from app.broker import refresh as refresh_module
from app.broker import store as store_module
from app.broker.adoption import Adoption
from app.broker.connect import Connect
from app.broker.issue import Issuer
from app.broker.refresh import Refresher
from app.broker.store import Store
from app.crypto import envelope
from tests.simulation.host import Process
from tests.simulation.plan import Outcome, run_schedule
from tests.simulation.template import Template, make_template
from tests.simulation.world import World

FIRST_SEED = 1
MOST_SCHEDULES = 60


@dataclass(frozen=True)
class Edit:
    """One replacement in the source of a function that hangs on a class or a module."""

    owner: Any
    name: str
    find: str
    put: str


@dataclass(frozen=True)
class Mutation:
    """A way to break the protocol, what the simulation must say to it, and how schedules are bent towards it."""

    name: str
    edits: tuple[Edit, ...]
    says: str
    bend: Callable[[World], None] | None = None
    from_the_start: bool = False  # the installation was made by the broken product as well


@contextmanager
def broken(edits: tuple[Edit, ...]) -> Iterator[None]:
    """The product with these pieces of its source replaced."""
    of_one: dict[tuple[Any, str], list[Edit]] = {}
    for edit in edits:
        of_one.setdefault((edit.owner, edit.name), []).append(edit)
    with ExitStack() as stack:
        for (owner, name), those in of_one.items():
            stack.enter_context(patch.object(owner, name, _edited(owner, name, those)))
        yield


def _edited(owner: Any, name: str, edits: list[Edit]) -> Any:
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    for edit in edits:
        assert source.count(edit.find) == 1, f"{name} does not say {edit.find!r} once: mend this mutation"
        source = source.replace(edit.find, edit.put)
    made: dict[str, Any] = {}
    code = compile(source, inspect.getsourcefile(inspect.unwrap(function)) or "", "exec")
    exec(code, inspect.unwrap(function).__globals__, made)  # noqa: S102 - the source is our own
    return made[name]


# Bends


def lost_answers(world: World) -> None:
    """Many answers are lost on their way."""
    world.provider.weather.share, world.provider.weather.kinds = 0.6, ("reset_after", "failed_after")


def untrue_refusals(world: World) -> None:
    """The provider refuses a living grant now and then, once."""
    world.provider.weather.share, world.provider.weather.kinds = 0.8, ("refused_once",)


def late_answers(world: World) -> None:
    """Every answer is late."""
    world.provider.weather.share, world.provider.weather.kinds = 1.0, ("slow_answer",)
    world.provider.weather.latest = 4.5


def a_short_lease(world: World) -> None:
    """What the settings refuse: a lease shorter than a request may take."""
    world.lease = 3.0
    _about_to_die(world)
    late_answers(world)
    _ask_often(world)


def slow_work(world: World) -> None:
    """The provider takes longer than anybody waits, and the access token is about to die."""
    _about_to_die(world)
    world.provider.weather.share, world.provider.weather.kinds = 1.0, ("slow_work",)
    world.provider.weather.latest = world.lease
    _ask_often(world)


def a_crowd(world: World) -> None:
    """Many ask one process for a token that is not there, and the provider is slow."""
    _about_to_die(world)
    late_answers(world)

    def crowd() -> None:
        for name in world.accounts if world.living() else ():
            for _ in range(10):
                world.ask(world.living()[0], name, max_wait=30.0)

    for number in range(10):
        world.scheduler.call_at(6.0 + number, crowd)


def a_stopped_holder(world: World) -> None:
    """Whoever waits for an answer is stopped until its lease and its token are over; meanwhile nobody else gets one."""
    _about_to_die(world)

    def stop(process: Process) -> None:
        now = world.scheduler.now
        world.freeze(process, world.lease + 15.0)
        world.provider.weather.spells = [(now, now + world.lease + 40.0, "unavailable")]

    world.trap("http.written", 1, stop)
    _ask_often(world)


def a_long_stop(world: World) -> None:
    """Whoever waits for an answer is stopped until its lease is over, while the token lives on."""
    for name in world.accounts:
        world.age_token(name, left=world.provider.life / 3 + 1.0)
    world.provider.weather.share, world.provider.weather.spells = 0.0, []
    world.trap("http.written", 1, lambda process: world.freeze(process, world.lease + 14.0))


def a_stopped_reader(world: World) -> None:
    """Whoever has read and not yet taken the lease is stopped while another refreshes."""
    _stop_readers(world, 5.0)


def a_slow_reader(world: World) -> None:
    """Whoever has read and not yet taken the lease is stopped while another asks a slow provider."""
    _stop_readers(world, 1.5)
    late_answers(world)


def _stop_readers(world: World, seconds: float) -> None:
    _about_to_die(world)

    def stop(process: Process) -> None:
        task = world.scheduler.current
        if task is not None and "/refresh" in task.name:
            world.freeze(process, seconds)

    for countdown in range(1, 40, 3):
        world.trap("db.begin", countdown, stop)
    _ask_often(world)


def reconnected_meanwhile(world: World) -> None:
    """The account is connected anew while an answer is on its way."""
    _about_to_die(world)
    late_answers(world)
    for moment in (7.0, 9.0, 11.0):
        for name, account in world.accounts.items():
            if not account.minted:
                _order_reconnect(world, moment, name)
    _ask_often(world)


def reconnected_while_it_hangs(world: World) -> None:
    """The account is connected anew while everybody waits for a refresh whose answer never comes."""
    _about_to_die(world)
    world.provider.weather.share, world.provider.weather.kinds = 1.0, ("lost", "dropped")
    _ask_often(world)
    for number in range(8):
        _order_all_anew(world, 6.0 + 4.0 * number)

    def lose_refreshes_only(what: str) -> str:
        return "lost" if what == "refresh" and not world.healing else "good"

    world.provider.fate = lose_refreshes_only  # type: ignore[method-assign]


def removed_while_reconnected(world: World) -> None:
    """A connection is removed while its account is being connected again."""
    for name, account in world.accounts.items():
        if not account.minted:
            for number in range(6):
                _order_removal(world, 6.0 + 20.0 * number, name)
    world.provider.weather.share, world.provider.weather.spells = 0.0, []

    def stop(process: Process) -> None:
        world.trap("db.statement", 1, stop)
        task = world.scheduler.current
        if task is not None and "/admin" in task.name and world.random.random() < 0.1:
            world.freeze(process, 12.0)

    world.trap("db.statement", 1, stop)
    for number in range(6):
        for later in (0.5, 1.5, 2.5):
            _order_all_anew(world, 6.0 + later + 20.0 * number)


def _order_removal(world: World, moment: float, name: str) -> None:
    def order() -> None:
        world.order(f"disconnect {name}", lambda process: world.disconnect(process, name))

    world.scheduler.call_at(moment, order)


def _order_all_anew(world: World, moment: float) -> None:
    for name, account in world.accounts.items():
        if not account.minted:
            _order_reconnect(world, moment, name)


def a_restored_backup_and_busy_admins(world: World) -> None:
    """A backup is put back, and admins go on working on what they find."""
    a_restored_backup(world)
    for number in range(24):
        for name in world.accounts:
            _order_switch(world, 44.0 + 2.0 * number, name, on=number % 2 == 1)


def _order_switch(world: World, moment: float, name: str, *, on: bool) -> None:
    def order() -> None:
        world.order(
            f"switch {name}",
            lambda process: process.revoker.enable(name) if on else process.revoker.disable(name),
        )

    world.scheduler.call_at(moment, order)


def killed_and_reconnected(world: World) -> None:
    """Whoever has an answer on its disk is killed, and the account is connected anew before it is back."""
    _about_to_die(world)

    def kill(process: Process) -> None:
        task = world.scheduler.current
        if task is not None and "/refresh" in task.name:
            world.kill(process, back_after=30.0)

    for countdown in (2, 4, 6):
        world.trap("disk.synced", countdown, kill)
    _ask_often(world, until=20.0)
    for moment in (25.0, 26.0, 27.0):
        for name, account in world.accounts.items():
            if not account.minted:
                _order_reconnect(world, moment, name)


def late_answers_and_callers(world: World) -> None:
    """Every answer is late, and callers ask until the last moment of a token."""
    late_answers(world)
    world.provider.weather.spells = []
    life = world.provider.life
    for name in world.accounts:
        world.age_token(name, left=6.0)
    # From then on nobody refreshes, so that what is left of the token shows.
    world.provider.weather.spells = [(30.0, 2 * life, "unavailable")]
    for number in range(16):
        world.scheduler.call_at(life - 2.0 + number, lambda: _everybody_asks(world))


def a_restored_backup(world: World) -> None:
    """A backup is put back while everything runs, and callers ask on."""
    _about_to_die(world, left=20.0)
    world.scheduler.call_at(4.0, world.take_backup)
    for moment in (40.0, 50.0, 60.0, 70.0):
        world.scheduler.call_at(moment, world.restore)
    _ask_often(world, until=90.0)


def _about_to_die(world: World, left: float = 6.0) -> None:
    for name in world.accounts:
        world.age_token(name, left=left)
    world.provider.weather.share, world.provider.weather.spells = 0.0, []


def _ask_often(world: World, *, until: float = 60.0) -> None:
    for number in range(int(until / 4)):
        world.scheduler.call_at(5.0 + 4.0 * number, lambda: _everybody_asks(world, max_wait=30.0))


def _everybody_asks(world: World, *, max_wait: float = 0.0) -> None:
    for process in world.living():
        for name in world.accounts:
            world.ask(process, name, min_ttl=0.0 if max_wait == 0.0 else None, max_wait=max_wait)


def _order_reconnect(world: World, moment: float, name: str) -> None:
    def order() -> None:
        world.order(f"reconnect {name}", lambda process: world.reconnect(process, name))

    world.scheduler.call_at(moment, order)


# Mutations

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        # Either alone is harmless: what is read again must have the generation that was seen.
        "no re-read under the lease",
        (
            Edit(
                Refresher,
                "_take",
                "attempt = new_id()",
                "attempt = new_id(); before = self._store.tokens_of(seen.id)",
            ),
            Edit(Refresher, "_take", "self._store.read_leased(transaction, seen.id)", "before"),
            Edit(store_module, "_taking_the_lease", 'columns.generation == seen("seen_generation"),', ""),
            Edit(store_module, "_taking_the_lease", 'columns.health == seen("seen_health"),', ""),
            Edit(Store, "take_lease", '"seen_generation": seen.generation,', ""),
            Edit(Store, "take_lease", '"seen_health": seen.health.value,', ""),
        ),
        "P1",
        a_stopped_reader,
    ),
    Mutation(
        "fence on owner instead of generation",
        (
            Edit(
                Refresher,
                "_save_grant",
                "saved = self._store.save_tokens(transaction, after, sealed)",
                "owned = self._store.get_within(transaction, after.id)\n"
                "    saved = owned is not None and owned.open_attempt == lease.attempt"
                " and self._store.save_tokens(transaction, after, sealed)",
            ),
        ),
        "journal: the answer",
        a_stopped_holder,
    ),
    Mutation(
        "no fence at all",
        (
            Edit(
                Store,
                "save_tokens",
                '_OF_GENERATION,\n        {"at_id": after.id, "at_generation": after.generation - 1},',
                '_OF_ID,\n        {"at_id": after.id},',
            ),
        ),
        "fence",
        reconnected_meanwhile,
    ),
    Mutation(
        "transaction held open over HTTP",
        (
            Edit(
                Refresher,
                "_refresh",
                "outcome = self._present(lease, app, provider)",
                "with self._database.write(): outcome = self._present(lease, app, provider)",
            ),
        ),
        "P1: a transaction is open",
    ),
    Mutation(
        "lease below timeout",
        (Edit(Refresher, "_present", "self._clock.elapsed() > lease.ends - self._timeout", "False"),),
        "P1: two hold a lease",
        a_short_lease,
    ),
    Mutation(
        "first invalid_grant kills",
        (
            Edit(
                connection_module,
                "_refused",
                "if not seen or first is None or now - first < again:",
                "if first is None:",
            ),
        ),
        "P9",
        untrue_refusals,
    ),
    Mutation(
        "unlocked fallback",
        (
            Edit(
                Refresher,
                "_refresh",
                "if lease is None:\n        return Ending(EndingKind.BUSY)",
                "if lease is None:\n"
                "        read = self._store.tokens_of(seen.id)\n"
                "        ends = self._clock.elapsed() + 9.0\n"
                "        lease = Lease(connection=read[0], tokens=read[1], attempt=new_id(), ends=ends)",
            ),
        ),
        "P1: two hold a lease",
        a_slow_reader,
    ),
    Mutation(
        "commit before journal",
        (Edit(Refresher, "_keep", "self.journal_answer(lease.attempt, after, sealed) is not None", "False"),),
        "journal: the new refresh token",
    ),
    Mutation(
        "open attempt overtaken when the lease ran out",
        (Edit(refresh_module, "may_refresh", "connection.open_attempt is not None or ", ""),),
        "P1: an open attempt",
        a_long_stop,
    ),
    Mutation(
        "record sealed without its generation",
        (Edit(envelope, "_record_binding", 'struct.pack(">Q", place.generation)', 'b""'),),
        "P4",
        from_the_start=True,
    ),
    Mutation(
        "waiter limit off",
        (Edit(Issuer, "_place_to_wait", "if not self._room.acquire(blocking=False):", "if False:"),),
        "P2",
        a_crowd,
    ),
    Mutation(
        "unknown outcome on a rotating connection retried at once",
        (Edit(connection_module, "_unknown", "if not connection.may_rotate:", "if True:"),),
        "P1",
        lost_answers,
    ),
    Mutation(
        "last try while the provider may still be at work",
        (Edit(connection_module, "_unknown", "now + timedelta(seconds=rhythm.lease)", "now"),),
        "P1",
        slow_work,
    ),
    Mutation(
        "adoption guard off",
        (
            Edit(
                Adoption,
                "disagreement",
                "identifier, public_url = self._read_installation()",
                "return None",
            ),
        ),
        "adopt",
        a_restored_backup,
    ),
)

MUTATIONS += (
    Mutation(
        "waiters that do not look up",
        (Edit(Issuer, "_refreshed", "min(left, _LONGEST_BLINDNESS)", "left"),),
        "P2: a caller waited",
        reconnected_while_it_hangs,
    ),
    Mutation(
        "hold of a restored database ended by its counter",
        (Edit(Adoption, "_restored", "noted is None and seen >=", "seen >="),),
        "adopt",
        a_restored_backup_and_busy_admins,
    ),
    Mutation(
        "reconnected under another name",
        (Edit(Connect, "finish", "wanted.name if wanted is not None else trip.name", "trip.name"),),
        "rows",
        removed_while_reconnected,
    ),
    Mutation(
        "journal without fsync",
        (Edit(journal_module, "_append", "if durable:", "if False:"),),
        "journal: the new refresh token",
    ),
    Mutation(
        "replay without a fence",
        (
            Edit(
                Store,
                "replay",
                '_OF_GENERATION,\n        {"at_id": entry.connection, "at_generation": entry.generation - 1},',
                '_OF_ID,\n        {"at_id": entry.connection},',
            ),
        ),
        "fence",
        killed_and_reconnected,
    ),
    Mutation(
        "life counted from the answer instead of the request",
        (
            Edit(
                connection_module,
                "_granted",
                "granted.sent_at + timedelta(seconds=life)",
                "now + timedelta(seconds=life)",
            ),
        ),
        "P3",
        late_answers_and_callers,
    ),
)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    """Give the installation that every schedule begins with."""
    return make_template(tmp_path_factory.mktemp("simulation") / "template")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name.replace(" ", "-"))
def test_a_broken_protocol_breaks_a_promise(mutation: Mutation, template: Template, tmp_path: Path) -> None:
    """What is broken on purpose is found within a few schedules, and the very same schedule is kept by the real code."""
    found: Outcome | None = None
    theirs = template
    with broken(mutation.edits):
        if mutation.from_the_start:
            theirs = make_template(tmp_path / "template")
        for seed in range(FIRST_SEED, FIRST_SEED + MOST_SCHEDULES):
            outcome = run_schedule(seed, theirs, tmp_path / "world", prepare=mutation.bend)
            if outcome.violation is not None:
                found = outcome
                break
    assert found is not None, f"{mutation.name} went unnoticed in {MOST_SCHEDULES} schedules"
    assert found.violation is not None
    print(f"{mutation.name}: {found.violation} after {found.seed - FIRST_SEED + 1} schedules")
    assert found.violation.startswith(mutation.says)
    if mutation.bend is not a_short_lease:
        kept = run_schedule(found.seed, template, tmp_path / "world", prepare=mutation.bend)
        assert kept.violation is None
