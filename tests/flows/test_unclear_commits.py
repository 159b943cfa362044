"""A database that fails at the commit: nobody knows whether it was stored, and nothing may be lost or blocked by that."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection as Transaction

from app.bootstrap import Services
from app.broker.connect import Start
from app.broker.connection import Connection, Health
from app.broker.refresh import EndingKind
from app.db.epoch import read_counter
from app.db.schema import epochs
from app.errors import AuditUnavailable, ConnectionDisabled, DatabaseUnavailable, RefreshHeld
from app.secret import Secret
from tests.broker_world import LEASE, World, connect_account
from tests.waiting import PATIENCE, until


@contextmanager
def failing_commits(host: Services, monkeypatch: pytest.MonkeyPatch, *, stored: bool) -> Iterator[None]:
    """Every commit of this host is reported as failed, whether it was carried out or not."""
    real = host.database.write

    @contextmanager
    def write(**options: float) -> Iterator[Transaction]:
        with real(**options) as transaction:
            yield transaction
            if not stored:
                raise DatabaseUnavailable
        raise DatabaseUnavailable

    with monkeypatch.context() as patched:
        patched.setattr(host.database, "write", write)
        yield


# A lease of which nobody was told


@pytest.mark.parametrize("stored", [True, False])
def test_a_lease_nobody_was_told_of_is_given_back(
    made: World, monkeypatch: pytest.MonkeyPatch, stored: bool
) -> None:
    """Nothing was sent under it, so the next refresh goes ahead as if it had never been, long before the token dies."""
    connection = made.connected("salesforce")
    with failing_commits(made.one, monkeypatch, stored=stored):
        ending = made.refresh(connection)
        assert (ending.kind, type(ending.error)) == (EndingKind.HELD, DatabaseUnavailable)
        assert (made.now(connection).open_attempt is not None) == stored
        assert made.refreshes("salesforce", connection) == []
    assert made.refresh(connection).kind is EndingKind.REFRESHED
    assert len(made.refreshes("salesforce", connection)) == 1
    first = [("not_sent", "lease_unclear")] if stored else []
    assert made.attempts(connection) == [*first, ("granted", None)]


def test_a_lease_over_a_silent_holder_is_given_back_as_it_was(
    made: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that may have been carried out stays as unclear as it was before somebody took it over unawares."""
    connection = made.connected("salesforce")
    with made.two.database.write() as transaction:
        assert made.two.store.take_lease(
            transaction, made.now(connection), attempt="silent", seconds=0.0, last_try=False
        )
    made.jump(7300)
    with failing_commits(made.one, monkeypatch, stored=True):
        assert made.refresh(connection).kind is EndingKind.HELD
        assert made.now(connection).last_try
    made.one.refresher.save_leftovers()
    after = made.now(connection)
    assert (after.open_attempt, after.last_try, after.lease_until) == ("silent", False, None)
    assert made.refresh(connection).kind is EndingKind.REFRESHED


def test_a_lease_is_given_back_after_the_commit_that_is_still_under_way(made: World) -> None:
    """On PostgreSQL a commit may outlive the client that gave up on it: giving back waits for its row."""
    connection = made.connected("salesforce")
    given = threading.Event()

    def give_back() -> None:
        with made.two.database.write() as transaction:
            made.two.store.give_lease_back(transaction, connection, attempt="unheard")
        given.set()

    with ThreadPoolExecutor(1) as other:
        with made.one.database.write() as transaction:
            assert made.one.store.take_lease(
                transaction, connection, attempt="unheard", seconds=LEASE, last_try=False
            )
            done = other.submit(give_back)
            made.one.clock.sleep(0.3)  # time enough to find nothing, for one that would not wait
            assert not given.is_set()
        done.result(PATIENCE)
    assert made.now(connection).open_attempt is None


# A connect that could not be stored


def a_trip(
    made: World, provider: str, account: str, *, again: Connection | None = None
) -> tuple[Start, str, Secret]:
    """A trip that has come back from the provider: its start, state and code."""
    start = made.one.connect.start(
        made.one.apps.find(provider),
        started_by="admin:cli",
        name=None if again else made.name(),
        connection=again,
    )
    consent = made.vendor(provider).consent(start.url, account=account)
    code, state = consent.answer("code"), consent.answer("state")
    assert code is not None
    assert state is not None
    return start, state, Secret(code)


def come_back(made: World, provider: str, trip: tuple[Start, str, Secret]) -> None:
    """Finish it while the database takes nothing from the connect."""
    start, state, code = trip

    def refuse(*_: object, **__: object) -> bool:
        raise DatabaseUnavailable

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(made.one.connect, "_commit", refuse)
        with pytest.raises(DatabaseUnavailable):
            made.one.connect.finish(provider, state=state, code=code, error=None, browser=start.browser)


def journals(made: World) -> list[Path]:
    """The journals on the first host's disk that hold something."""
    directory = made.one.settings.state_dir / "journal"
    return [file for file in directory.glob("*.journal") if file.stat().st_size]


def test_a_connect_that_could_not_be_stored_is_given_back(made: World) -> None:
    """The process that goes on does not keep the answer for ever: recovery finds no row for it and revokes the grant."""
    account = made.salesforce.add_account(users=[{"name": "ada"}])["id"]
    come_back(made, "salesforce", a_trip(made, "salesforce", account))
    assert len(journals(made)) == 1
    assert made.one.recovery.run() == 1
    assert journals(made) == []
    assert made.one.store.page() == []
    assert made.salesforce.totals().endpoints["revoke"] == 1


def test_nothing_is_connected_that_is_not_on_record(made: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trail that takes nothing: the connection is not stored, and its grant is given back."""
    account = made.salesforce.add_account(users=[{"name": "ada"}])["id"]
    start, state, code = a_trip(made, "salesforce", account)

    def refuse(_: object) -> None:
        raise AuditUnavailable

    with monkeypatch.context() as patched:
        patched.setattr(made.one.trail, "record", refuse)
        with pytest.raises(AuditUnavailable):
            made.one.connect.finish("salesforce", state=state, code=code, error=None, browser=start.browser)
    assert made.one.store.page() == []
    assert made.one.recovery.run() == 1
    assert made.salesforce.totals().endpoints["revoke"] == 1


def test_a_reconnect_that_could_not_be_stored_changes_nothing(made: World) -> None:
    """Whoever was told that it failed finds the connection as it was, and its own grant is not revoked."""
    connection = made.connected("salesforce")
    come_back(made, "salesforce", a_trip(made, "salesforce", connection.account_id, again=connection))
    assert made.one.recovery.run() == 1
    assert made.now(connection) == connection
    assert made.salesforce.totals().endpoints.get("revoke", 0) == 0
    assert made.refresh(connection).kind is EndingKind.REFRESHED
    assert made.salesforce.totals().reuses == 0


def test_a_grant_that_stands_by_now_is_not_revoked(made: World) -> None:
    """After a second try that went well the first answer may hold the very grant that is stored."""
    account = made.hubspot.add_account(users=[{"name": "ada"}])["id"]
    come_back(made, "hubspot", a_trip(made, "hubspot", account))
    connection = connect_account(made.one, made.made, "hubspot", name=made.name(), account=account)
    assert made.one.recovery.run() == 1
    assert made.hubspot.totals().endpoints.get("revoke", 0) == 0
    assert made.refresh(connection).kind is EndingKind.REFRESHED
    assert made.now(connection).health is Health.HEALTHY


# A database that went back


def set_counter(made: World, value: int) -> None:
    """Put the counter of the connections where a restored backup would have it."""
    with made.one.database.write() as transaction:
        transaction.execute(sa.update(epochs).where(epochs.c.name == "connections").values(value=value))


def counter(made: World) -> int:
    """Where the counter of the connections stands."""
    with made.one.database.read() as transaction:
        return read_counter(transaction, "connections")


def test_what_is_switched_off_after_a_restore_is_handed_out_no_more(made: World) -> None:
    """A process that saw higher counts before believes nothing it knew (P6)."""
    connection = made.connected("hubspot")
    caller = made.caller()
    set_counter(made, 1000)
    until(lambda: made.one.watch.look().connections == 1000)
    assert made.one.issuer.issue(caller, connection.name).generation == 1
    try:
        set_counter(made, 500)
        until(lambda: made.one.watch.look().connections == 500)
        made.one.issuer.issue(caller, connection.name)
        made.two.revoker.disable(connection.name)
        until(lambda: made.one.watch.look().connections > 500)
        assert made.one.issuer.ready(caller, connection.name) is None
        with pytest.raises(ConnectionDisabled):
            made.one.issuer.issue(caller, connection.name, max_wait=0.0)
    finally:
        for host in made.hosts:
            host.adoption.adopt()


def test_an_older_reading_of_the_counter_costs_nothing(made: World) -> None:
    """A thread that looked a moment before another one does not make the process forget what it knows."""
    connection = made.connected("hubspot")
    caller = made.caller()
    until(lambda: made.one.watch.look().connections == counter(made))
    made.one.issuer.issue(caller, connection.name)
    older = made.one.watch.look()
    newer = replace(older, connections=older.connections + 1, read_at=older.read_at + 0.001)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(made.one.epochs, "glance", lambda: newer)
        made.one.issuer.learn(newer)
        assert made.one.issuer.ready(caller, connection.name) is not None
        patched.setattr(made.one.epochs, "look", lambda: older)
        made.one.issuer.issue(caller, connection.name)
        assert made.one.issuer.ready(caller, connection.name) is not None


def test_a_refresh_does_not_begin_on_a_database_that_has_just_gone_back(
    made: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look at the counter and the lease: the lease itself is not taken, and nothing is sent."""
    connection = made.connected("salesforce")
    made.one.adoption.saw(made.one.watch.look().connections + 1000)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(made.one.adoption, "require", lambda: None)
            ending = made.refresh(connection)
        assert (ending.kind, type(ending.error)) == (EndingKind.HELD, RefreshHeld)
        assert made.refreshes("salesforce", connection) == []
        assert made.now(connection).open_attempt is None
    finally:
        for host in made.hosts:
            host.adoption.adopt()


def test_a_host_remembers_what_it_committed_itself(made: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the watch has noticed: a database that lost just that commit is found out."""
    connection = made.connected("salesforce")
    until(lambda: made.one.watch.look().connections == counter(made))
    before = made.one.watch.look()
    monkeypatch.setattr(made.one.watch, "look", lambda: before)
    assert made.one.adoption.disagreement() is None
    try:
        assert made.refresh(connection).kind is EndingKind.REFRESHED
        set_counter(made, before.connections)
        disagreement = made.one.adoption.disagreement()
        assert disagreement is not None
        assert disagreement.code == "restored"
    finally:
        for host in made.hosts:
            host.adoption.adopt()
