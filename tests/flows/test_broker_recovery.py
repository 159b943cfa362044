"""Holders that die, freeze or lose their database, and databases that are copies: no grant is spent twice, none is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NoReturn

import pytest
import sqlalchemy as sa

from app.bootstrap import Services, bootstrap
from app.broker import adoption as adoption_module
from app.broker.connection import Connection, Health
from app.broker.refresh import EndingKind
from app.db.schema import connections
from app.errors import Conflict, ConnectionDisabled, DatabaseUnavailable, RefreshHeld
from tests.broker_world import LEASE, World, connect_account, paused
from tests.installation import SALESFORCE, Installation, add_caller, connect, installation
from tests.waiting import PATIENCE, until

ROOT = Path(__file__).parents[2]


def leave_open(host: Services, connection: Connection) -> None:
    """Take the lease and die: the attempt stays open."""
    seen = host.store.named(connection.name)
    with host.database.write() as transaction:
        assert host.store.take_lease(transaction, seen, attempt="dead", seconds=LEASE, last_try=False)


# Holders that die


def test_a_dead_holder_of_a_rotating_connection_is_not_overtaken(made: World) -> None:
    """P1: its lease ran out, but it may have rotated: the living token is kept in use, and the one try comes at its end."""
    connection = made.connected("salesforce")
    leave_open(made.two, connection)
    assert made.refresh(connection).kind is EndingKind.BUSY
    made.jump(LEASE + 1)
    for _ in range(3):
        assert made.refresh(connection).kind is EndingKind.HELD
        assert made.issue(connection).generation == connection.generation
        made.jump(2000)
    assert made.refreshes("salesforce", connection) == []
    made.jump(2000)
    assert made.issue(connection).generation == connection.generation + 1
    after = made.now(connection)
    assert (after.health, after.last_try, after.open_attempt) == (Health.HEALTHY, False, None)


def test_a_dead_holder_that_had_rotated_ends_in_lost_answer(made: World) -> None:
    """The last try after a lost answer is final when it is refused: one refusal, not two."""
    connection = made.connected("salesforce")
    with frozen_for_ever(made.two, connection):
        assert made.grant_of(connection).rotations == 1
        made.jump(7300)
        made.refresh(connection)
        lost = made.now(connection)
        assert (lost.health, lost.last_error) == (Health.NEEDS_RECONNECT, "lost_answer")
        assert made.attempts(connection) == [("unknown", "holder_died"), ("refused", "expired_token")]


def test_a_dead_holder_of_a_plain_connection_is_just_followed(made: World) -> None:
    """Where nothing rotates the next one goes on as soon as the lease is over."""
    connection = made.connected("hubspot")
    leave_open(made.two, connection)
    assert made.refresh(connection).kind is EndingKind.BUSY
    made.jump(LEASE + 1)
    assert made.refresh(connection).kind is EndingKind.REFRESHED


@contextmanager
def frozen_for_ever(host: Services, connection: Connection) -> Iterator[None]:
    """Let a host ask the provider and freeze with the answer unread; what it does after the block counts for nothing."""
    with paused(host.refresher, "_conclude") as pause:
        future = host.refresher.ask(host.store.named(connection.name))
        pause.wait()
        yield
        with host.database.write() as transaction:
            transaction.execute(sa.delete(connections).where(connections.c.id == connection.id))
        pause.let_go()
        future.result(PATIENCE)


# Holders that come back late


def test_a_frozen_holder_that_returns_saves_the_only_good_token(made: World) -> None:
    """P1: suspended past its lease with the rotated token in hand, it stores it, for the generation still stands."""
    connection = made.connected("salesforce")
    with paused(made.one.refresher, "_conclude") as pause:
        future = made.one.refresher.ask(made.now(connection))
        pause.wait()
        made.jump(LEASE * 3)
        assert made.refresh(connection, host=made.two).kind is EndingKind.HELD
        pause.let_go()
        assert future.result(PATIENCE).kind is EndingKind.REFRESHED
    assert made.now(connection).generation == connection.generation + 1
    made.jump(7300)
    assert made.issue(connection).generation == connection.generation + 2
    assert made.salesforce.totals().reuses == 0


def test_a_late_token_revives_a_connection_given_up_meanwhile(made: World) -> None:
    """Another host had taken it for lost: the good token that still comes makes it healthy, and people are told so."""
    made.salesforce.change_app(SALESFORCE, reuse_revokes=False)
    connection = made.expired("salesforce")
    with paused(made.one.refresher, "_conclude") as pause:
        future = made.one.refresher.ask(made.now(connection))
        pause.wait()
        made.jump(LEASE + 1)
        made.refresh(connection, host=made.two)
        assert made.now(connection).last_error == "lost_answer"
        # Each host knows the time to a fraction of a second only, and what they tell is looked at in its order.
        made.jump(1)
        pause.let_go()
        assert future.result(PATIENCE).kind is EndingKind.REFRESHED
    assert made.now(connection).health is Health.HEALTHY
    assert made.findings() == []
    assert [event for event, _ in made.notices()] == [
        "connection.needs_reconnect",
        "connection.recovered",
    ]
    made.jump(7300)
    assert made.issue(connection).generation == connection.generation + 2
    made.salesforce.change_app(SALESFORCE, reuse_revokes=True)


@pytest.mark.parametrize("provider", ["hubspot", "salesforce"])
def test_an_install_during_a_refresh_wins(made: World, provider: str) -> None:
    """Connected again while the provider is asked: what the refresh brings is dropped, and nothing is revoked for it."""
    connection = made.connected(provider)
    with paused(made.one.refresher, "_conclude") as pause:
        future = made.one.refresher.ask(made.now(connection))
        pause.wait()
        fresh = connect_account(
            made.two, made.made, provider, name=connection.name, account=connection.account_id
        )
        pause.let_go()
        assert future.result(PATIENCE).kind is EndingKind.MOVED
    assert made.now(connection).generation == fresh.generation == connection.generation + 1
    assert made.vendor(provider).totals().revocations == []
    assert made.attempts(connection)[-1][0] == "superseded"
    made.jump(7300)
    assert made.issue(connection).generation == fresh.generation + 1


def test_a_token_for_a_removed_connection_is_given_back(made: World) -> None:
    """Disconnected, revoked and shredded while a holder was frozen: the token it returns with is revoked upstream."""
    connection = made.connected("hubspot")
    with paused(made.one.refresher, "_conclude") as pause:
        future = made.one.refresher.ask(made.now(connection))
        pause.wait()
        made.two.revoker.disconnect(connection.name)
        assert not made.two.revoker.carry_out(connection.id), "the lease is waited for"
        made.jump(LEASE + 1)
        assert made.two.revoker.carry_out(connection.id)
        before = made.hubspot.totals().endpoints["revoke"]
        assert before == 1
        pause.let_go()
        assert future.result(PATIENCE).kind is EndingKind.MOVED
    assert made.hubspot.totals().endpoints["revoke"] == before + 1
    assert not made.grant_of(connection).live
    journals = (made.made.directory / "host1" / "journal").glob("*")
    assert [file.name for file in journals if file.stat().st_size] == []


def test_disabling_during_a_refresh_keeps_the_token_and_hands_it_out_later(made: World) -> None:
    """What the refresh brings is stored, for the old one may be void; it leaves when the connection is enabled."""
    connection = made.connected("salesforce")
    with paused(made.one.refresher, "_conclude") as pause:
        future = made.one.refresher.ask(made.now(connection))
        pause.wait()
        made.two.revoker.disable(connection.name)
        pause.let_go()
        future.result(PATIENCE)
    after = made.now(connection)
    assert (after.state, after.generation) == ("disabled", connection.generation + 1)
    with pytest.raises(ConnectionDisabled):
        made.issue(connection)
    made.two.revoker.enable(connection.name)
    assert made.issue(connection).generation == connection.generation + 1


def test_disconnecting_during_a_refresh_revokes_what_it_brings(made: World) -> None:
    """The row waits for the refresh to end, then the newest refresh token is the one given back."""
    connection = made.connected("salesforce")
    with paused(made.one.refresher, "_conclude") as pause:
        future = made.one.refresher.ask(made.now(connection))
        pause.wait()
        made.two.revoker.disconnect(connection.name)
        assert not made.two.revoker.carry_out(connection.id)
        pause.let_go()
        future.result(PATIENCE)
    assert made.two.revoker.carry_out(connection.id)
    assert made.one.store.get(connection.id) is None
    assert not made.grant_of(connection).live


# A database that goes away in between


def test_a_token_survives_a_database_that_is_away(made: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer comes while the database has been gone for longer than anything is believed: sealed, kept, stored later."""
    connection = made.connected("salesforce")
    journal = made.made.directory / "host1" / "journal" / made.one.journal.name

    def away(*_: Any, **__: Any) -> Any:
        raise DatabaseUnavailable

    with paused(made.one.refresher, "_conclude") as pause:
        future = made.one.refresher.ask(made.now(connection))
        pause.wait()
        with monkeypatch.context() as patched:
            patched.setattr(made.one.database, "write", away)
            patched.setattr(made.one.database, "read", away)
            made.shift.seconds += 1
            patched.setattr(made.one.epochs, "_outage_grace", -1.0)
            pause.let_go()
            until(lambda: journal.exists() and journal.stat().st_size > 0)
            assert not future.done()
        assert future.result(PATIENCE).kind is EndingKind.REFRESHED
    made.jump(0)
    assert journal.stat().st_size == 0
    assert made.now(connection).generation == connection.generation + 1


def test_a_failure_told_while_the_database_is_away_is_stored_later(
    made: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal is not forgotten, nor taken for a lost answer, because its verdict could not be stored at once."""
    connection = made.connected("salesforce")
    made.revoke_upstream(connection, access_tokens=False)

    def away(*_: Any, **__: Any) -> Any:
        raise DatabaseUnavailable

    with paused(made.one.refresher, "_conclude") as pause:
        future = made.one.refresher.ask(made.now(connection))
        pause.wait()
        with monkeypatch.context() as patched:
            patched.setattr(made.one.database, "write", away)
            patched.setattr(made.one.database, "read", away)
            pause.let_go()
            made.one.clock.sleep(0.2)
            assert not future.done()
        future.result(PATIENCE)
    after = made.now(connection)
    assert (after.health, after.open_attempt) == (Health.DOUBTFUL, None)


def test_one_outcome_that_breaks_does_not_take_the_others_along(made: World) -> None:
    """Outcomes that wait for the database are each tried; a fault in one leaves the rest waiting."""
    done: list[str] = []

    def broken() -> bool:
        raise RuntimeError("broken")

    refresher = made.one.refresher
    refresher._unsaved.extend([broken, lambda: bool(done.append("second")) or True])
    with pytest.raises(RuntimeError):
        refresher.save_leftovers()
    assert refresher.save_leftovers() == 0
    assert done == ["second"]


# Keys


def test_keys_that_change_during_a_refresh(made: World) -> None:
    """Sealed under the old key and stored after the rotation, a record opens, and the next pass brings it along."""
    connection = made.connected("salesforce")
    keys = made.one.keys
    before = next(row.id for row in keys.list() if row.active)
    with paused(made.one.refresher, "journal_answer") as pause:
        future = made.one.refresher.ask(made.now(connection))
        pause.wait()
        fresh = keys.add()
        for host in made.hosts:
            host.presence.beat()
        assert list(keys.rotate(fresh))[-1].done >= 1
        with pytest.raises(Conflict, match="under way"):
            keys.retire(before)
        pause.let_go()
        assert future.result(PATIENCE).kind is EndingKind.REFRESHED
    assert kek_of(made, connection) == before
    assert made.issue(connection).generation == connection.generation + 1
    with pytest.raises(Conflict, match="sealed under"):
        keys.retire(before)
    list(keys.rotate())
    assert kek_of(made, connection) == fresh
    keys.retire(before)
    made.jump(7300)
    assert made.issue(connection).generation == connection.generation + 2


def kek_of(made: World, connection: Connection) -> str:
    """The KEK the row's record names."""
    with made.one.database.read() as transaction:
        query = sa.select(connections.c.kek_id).where(connections.c.id == connection.id)
        return str(transaction.execute(query).scalar_one())


def test_nothing_is_spent_that_could_not_be_sealed(made: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose keyring lacks the active key finds out before the refresh token is presented, not after."""
    connection = made.expired("salesforce")
    monkeypatch.setattr(made.one.sealer, "_active", lambda: "elsewhere")
    ending = made.refresh(connection)
    assert ending.kind is EndingKind.HELD
    assert made.refreshes("salesforce", connection) == []
    assert made.refresh(connection, host=made.two).kind is EndingKind.REFRESHED


# Killed, and started again

KILLED = """
import os, signal, sys
from app.bootstrap import bootstrap
from app.settings import load

services = bootstrap(load(os.environ, config_file=None), kind="web")
services.start()
append = services.journal.append

def dying(entry):
    if sys.argv[2] == "after":
        append(entry)
    os.kill(os.getpid(), signal.SIGKILL)

services.journal.append = dying
services.refresher.ask(services.store.named(sys.argv[1])).result()
"""


def killed_while_refreshing(made: Installation, name: str, *, when: str) -> None:
    """Refresh in a process that is killed before or after the journal's fsync, and in any case before the commit."""
    environment = {**os.environ, **made.environment(host="killed", **SHORT)}
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, name, when],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()


SHORT = {"LEASE_SECONDS": "12", "PROVIDER_TIMEOUT_SECONDS": "1"}


@contextmanager
def started(made: Installation, *, host: str, **overrides: str) -> Iterator[Services]:
    """A process on the STATE_DIR of this host, ended in good order."""
    services = bootstrap(made.settings(host=host, **SHORT, **overrides), kind="web")
    services.start()
    try:
        yield services
    finally:
        services.close()


def test_a_process_killed_after_the_fsync_loses_nothing(database_url: str, tmp_path: Path) -> None:
    """P1: kill -9 between journal and commit: the next process on that STATE_DIR stores the answer; nobody asks again."""
    with installation(database_url, tmp_path) as made:
        host = made.host(**SHORT)
        connection = connect(host, made, "salesforce")
        caller = add_caller(host).caller
        killed_while_refreshing(made, connection.name, when="after")
        assert host.store.named(connection.name).generation == connection.generation
        assert host.issuer.issue(caller, connection.name).generation == connection.generation
        with started(made, host="killed") as again:
            row = again.store.named(connection.name)
            assert (row.generation, row.open_attempt) == (connection.generation + 1, None)
            assert again.issuer.issue(caller, connection.name).generation == row.generation
            forced = again.issuer.issue(
                caller, connection.name, rejected=again.issuer.issue(caller, connection.name).digest
            )
            assert forced.generation == row.generation + 1
        totals = made.emulator.control.salesforce.totals()
        assert (totals.reuses, totals.outcomes["granted"]) == (0, 3)
        assert list((tmp_path / "killed" / "journal").iterdir()) == []


def test_an_answer_with_the_same_refresh_token_is_not_worth_a_journal(made: World) -> None:
    """HubSpot's answers bring no new refresh token; were one lost, asking again would do."""
    connection = made.connected("hubspot")
    journal = made.made.directory / "host1" / "journal" / made.one.journal.name
    journal.unlink(missing_ok=True)
    assert made.one.refresher.ask(connection).result(PATIENCE).kind is EndingKind.REFRESHED
    assert not journal.exists()


def test_a_process_killed_before_the_fsync_does_not_cost_the_living_token(tmp_path: Path) -> None:
    """The answer is gone; nobody presents the old refresh token while the access token lives."""
    with installation(f"sqlite:///{tmp_path / 'drawbridge.db'}", tmp_path) as made:
        host = made.host(**SHORT)
        connection = connect(host, made, "salesforce")
        killed_while_refreshing(made, connection.name, when="before")
        with started(made, host="killed") as again:
            row = again.store.named(connection.name)
            assert row.generation == connection.generation
            assert row.open_attempt is not None
            with again.database.write() as transaction:
                transaction.execute(sa.update(connections).values(lease_until=again.clock.now()))
            assert again.refresher.ask(row).result(PATIENCE).kind in (EndingKind.BUSY, EndingKind.HELD)
            caller = add_caller(again).caller
            assert again.issuer.issue(caller, connection.name).generation == row.generation
        assert made.emulator.control.salesforce.totals().reuses == 0


def test_an_answer_for_a_connection_that_is_gone_is_given_back(tmp_path: Path) -> None:
    """Killed with the answer in the journal, and the connection removed before the next start: the grant is revoked."""
    with installation(f"sqlite:///{tmp_path / 'drawbridge.db'}", tmp_path) as made:
        host = made.host(**SHORT)
        connection = connect(host, made, "salesforce")
        killed_while_refreshing(made, connection.name, when="after")
        with host.database.write() as transaction:
            transaction.execute(sa.delete(connections))
        grant = made.emulator.control.grants(vendor="salesforce")[-1]
        assert grant.live
        with started(made, host="killed"):
            assert not made.emulator.control.grant(grant.id).live
        assert list((tmp_path / "killed" / "journal").iterdir()) == []


# Copies


def test_a_copied_database_refreshes_nothing_until_it_is_adopted(tmp_path: Path) -> None:
    """Under another PUBLIC_URL living tokens leave and nothing is spent; after `adopt`, without a restart, all is well."""
    with installation(f"sqlite:///{tmp_path / 'drawbridge.db'}", tmp_path) as made:
        host = made.host(**SHORT)
        connection = connect(host, made, "salesforce")
        killed_while_refreshing(made, connection.name, when="after")
        elsewhere = {"PUBLIC_URL": "http://localhost:9000"}
        with started(made, host="killed", **elsewhere) as copy:
            assert copy.store.named(connection.name).generation == connection.generation
            assert list((tmp_path / "killed" / "journal").iterdir()) != [], "kept for whoever it belongs to"
            caller = add_caller(copy).caller
            assert copy.issuer.issue(caller, connection.name).generation == connection.generation
            ending = copy.refresher.ask(copy.store.named(connection.name)).result(PATIENCE)
            assert ending.kind is EndingKind.HELD
            assert isinstance(ending.error, RefreshHeld)
            with started(made, host="killed", **elsewhere) as command:
                reason = command.adoption.adopt()
                assert reason is not None
                assert reason.code == "copied"
            copy.recovery.run()
            row = copy.store.named(connection.name)
            assert row.generation == connection.generation + 1
            assert copy.refresher.ask(row).result(PATIENCE).kind is EndingKind.REFRESHED
        assert made.emulator.control.salesforce.totals().reuses == 0


def test_a_restored_backup_refreshes_nothing_until_it_is_adopted(tmp_path: Path) -> None:
    """The database went back behind what this host remembers: living tokens leave, the spent refresh tokens stay."""
    file = tmp_path / "drawbridge.db"
    with installation(f"sqlite:///{file}", tmp_path) as made:
        host = made.host(**SHORT)
        connection = connect(host, made, "salesforce")
        with sqlite3.connect(file) as source, sqlite3.connect(tmp_path / "backup.db") as target:
            source.backup(target)
        source.close()
        target.close()
        caller = add_caller(host).caller
        first = host.issuer.issue(caller, connection.name)
        assert host.issuer.issue(caller, connection.name, rejected=first.digest).generation == 2
        host.close()
        for suffix in ("", "-wal", "-shm"):
            file.with_name(file.name + suffix).unlink(missing_ok=True)
        shutil.copy(tmp_path / "backup.db", file)
        with started(made, host="host1") as restored:
            row = restored.store.named(connection.name)
            assert row.generation == 1
            caller = add_caller(restored).caller
            assert restored.issuer.issue(caller, connection.name).generation == 1
            ending = restored.refresher.ask(row).result(PATIENCE)
            assert isinstance(ending.error, RefreshHeld)
            assert len(made.emulator.control.salesforce.requests()) == 2
            reason = restored.adoption.adopt()
            assert reason is not None
            assert reason.code == "restored"
            restored.adoption.require()
            restored.refresher.ask(row).result(PATIENCE)
            assert len(made.emulator.control.salesforce.requests()) == 3


@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
def test_the_high_water_mark_is_tried_again_until_it_is_stored(
    made: World, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A mark the disk refused is no mark: it is written a moment later, though the database has not moved on since."""
    adoption, file = made.one.adoption, made.made.directory / "host1" / "high-water.json"
    made.jump(2)
    adoption.require()
    before = stored_mark(file)
    with disk_that_refuses(monkeypatch, step):
        made.connected("hubspot")
        made.jump(2)
        adoption.require()
        count = made.one.watch.look().connections
        assert stored_mark(file) == before < count
    made.jump(2)
    adoption.require()
    assert (made.one.watch.look().connections, stored_mark(file)) == (count, count)


def stored_mark(file: Path) -> int:
    """The counter a process would find that starts on this STATE_DIR now."""
    return int(json.loads(file.read_text())["connections"])


@contextmanager
def disk_that_refuses(monkeypatch: pytest.MonkeyPatch, step: str) -> Iterator[None]:
    """A disk that is full for the mark, or fails to write back what it took, or to name it."""

    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def write(mark: object, file: IO[str]) -> None:
        Path(file.name).write_text("{")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def rename(file: Path, to: Path) -> Path:
        return refuse() if to.name == "high-water.json" else renamed(file, to)

    renamed = Path.replace
    with monkeypatch.context() as patched:
        if step == "write":
            patched.setattr(adoption_module, "json", SimpleNamespace(dump=write, loads=json.loads))
        elif step == "fsync":
            patched.setattr(adoption_module, "os", SimpleNamespace(getpid=os.getpid, fsync=refuse))
        else:
            patched.setattr(Path, "replace", rename)
        yield


def test_a_state_dir_of_another_installation_holds_refreshing(tmp_path: Path) -> None:
    """STATE_DIR and database that do not belong together are noticed, and the journal in it is left for its owner."""
    with installation(f"sqlite:///{tmp_path / 'one.db'}", tmp_path) as made:
        host = made.host(**SHORT)
        connection = connect(host, made, "salesforce")
        killed_while_refreshing(made, connection.name, when="after")
        host.close()
        (tmp_path / "killed" / "high-water.json").write_text('{"installation": "another", "connections": 1}')
        with started(made, host="killed") as mixed:
            ending = mixed.refresher.ask(mixed.store.named(connection.name)).result(PATIENCE)
            assert isinstance(ending.error, RefreshHeld)
            assert list((tmp_path / "killed" / "journal").iterdir()) != []
            with started(made, host="killed") as command:
                reason = command.adoption.adopt()
                assert reason is not None
                assert reason.code == "foreign_state_dir"
            mixed.adoption.require()
