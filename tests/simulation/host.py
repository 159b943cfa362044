"""Machines, and the starts of the broker on them.

A *place* is a machine with its STATE_DIR; a *process* is one start of the broker on it. A killed process loses its memory,
its file locks and its open transaction; a machine that loses power loses in addition what its disk was not made to keep.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from app.access.belief import Belief
from app.broker.adoption import Adoption
from app.broker.apps import Apps
from app.broker.connect import Connect
from app.broker.installation import ActiveKek, Presence
from app.broker.issue import Issuer
from app.broker.journal import Entry, Journal
from app.broker.recover import Recovery
from app.broker.refresh import Process as Identity
from app.broker.refresh import Refresher
from app.broker.rekey import Keys
from app.broker.revoke import Revoker
from app.broker.store import Store
from app.broker.transfer import Transfer
from app.clock import Clock
from app.crypto.envelope import Sealer
from app.db.engine import Database
from app.db.epoch import EpochWatch
from app.errors import AuditUnavailable, DrawbridgeError
from app.jobs.worker import Worker
from tests.simulation.provider import Exchange, Network

if TYPE_CHECKING:
    from tests.simulation.world import World

__all__ = ["AHEAD", "HostClock", "Place", "Process"]

AHEAD: Final = 300.0


@dataclass(eq=False)
class Place:
    """A machine and its STATE_DIR."""

    name: str
    directory: Path
    skew: float
    boot: float
    full: bool = False
    was_full: bool = False
    synced: dict[str, int] = field(default_factory=dict)
    seen: tuple[int, float] = (-1, 0.0)  # the epoch its processes saw last, and since when
    promised: int = -1  # the epoch that must have reached the mark on its disk

    def notes_a_restore(self) -> bool:
        """Whether a process of this place has seen that the database went back."""
        mark = self.directory / "high-water.json"
        return mark.exists() and "restored" in json.loads(mark.read_text())


class HostClock(Clock):
    """A host's clock over virtual time: wrong by its skew, booted at its own moment."""

    def __init__(self, world: World, place: Place) -> None:
        super().__init__()
        self._world = world
        self._place = place

    def local(self) -> float:
        """What the machine believes."""
        return self._world.true_time(self._world.scheduler.now) + self._place.skew

    def elapsed(self) -> float:
        """Seconds since the machine was switched on."""
        return self._world.scheduler.now + self._place.boot

    def sleep(self, seconds: float) -> None:
        """Let virtual time pass."""
        self._world.scheduler.sleep(seconds)

    def wait(self, event: Any, seconds: float) -> bool:
        """Let it pass until the event is set."""
        return bool(event.wait(max(0.0, seconds)))


@dataclass(eq=False)
class Process:
    """One start of the broker on a place."""

    world: World
    place: Place
    number: int
    life: int
    dead: bool = False
    frozen: bool = False
    serving: bool = False
    could_not_know: bool = False  # that the database was restored
    raws: list[Any] = field(default_factory=list)
    descriptors: dict[int, str] = field(default_factory=dict)
    exchanges: list[Exchange] = field(default_factory=list)
    read_answers: list[str] = field(default_factory=list)
    disturbances: int = 0
    cut_off_until: float = 0.0
    slow_until: float = 0.0
    next_fault: str = ""

    def __post_init__(self) -> None:
        self.name = f"p{self.number}.{self.life}"
        self.clock = HostClock(self.world, self.place)

    def build(self) -> None:
        """Wire the real services up, as the program's own bootstrap does; raises what that raises."""
        world, clock, directory = self.world, self.clock, self.place.directory
        settings = world.template.settings
        self.database = Database(world.url, clock=clock, state_dir=directory, threads=8)
        self.database.sample_clock()
        self.watch = EpochWatch(self.database, clock)
        epochs = Belief(self.watch, clock, outage_grace=60.0)
        sealer = Sealer(world.keyring, ActiveKek(self.database, epochs))
        network: Any = Network(self)
        self.store = Store(self.database, sealer)
        trail: Any = SimpleNamespace(record=lambda entry: None)
        self.apps = Apps(
            self.database,
            sealer,
            clock,
            providers=world.template.providers,
            settings=settings,
            http=network,
            trail=trail,
        )
        self.journal = Journal(directory / "journal", self.name)
        self.adoption = Adoption(
            self.database,
            self.watch,
            clock,
            trail=trail,
            state_dir=directory,
            public_url=settings.public_url,
        )
        self.refresher = Refresher(
            self.database,
            self.store,
            apps=self.apps,
            journal=self.journal,
            adoption=self.adoption,
            http=network,
            clock=clock,
            process=Identity(id=self.name, host=self.place.name),
            lease_seconds=world.lease,
            timeout_seconds=world.timeout,
            ahead_seconds=AHEAD,
        )
        access: Any = Door(self)
        self.issuer = Issuer(
            self.store,
            access=access,
            refresher=self.refresher,
            epochs=epochs,
            clock=clock,
            waiters=world.waiters,
            assumed_life=900.0,
        )
        self.recovery = Recovery(
            self.database,
            self.store,
            journal=self.journal,
            apps=self.apps,
            refresher=self.refresher,
            clock=clock,
        )
        self.connect = Connect(
            self.database,
            self.store,
            apps=self.apps,
            refresher=self.refresher,
            sealer=sealer,
            trail=trail,
            clock=clock,
        )
        self.revoker = Revoker(
            self.database, self.store, apps=self.apps, refresher=self.refresher, trail=trail, clock=clock
        )
        self.transfer = Transfer(self.database, self.store, apps=self.apps, trail=trail, clock=clock)
        self.keys = Keys(self.database, world.keyring, journal=self.journal, trail=trail, clock=clock)
        self.presence = Presence(
            self.database, world.keyring, clock, kind="worker", version="0", process_id=self.name
        )
        self.worker = Worker(self._services())
        self._watch_the_journal()

    def _services(self) -> Any:
        return SimpleNamespace(
            clock=self.clock,
            database=self.database,
            store=self.store,
            apps=self.apps,
            adoption=self.adoption,
            refresher=self.refresher,
        )

    def _watch_the_journal(self) -> None:
        """Let the checks see what is appended and what is forgotten."""
        append, done = self.journal.append, self.journal.done

        def watched_append(entry: Entry) -> None:
            task = self.world.scheduler.current
            assert task is not None
            task.facts["appends"] = entry
            try:
                append(entry)
            finally:
                del task.facts["appends"]

        def watched_done(attempt: str) -> None:
            self.world.checks.dropped(attempt)
            done(attempt)

        self.journal.append = watched_append  # type: ignore[method-assign]
        self.journal.done = watched_done  # type: ignore[method-assign]

    # What a serving process does by itself

    def serve(self) -> None:
        """Start, then claim what is due, again and again, and see to the chores between."""
        scheduler = self.world.scheduler
        try:
            self.build()
            self.could_not_know = self.world.checks.could_not_know(self)
            self.presence.enter()
            self.recovery.run()
        except DrawbridgeError as error:
            scheduler.note("start failed", error.code)
            self.world.kill(self, back_after=2.0 + 5.0 * scheduler.random.random())
            return
        self.serving = True
        chores = 0
        while True:
            scheduler.sleep(self.world.next_look())
            if self.world.worth_a_look():
                with suppress(DrawbridgeError):
                    self.worker._claim()
                    self._remember()
                    self.worker._dispatch()
                    if any(row.admin_state == "disconnecting" for row in self.world.checks.rows.values()):
                        self._revoke_disconnected()
            chores += 1
            if chores % 8 == self.number % 8:
                self._do_chores(chores)

    def _do_chores(self, chores: int) -> None:
        for chore in (
            self.refresher.save_leftovers,
            lambda: self.store.mark_used(self.issuer.take_used(), now=self.clock.now()),
        ):
            with suppress(DrawbridgeError):
                chore()
        self.issuer.count()
        if chores % 16 == self.number % 16:
            for chore in (self.recovery.run, self.presence.beat, self.database.sample_clock):
                with suppress(DrawbridgeError):
                    chore()

    def keep_the_mark(self) -> None:
        """Run the chore "high water" twice, a while apart."""
        with suppress(DrawbridgeError):
            self._remember()
            self.world.scheduler.sleep(1.5)
            self._remember()

    def _remember(self) -> None:
        """The chore "high water": what it saw twice a second apart must be on the disk by the second time."""
        if self.adoption.disagreement() is not None:
            return
        now, epoch = self.world.scheduler.now, self.watch.look().connections
        before, since = self.place.seen
        if before != epoch:
            self.place.seen = (epoch, now)
        elif now - since > 1.2:
            self.place.promised = max(self.place.promised, epoch)

    def _revoke_disconnected(self) -> None:
        for connection in self.store.claim_disconnecting(limit=4, hold=120.0):
            self.revoker.carry_out(connection.id)


class Door:
    """Who may have what is not simulated; that the record may take a while, or fail, is."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def require(self, *_: object) -> None:
        """Everybody may."""

    def remembers(self, *_: object) -> bool:
        """Everybody may, and everybody knows."""
        return True

    def record(self, *_: object, **__: object) -> None:
        """A record that is durable after a while."""
        self.record_all()

    def refuse(self, *_: object, **__: object) -> None:
        """A refusal that is on record after a while."""
        self.record_all()

    def record_all(self, *_: object) -> None:
        """Records that are durable after a while."""
        world = self._process.world
        world.scheduler.point("audit")
        if world.audit_fails_until > world.scheduler.now:
            self._process.disturbances += 1
            raise AuditUnavailable
