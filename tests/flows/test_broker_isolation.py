"""What goes wrong with one connection, or one record, stays with it, and nobody is left untold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from app.access.audit import Entry
from app.broker.connection import AdminState, Connection
from app.broker.refresh import EndingKind
from app.db.schema import connections, notices
from app.errors import Conflict, ConnectionDisabled
from app.jobs.worker import chores, revoking
from app.telemetry import Event
from tests.access_stage import JumpingClock
from tests.broker_world import World, write_direct
from tests.installation import HUBSPOT, installation
from tests.telling import Heard, listening

BROKEN = b"\x01\x01\x02k9" + b"0" * 120
HOUR = 3600


@pytest.fixture
def heard() -> Iterator[Heard]:
    """The log from here on."""
    with listening() as heard:
        yield heard


def odd(made: World, *, account: str | None = None) -> None:
    """Have the vendor answer with an error nobody knows, everybody or one account."""
    body = {"error": "account_suspended", "status": "HUB_SUSPENDED"}
    made.hubspot.misbehave("status", status=400, body=body, account=account)


# One account's unknown error


def test_one_accounts_unknown_error_holds_up_nobody_else(made: World) -> None:
    """P9: the others refresh at once, no breaker opens, nobody is told of the app, and the doctor blames the connection."""
    bad, good, idle = (made.connected("hubspot") for _ in range(3))
    odd(made, account=bad.account_id)
    made.jump(1801)
    for _ in range(6):
        assert made.refresh(bad).kind is EndingKind.FAILED
        assert made.one.apps.breaker(bad.app_id) is None
        assert made.refresh(good).kind is EndingKind.REFRESHED
        made.jump(61)
    assert made.issue(idle).generation == idle.generation + 1
    assert made.notices() == []
    assert made.findings() == []
    assert made.attempts(bad)[-1] == ("misconfigured", "unrecognised_error")
    judged = made.one.examiner.examine(made.now(bad))
    assert (judged.fault.value, judged.cause) == ("connection", "unrecognised")
    assert made.one.examiner.examine(made.now(good)).healthy


def test_an_unknown_error_of_many_is_one_finding_on_the_app(made: World) -> None:
    """A crowd that fails alike is told once, as the app's trouble, with no breaker and no connection marked."""
    many = made.imported("hubspot", 6)
    odd(made)
    for connection in many:
        made.refresh(connection)
    assert made.findings() == ["mass_failure"]
    assert made.one.apps.breaker(many[0].app_id) is None
    judged = made.one.examiner.examine(made.now(many[0]))
    assert (judged.fault.value, judged.cause) == ("app", "unrecognised_alike")
    (told,) = told_of(made)
    assert (told["fault"], told["cause"]) == ("app", "unrecognised_alike")


def told_of(made: World) -> list[dict[str, str]]:
    """The bodies of all notices."""
    with made.one.database.read() as transaction:
        return [row.body for row in transaction.execute(sa.select(notices.c.body))]


# A client secret that is refused now and then


def test_a_flapping_client_is_told_once_when_it_begins_and_once_when_it_ends(made: World) -> None:
    """Refusals and grants take turns during a rotation of the secret: one pair of notices, and the end comes by itself."""
    refused, granted = made.connected("hubspot"), made.connected("hubspot")
    for _ in range(5):
        made.hubspot.set_secrets(HUBSPOT, ["another"])
        try:
            assert made.refresh(refused).kind is EndingKind.FAILED
        finally:
            made.hubspot.set_secrets(HUBSPOT, ["hubspot-secret"])
        made.jump(61)
        assert made.refresh(granted).kind is EndingKind.REFRESHED
        assert made.one.apps.breaker(granted.app_id) is None
        assert made.one.examiner.lapse() == 0
        assert made.findings() == ["app_misconfigured"]
    made.jump(61)
    assert made.two.examiner.lapse() == 1
    assert made.findings() == []
    assert Counter(event for event, _ in made.notices()) == {"finding.opened": 1, "finding.closed": 1}


def test_a_refused_client_stays_told_until_a_grant_comes(made: World) -> None:
    """Quiet alone does not end it: with nothing granted it stands, and the first grant after two minutes ends it."""
    connection = made.connected("hubspot")
    made.hubspot.set_secrets(HUBSPOT, ["another"])
    try:
        made.refresh(connection)
    finally:
        made.hubspot.set_secrets(HUBSPOT, ["hubspot-secret"])
    made.jump(HOUR)
    assert made.one.examiner.lapse() == 0
    assert made.findings() == ["app_misconfigured"]
    assert made.refresh(connection).kind is EndingKind.REFRESHED
    assert made.findings() == []


# An admin's switch meets another admin


@pytest.mark.parametrize("switch", ["enable", "disable"])
def test_a_switch_does_not_undo_a_disconnect(
    made: World, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    """P6: disconnected between the other admin's look and his write: 409, and it stays taken away."""
    connection = made.connected("hubspot")
    if switch == "enable":
        made.one.revoker.disable(connection.name)
    look = made.one.store.named

    def overtaken(name: str) -> Connection:
        seen = look(name)
        made.two.revoker.disconnect(name)
        return seen

    with monkeypatch.context() as patched:
        patched.setattr(made.one.store, "named", overtaken)
        with pytest.raises(Conflict):
            getattr(made.one.revoker, switch)(connection.name)
    assert made.now(connection).admin_state is AdminState.DISCONNECTING
    made.jump(1)
    with pytest.raises(ConnectionDisabled):
        made.issue(connection)
    assert made.one.revoker.carry_out(connection.id)
    assert not made.grant_of(connection).live


# Grants that are not given back


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, "<html>"),
        (405, ""),
        (410, ""),
        (400, {"error": "never_heard_of"}),
        (404, {"error": "not_found"}),
    ],
)
def test_an_odd_answer_to_a_revocation_is_tried_again(
    made: World, status: int, body: str | dict[str, str]
) -> None:
    """The row keeps the token for as long as the grant lives, and the next answer that is a good one ends both."""
    connection = made.connected("hubspot")
    made.hubspot.misbehave("status", status=status, body=body, endpoint="revoke")
    made.one.revoker.disconnect(connection.name)
    assert not made.one.revoker.carry_out(connection.id)
    assert made.grant_of(connection).live
    made.hubspot.behave()
    assert made.one.revoker.carry_out(connection.id)
    assert not made.grant_of(connection).live
    assert made.findings() == []


def test_a_grant_the_provider_never_takes_back_is_told(made: World, heard: Heard) -> None:
    """RFC 7009 §2.2.1: there is no use in trying again; the row goes at once and a person is told of the living grant."""
    connection = made.connected("hubspot")
    body = {"error": "unsupported_token_type"}
    made.hubspot.misbehave("status", status=400, body=body, endpoint="revoke")
    made.one.revoker.disconnect(connection.name)
    assert made.one.revoker.carry_out(connection.id)
    assert made.one.store.get(connection.id) is None
    assert made.grant_of(connection).live
    assert made.findings() == ["revoke_gave_up"]
    gave_up = {"connection": connection.name, "provider": "hubspot", "code": "gave_up", "again": False}
    assert heard.of(Event.REVOKE_FAILED) == [gave_up]


def test_nobody_is_told_of_a_grant_that_is_meant_to_live(made: World) -> None:
    """A connection that was moved to another installation is forgotten here, and its grant is left alone."""
    connection = made.connected("hubspot")
    write_direct(made.one.database, connection, exported_at=made.one.clock.now())
    made.one.revoker.disconnect(connection.name)
    assert made.one.revoker.carry_out(connection.id)
    assert made.grant_of(connection).live
    assert made.findings() == []


# Records that do not open


def test_a_connection_that_does_not_open_can_be_disconnected(made: World) -> None:
    """Tried for a day, as another worker's keyring may be whole, then destroyed with a finding; others are not held up."""
    broken, sound = made.connected("hubspot"), made.connected("hubspot")
    write_direct(made.one.database, broken, sealed=BROKEN)
    for connection in (broken, sound):
        made.one.revoker.disconnect(connection.name)
    assert revoking(made.one)() == 1
    assert made.one.store.get(sound.id) is None
    assert made.now(broken).last_error == "revoke_failed"
    made.jump(86_401)
    assert revoking(made.one)() == 1
    assert made.one.store.get(broken.id) is None
    assert made.findings() == ["revoke_gave_up"]


def test_a_record_that_does_not_open_holds_up_no_rotation(made: World) -> None:
    """All others are re-wrapped, however many; it is named at the end, and its key cannot be given up while it is there."""
    sound = made.imported("hubspot", 12)
    broken = made.imported("hubspot", 2)
    keys = made.one.keys
    before = next(row.id for row in keys.list() if row.active)
    for connection in broken:
        write_direct(made.one.database, connection, sealed=BROKEN)
    fresh = keys.add()
    for host in made.hosts:
        host.presence.beat()
    last = list(keys.rotate(fresh))[-1]
    names = {f"connection {connection.name}" for connection in broken}
    assert (set(last.unopenable), len(last.unopenable)) == (names, 2)
    assert last.done == last.total - 2
    assert {kek_of(made, connection) for connection in sound} == {fresh}
    assert {kek_of(made, connection) for connection in broken} == {before}
    assert set(list(keys.rotate())[-1].unopenable) == names, "and again when it goes on"
    with pytest.raises(Conflict, match="those that do not open"):
        keys.retire(before)
    for connection in broken:
        made.one.revoker.disconnect(connection.name)
    made.jump(86_401)
    assert revoking(made.one)() == 2
    keys.retire(before)
    assert made.issue(sound[0]).generation == sound[0].generation + 1


def kek_of(made: World, connection: Connection) -> str:
    """The KEK the row's record is counted under."""
    with made.one.database.read() as transaction:
        query = sa.select(connections.c.kek_id).where(connections.c.id == connection.id)
        return str(transaction.execute(query).scalar_one())


# Retention where workers do not grow old


def test_a_worker_that_outlives_the_others_prunes_within_the_hour(tmp_path: Path) -> None:
    """One that was not the oldest when it started finds out soon, not after a day that it may not live to see."""
    clock = JumpingClock()
    with installation(f"sqlite:///{tmp_path / 'd.db'}", tmp_path, AUDIT_RETENTION_DAYS="1") as made:
        old, young = (made.host("worker", clock=clock) for _ in range(2))
        (retention,) = (job for job in chores(young) if job.name == "retention")
        old.trail.record(Entry("worker", "broker:connection:enabled", "c"))
        clock.jump(2 * 86_400)
        old.presence.beat()
        young.presence.beat()
        assert retention.run() == 0
        clock.jump(retention.every)
        young.presence.beat()
        assert retention.run() == 1
        assert retention.every <= HOUR
