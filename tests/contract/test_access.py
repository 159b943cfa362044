"""Callers, permissions and denials over both databases, seen by more than one process."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from app.access.audit import Entry
from app.access.permissions import Action, Permission
from app.db.schema import callers
from app.errors import (
    AuditUnavailable,
    Conflict,
    DatabaseUnavailable,
    Forbidden,
    NotFound,
    RateLimited,
    Unauthenticated,
    Unprocessable,
)
from app.secret import Secret
from tests.access_stage import Stage, basic, stage
from tests.contract.audit_outage import bring_back, take_away

Opener = Callable[..., Stage]


@pytest.fixture
def open_stage(database_url: str, tmp_path: Path) -> Iterator[Opener]:
    """Open one stage for each process the test wants."""
    with ExitStack() as stack:
        opened: list[Stage] = []

        def open_one(**options: Any) -> Stage:
            context = stage(database_url, tmp_path / "state", migrated=bool(opened), **options)
            opened.append(stack.enter_context(context))
            return opened[-1]

        yield open_one


@pytest.fixture
def one(open_stage: Opener) -> Stage:
    """Give one process's stage."""
    return open_stage()


def audited(found: Stage, action: str) -> list[dict[str, Any]]:
    """List the rows of one action, oldest first."""
    rows = (json.loads(line) for line in found.trail.export())
    return sorted((row for row in rows if row["action"] == action), key=lambda row: row["at"])


# ---------------------------------------------------------------------------------------------- the register


def test_a_caller_is_added_with_a_secret_that_is_stored_hashed(one: Stage) -> None:
    """The secret works, and the database does not hold it."""
    added = one.add("crm", "token:issue@hubspot-*", allow_ips=["203.0.113.0/24"], rate=5.0)
    assert added.client_secret is not None
    with one.main.read() as connection:
        row = connection.execute(sa.select(callers)).one()
    assert row.secret_hash == added.client_secret.sha256()
    assert added.client_secret.reveal() not in str(row)
    assert one.callers.by_secret(added.caller.client_id, added.client_secret) == added.caller
    shown = one.callers.show("crm")
    assert shown.caller.permissions == (Permission(Action.TOKEN_ISSUE, "hubspot-*"),)
    assert (shown.way, shown.caller.rate, [str(n) for n in shown.caller.allow_ips]) == (
        "secret",
        5.0,
        ["203.0.113.0/24"],
    )
    assert [registration.caller.name for registration in one.callers.list()] == ["crm"]


def test_a_name_is_taken_once(one: Stage) -> None:
    """A second caller of the same name is a conflict and changes nothing."""
    one.add("crm")
    with pytest.raises(Conflict, match="crm"):
        one.add("crm")
    assert len(one.callers.list()) == 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("", {}),
        ("Crm", {}),
        ("-crm", {}),
        ("a" * 64, {}),
        ("crm", {"allow_ips": ["203.0.113.1/24"]}),
        ("crm", {"allow_ips": ["here"]}),
        ("crm", {"rate": 0.0}),
        ("crm", {"rate": float("nan")}),
        ("crm", {"jwks": {"keys": []}}),
        ("crm", {"jwks": {"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}}),
        ("crm", {"jwks_uri": "http://keys.example/jwks"}),
        ("crm", {"jwks_uri": "https://user:pw@keys.example/jwks"}),
        ("crm", {"jwks": {"keys": []}, "jwks_uri": "https://keys.example/jwks"}),
    ],
)
def test_what_cannot_be_a_caller_is_refused(one: Stage, name: str, options: dict[str, Any]) -> None:
    """Malformed names, networks, rates and keys are said to be so, and nothing is stored."""
    with pytest.raises(Unprocessable):
        one.add(name, **options)
    assert one.callers.list() == ()


def test_changing_an_unknown_caller_is_not_found(one: Stage) -> None:
    """Every verb says so in the same words."""
    permission = Permission.parse("token:issue@*")
    for change in (
        lambda: one.callers.rotate("crm"),
        lambda: one.callers.disable("crm"),
        lambda: one.callers.enable("crm"),
        lambda: one.callers.remove("crm"),
        lambda: one.callers.show("crm"),
        lambda: one.callers.allow("crm", permission),
        lambda: one.callers.deny("crm", permission),
    ):
        with pytest.raises(NotFound, match="crm"):
            change()


def test_every_change_is_on_record(one: Stage) -> None:
    """Who changed what stands in the trail, with the permission in words."""
    permission = Permission.parse("token:issue@*")
    one.add("crm", "sync:read@*")
    one.callers.allow("crm", permission, actor="admin:session")
    one.callers.allow("crm", permission)
    one.callers.deny("crm", permission)
    one.callers.rotate("crm")
    one.callers.disable("crm")
    one.callers.enable("crm")
    one.callers.remove("crm")
    rows = [json.loads(line) for line in one.trail.export()]
    assert [(row["action"].removeprefix("access:"), row["actor"]) for row in rows] == [
        ("caller:added", "admin:cli"),
        ("permission:given", "admin:session"),
        ("permission:given", "admin:cli"),
        ("permission:taken", "admin:cli"),
        ("caller:rotated", "admin:cli"),
        ("caller:disabled", "admin:cli"),
        ("caller:enabled", "admin:cli"),
        ("caller:removed", "admin:cli"),
    ]
    assert rows[0]["detail"] == {"permissions": ["sync:read@*"]}
    assert rows[1]["detail"] == {"permission": "token:issue@*"}
    assert {row["target"] for row in rows} == {"crm"}
    assert one.callers.list() == ()


def test_a_change_that_cannot_be_recorded_does_not_happen(one: Stage) -> None:
    """Without a record there is no new caller."""
    refuses = AuditUnavailable("full")

    def refuse(_: Entry) -> None:
        raise refuses

    one.trail.record = refuse  # type: ignore[method-assign]
    with pytest.raises(AuditUnavailable):
        one.add("crm")
    assert one.callers.list() == ()


def test_taking_a_permission_that_is_not_held_names_those_that_are(one: Stage) -> None:
    """A misspelt pattern does not silently take nothing."""
    one.add("crm", "token:issue@hubspot-*")
    with pytest.raises(NotFound, match=r"token:issue@hubspot-\*"):
        one.callers.deny("crm", Permission.parse("token:issue@hubspot"))


# -------------------------------------------------------------------------------------------- who is asking


def test_unknown_wrong_and_disabled_are_one_answer(one: Stage) -> None:
    """Nobody learns whether an id exists."""
    added = one.add("crm")
    stranger = "dbc_" + "A" * 22
    one.callers.disable("crm")
    for header in (
        basic(stranger, "x"),
        basic(added.caller.client_id, "wrong"),
        basic(added.caller.client_id, added.client_secret),
        "Bearer abc",
        None,
    ):
        with pytest.raises(Unauthenticated) as caught:
            one.authentication.authenticate(header)
        assert caught.value.detail == Unauthenticated().detail
    assert {row["actor"] for row in audited(one, "access:credential:refused")} == {"anonymous"}


def test_a_verified_header_costs_no_query_while_nothing_changes(one: Stage) -> None:
    """The second time only the epoch is looked at."""
    added = one.add("crm")
    header = basic(added.caller.client_id, added.client_secret)
    one.authentication.authenticate(header)
    statements: list[str] = []

    def note(_c: object, _k: object, statement: str, *_: object) -> None:
        statements.append(statement)

    sa.event.listen(sa.engine.Engine, "before_cursor_execute", note)
    try:
        assert one.authentication.authenticate(header) == added.caller
    finally:
        sa.event.remove(sa.engine.Engine, "before_cursor_execute", note)
    assert statements == []


@pytest.mark.parametrize("verb", ["rotate", "disable", "remove"])
def test_what_an_admin_takes_away_is_gone_on_every_process_within_a_second(
    open_stage: Opener, verb: str
) -> None:
    """A credential and a token that another process believes die there within one second of its clock."""
    here, there = open_stage(), open_stage()
    added = here.add("crm", "token:issue@*")
    token = here.tokens.mint(added.caller, frozenset({Action.TOKEN_ISSUE})).token
    headers = (basic(added.caller.client_id, added.client_secret), f"Bearer {token.reveal()}")
    there.clock.jump(1.0)
    believed = [there.authentication.authenticate(header) for header in headers]
    getattr(here.callers, verb)("crm")
    there.clock.jump(1.0)
    for header, caller in zip(headers, believed, strict=True):
        with pytest.raises(Unauthenticated):
            there.authentication.authenticate(header)
        with pytest.raises(Unauthenticated):
            there.access.require(caller, Action.TOKEN_ISSUE, "hubspot-1")


def test_a_permission_taken_away_is_gone_on_every_process_within_a_second(open_stage: Opener) -> None:
    """What one process's admin denies, another process's Access denies within one second of its clock."""
    here, there = open_stage(), open_stage()
    caller = here.add("crm", "token:issue@hubspot-*").caller
    there.clock.jump(1.0)
    there.access.require(caller, Action.TOKEN_ISSUE, "hubspot-1")
    here.callers.deny("crm", Permission.parse("token:issue@hubspot-*"))
    there.clock.jump(1.0)
    with pytest.raises(Forbidden):
        there.access.require(caller, Action.TOKEN_ISSUE, "hubspot-1")
    here.callers.allow("crm", Permission.parse("token:issue@hubspot-1"))
    there.clock.jump(1.0)
    there.access.require(caller, Action.TOKEN_ISSUE, "hubspot-1")


def test_the_watching_thread_brings_the_news_without_a_request_reading(open_stage: Opener) -> None:
    """With the poll running, a request finds out although it never reads the epoch itself."""
    here, there = open_stage(), open_stage()
    caller = here.add("crm", "token:issue@*").caller
    there.watch.start()
    there.access.require(caller, Action.TOKEN_ISSUE, "hubspot-1")
    here.callers.disable("crm")
    before = there.watch.look().access
    while there.watch.look().access == before:
        there.clock.sleep(0.01)
    assert not there.access.allows(caller, Action.TOKEN_ISSUE, "hubspot-1")


def test_a_caller_from_another_address_is_denied_and_that_is_on_record(one: Stage) -> None:
    """The allow-list holds networks of both kinds; an IPv4 address inside IPv6 is the IPv4 address."""
    added = one.add("crm", allow_ips=["203.0.113.0/24", "2001:db8::/32"])
    header = basic(added.caller.client_id, added.client_secret)
    for address in ("203.0.113.9", "2001:db8::1", "::ffff:203.0.113.9"):
        one.authentication.authenticate(header, address=address)
    for address in ("198.51.100.1", "2001:db9::1", None, "nonsense"):
        with pytest.raises(Forbidden):
            one.authentication.authenticate(header, address=address)
    rows = audited(one, "access:request:denied")
    assert {(row["actor"], row["detail"]["code"]) for row in rows} == {("caller:crm", "address")}
    assert len(rows) == 4


def test_a_caller_is_held_to_its_rate(one: Stage) -> None:
    """Above it is 429 with the seconds to wait, whatever way it authenticates."""
    added = one.add("crm", rate=2.0)
    header = basic(added.caller.client_id, added.client_secret)
    one.authentication.authenticate(header)
    one.authentication.authenticate(header)
    with pytest.raises(RateLimited):
        one.authentication.authenticate(header)
    one.clock.jump(0.5)
    one.authentication.authenticate(header)


def test_when_a_caller_was_last_seen_is_written_down_without_moving_the_epoch(one: Stage) -> None:
    """Knowing it costs the hot path nothing and makes nobody forget anything."""
    added = one.add("crm")
    one.authentication.authenticate(basic(added.caller.client_id, added.client_secret))
    before = one.watch.look().access
    one.authentication.note_used()
    one.clock.jump(1.0)
    assert one.callers.show("crm").last_used_at is not None
    assert one.watch.look().access == before


# ------------------------------------------------------------------------------------------------- decisions


def test_a_denial_is_recorded_before_it_is_told_and_is_the_same_for_what_does_not_exist(one: Stage) -> None:
    """The answer holds nothing of the target; the trail does, unless it could be a person or a secret."""
    caller = one.add("crm", "token:issue@hubspot-*").caller
    details = set()
    for target in ("salesforce-1", "no-such-thing", "bob@example.com"):
        with pytest.raises(Forbidden) as caught:
            one.access.require(caller, Action.TOKEN_ISSUE, target)
        details.add(caught.value.detail)
    assert len(details) == 1
    rows = audited(one, "access:request:denied")
    assert [row["target"] for row in rows][:2] == ["salesforce-1", "no-such-thing"]
    assert "bob" not in json.dumps(rows)
    assert rows[0]["detail"] == {"action": "token:issue", "code": "forbidden"}


def test_a_tokens_scopes_narrow_what_its_caller_may(one: Stage) -> None:
    """A token for reading cannot be used to get provider tokens."""
    added = one.add("crm", "token:issue@*", "connection:read@*")
    token = one.tokens.mint(added.caller, frozenset({Action.CONNECTION_READ})).token
    caller = one.authentication.authenticate(f"Bearer {token.reveal()}")
    one.access.require(caller, Action.CONNECTION_READ, "hubspot-1")
    with pytest.raises(Forbidden):
        one.access.require(caller, Action.TOKEN_ISSUE, "hubspot-1")
    one.access.require(added.caller, Action.TOKEN_ISSUE, "hubspot-1")


def test_refusals_of_unknown_callers_become_counts_after_ten_a_minute(one: Stage) -> None:
    """A flood of wrong credentials fills neither the disk nor is it forgotten."""
    for _ in range(35):
        with pytest.raises(Unauthenticated):
            one.authentication.authenticate("Bearer x")
    assert len(audited(one, "access:credential:refused")) == 10
    one.denials.tick()
    assert len(audited(one, "access:credential:refused")) == 10
    one.clock.jump(61)
    one.denials.tick()
    rows = audited(one, "access:credential:refused")
    assert len(rows) == 11
    assert (rows[-1]["outcome"], rows[-1]["detail"]) == ("counted", {"count": 25, "way": "bearer"})


def test_the_same_denial_many_times_a_second_is_counted(one: Stage) -> None:
    """Five rows, then a count; another target has rows of its own."""
    caller = one.add("crm").caller
    for target in ["a"] * 12 + ["b"]:
        with pytest.raises(Forbidden):
            one.access.require(caller, Action.TOKEN_ISSUE, target)
    assert [row["target"] for row in audited(one, "access:request:denied")] == ["a"] * 5 + ["b"]
    one.denials.flush()
    rows = audited(one, "access:request:denied")
    assert (rows[-1]["outcome"], rows[-1]["detail"]["count"]) == ("counted", 7)


def test_known_callers_are_believed_through_an_outage_for_the_grace(open_stage: Opener) -> None:
    """With the database gone, what was verified and decided holds for the grace, then nothing does."""
    found = open_stage(outage_grace=60.0)
    added = found.add("crm", "token:issue@*")
    header = basic(added.caller.client_id, added.client_secret)
    caller = found.authentication.authenticate(header)
    found.access.require(caller, Action.TOKEN_ISSUE, "hubspot-1")
    take_away(found.main)
    found.clock.jump(30)
    caller = found.authentication.authenticate(header)
    found.access.require(caller, Action.TOKEN_ISSUE, "hubspot-1")
    with pytest.raises(DatabaseUnavailable):
        found.authentication.authenticate(basic(added.caller.client_id, Secret("wrong")))
    found.clock.jump(31)
    with pytest.raises(DatabaseUnavailable):
        found.authentication.authenticate(header)
    bring_back(found.main)
