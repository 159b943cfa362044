"""An orderly end: one step that fails takes nothing else with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.access.permissions import Action
from app.broker.installation import alive
from app.errors import AuditUnavailable, Forbidden
from app.telemetry import Event
from tests.contract.audit_outage import bring_back, take_away
from tests.installation import Installation, add_caller, installation


@pytest.fixture
def made(database_url: str, tmp_path: Path) -> Iterator[Installation]:
    """An installation where nothing is borne: what cannot be recorded at once is refused."""
    with installation(database_url, tmp_path, OUTAGE_GRACE_SECONDS="0") as opened:
        yield opened


def failed_steps(text: str) -> list[str]:
    """The steps of the end that failed, by the log."""
    lines = [json.loads(line) for line in text.splitlines()]
    return [line["step"] for line in lines if line["event"] == Event.STOP_FAILED]


def test_every_step_of_the_end_is_taken_though_one_fails(
    made: Installation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The counts cannot be recorded: the trail is closed and the process taken off the list all the same."""
    host, other = made.host(), made.host()
    add_caller(host, "connection:read@*")

    def refuse() -> None:
        raise AuditUnavailable

    with monkeypatch.context() as patched:
        patched.setattr(host.denials, "_write_counts", lambda _: refuse())
        with pytest.raises(AuditUnavailable):
            host.close()
    assert failed_steps(capsys.readouterr().err) == ["denials"]
    assert host.trail.head() is None
    assert list(host.settings.state_dir.glob("*.audit-spool")) == []
    assert [process.id for process in alive(other.database, now=other.clock.now())] == [other.process.id]
    host.close()


def test_counts_that_could_not_be_recorded_are_kept_for_the_next_time(made: Installation) -> None:
    """The database of the trail is away when they are to be written, and back at the next try."""
    host = made.host()
    host.upkeep.stop()
    caller = add_caller(host, "connection:read@*").caller
    for _ in range(40):
        with pytest.raises(Forbidden):
            host.access.require(caller, Action.TOKEN_ISSUE, "hubspot-1")
    take_away(host.audit_database)
    try:
        for _ in range(2):
            with pytest.raises(AuditUnavailable):
                host.denials.flush()
    finally:
        bring_back(host.audit_database)
    reviver = host.trail._reviver
    if reviver is not None:
        reviver.join(30)
    host.denials.flush()
    rows = host.trail.search(action=Event.ACCESS_DENIED, limit=200).rows
    own = sum(row.outcome == "denied" for row in rows)
    counted = sum((row.detail or {})["count"] for row in rows if row.outcome == "counted")
    assert own < 40
    assert own + counted == 40
