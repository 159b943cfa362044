"""What a host has in hand and could not store comes before whatever else it does with that connection (P1).

A rotated token that is not stored yet makes the one in the row a spent one: presenting that again would revoke the grant.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import pytest
from sqlalchemy.engine import Connection as Transaction

from app.bootstrap import Services
from app.broker.connection import Connection, Health
from app.broker.refresh import EndingKind
from app.errors import DatabaseUnavailable
from tests.broker_world import LEASE, Pause, World, paused
from tests.waiting import PATIENCE

GIVEN_UP = 31.0  # seconds after which a refresh no longer tries by itself to store what it has
DEAD = 7300.0  # seconds after which an access token of the emulated Salesforce has run out


class Door:
    """Stands before the writes of one host's database and lets through what a test lets through.

    What the host does by itself every second is kept out the whole time, so that only the refreshes asked for here can
    store anything.
    """

    def __init__(self, host: Services) -> None:
        self.refuses: Callable[[], bool] = lambda: False
        self.turned_away = threading.Event()  # somebody other than the host by itself
        self._write = host.database.write

    def write(self, **options: float) -> AbstractContextManager[Transaction]:
        """In place of `Database.write`."""
        if threading.current_thread().name == "upkeep":
            raise DatabaseUnavailable
        if self.refuses():
            self.turned_away.set()
            raise DatabaseUnavailable
        return self._write(**options)

    def refuse_next(self) -> None:
        """Refuse one write, and let through those that come after it."""
        answers = iter([True])
        self.refuses = lambda: next(answers, False)


@pytest.fixture
def door(made: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    """The door before the first host's database, open."""
    door = Door(made.one)
    with monkeypatch.context() as patched:
        patched.setattr(made.one.database, "write", door.write)
        yield door
    made.one.refresher.save_leftovers()


@pytest.fixture
def in_hand(made: World, door: Door) -> Connection:
    """A connection as its row has it, whose newer token the first host holds; the row's access token is dead.

    The provider has rotated, the database refused the answer for longer than the refresh tried, and is back.
    """
    connection = made.connected("salesforce")
    with paused(made.one.refresher, "_conclude") as pause:
        future = made.one.refresher.ask(made.now(connection))
        pause.wait()
        door.refuses = lambda: True
        pause.let_go()
        assert door.turned_away.wait(PATIENCE)
        made.jump(GIVEN_UP)
        assert future.result(PATIENCE).kind is EndingKind.HELD
    door.refuses = lambda: False
    made.jump(DEAD)
    assert made.now(connection).generation == connection.generation
    assert made.grant_of(connection).rotations == 1
    return connection


def test_what_could_not_be_stored_is_stored_before_the_next_refresh(made: World, in_hand: Connection) -> None:
    """With its own answer still in hand a host presents nothing: what the caller wants is stored by then."""
    assert made.refresh(in_hand).kind is EndingKind.MOVED
    after = made.now(in_hand)
    assert (after.generation, after.health) == (in_hand.generation + 1, Health.HEALTHY)
    assert len(made.refreshes("salesforce", in_hand)) == 1
    assert made.issue(in_hand).generation == in_hand.generation + 2
    assert made.salesforce.totals().reuses == 0


def test_nothing_is_refreshed_while_something_is_left_to_store(
    made: World, door: Door, in_hand: Connection
) -> None:
    """A database that refuses the answer in hand, and would take the lease a moment later, is not asked for that lease."""
    door.refuse_next()
    ending = made.refresh(in_hand)
    assert (ending.kind, type(ending.error)) == (EndingKind.HELD, DatabaseUnavailable)
    assert len(made.refreshes("salesforce", in_hand)) == 1
    assert made.refresh(in_hand).kind is EndingKind.MOVED
    assert made.now(in_hand).generation == in_hand.generation + 1
    assert made.salesforce.totals().reuses == 0


def test_a_refresh_waits_for_what_another_thread_is_storing(
    made: World, door: Door, in_hand: Connection
) -> None:
    """Taken from the list and not yet in the row, an answer is still in hand: nobody goes on as if there were none."""
    storing = Pause()

    def hold_the_first() -> bool:
        if not storing.reached.is_set():
            storing.arrive()
        return False

    door.refuses = hold_the_first
    with ThreadPoolExecutor(1) as other, paused(made.one.adoption, "require") as begun:
        saved = other.submit(made.one.refresher.save_leftovers)
        storing.wait()
        future = made.one.refresher.ask(made.now(in_hand))
        begun.wait()
        begun.let_go()
        made.one.clock.sleep(0.5)  # time enough to present the token, for a host that would
        assert not future.done()
        storing.let_go()
        assert saved.result(PATIENCE) == 0
        assert future.result(PATIENCE).kind is EndingKind.MOVED
    assert len(made.refreshes("salesforce", in_hand)) == 1
    assert made.salesforce.totals().reuses == 0


# The last try


def test_a_last_try_is_not_made_when_the_answer_has_come_after_all(made: World) -> None:
    """The holder that was taken for dead stores its token at the last moment: the other host sends nothing."""
    connection = made.expired("salesforce")
    with paused(made.one.refresher, "_conclude") as late, paused(made.two.refresher, "_present") as last:
        first = made.one.refresher.ask(made.now(connection))
        late.wait()
        made.jump(LEASE + 1)
        second = made.two.refresher.ask(made.now(connection))
        last.wait()
        assert made.now(connection).last_try
        late.let_go()
        assert first.result(PATIENCE).kind is EndingKind.REFRESHED
        last.let_go()
        second.result(PATIENCE)
    after = made.now(connection)
    assert (after.generation, after.health) == (connection.generation + 1, Health.HEALTHY)
    assert len(made.refreshes("salesforce", connection)) == 1
    assert made.attempts(connection)[-1] == ("not_sent", "abandoned")
    made.jump(DEAD)
    assert made.issue(connection).generation == connection.generation + 2
    assert made.salesforce.totals().reuses == 0


def test_a_last_try_is_not_made_when_nobody_can_tell_whether_the_answer_has_come(
    made: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that cannot be asked at that moment may hold the newer token: nothing is sent, and the late one is kept."""
    connection = made.expired("salesforce")

    def away(*_: Any, **__: Any) -> Any:
        raise DatabaseUnavailable

    with paused(made.one.refresher, "_conclude") as late, paused(made.two.refresher, "_present") as last:
        first = made.one.refresher.ask(made.now(connection))
        late.wait()
        made.jump(LEASE + 1)
        second = made.two.refresher.ask(made.now(connection))
        last.wait()
        with monkeypatch.context() as patched:
            patched.setattr(made.two.store, "get", away)
            last.let_go()
            second.result(PATIENCE)
        assert len(made.refreshes("salesforce", connection)) == 1
        late.let_go()
        assert first.result(PATIENCE).kind is EndingKind.REFRESHED
    assert made.now(connection).generation == connection.generation + 1
    assert made.salesforce.totals().reuses == 0
