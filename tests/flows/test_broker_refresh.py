"""Refreshing, judged from the provider's side: one spend, nobody waits in vain, nobody is blamed who is not to blame."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

import pytest

from app.access.audit import Entry, Found
from app.access.permissions import Permission
from app.broker.connection import Health, Rotation
from app.broker.issue import FORCED_EVERY
from app.broker.refresh import EndingKind
from app.clock import Clock
from app.errors import (
    ConnectionDisabled,
    Forbidden,
    InvalidRequest,
    NeedsReconnect,
    ProviderMisconfigured,
    ProviderRateLimited,
    ProviderUnavailable,
    RefreshInProgress,
)
from app.telemetry import Event
from tests.broker_world import LEASE, World, paused, together, write_direct
from tests.installation import SALESFORCE
from tests.waiting import PATIENCE, until

CALLERS = 64


# One spend


@pytest.mark.parametrize("provider", ["hubspot", "salesforce"])
def test_a_crowd_of_callers_on_two_hosts_costs_one_refresh(made: World, provider: str) -> None:
    """64 callers on two hosts find one expired token: the provider sees one refresh, and all get what it brought."""
    connection = made.expired(provider)
    caller = made.caller()
    hosts = (made.one, made.two)
    handed = together(CALLERS, lambda n: hosts[n % 2].issuer.issue(caller, connection.name))
    assert {token.generation for token in handed} == {connection.generation + 1}
    assert len({token.digest for token in handed}) == 1
    (seen,) = made.refreshes(provider, connection)
    assert seen.outcome == "granted"
    assert made.vendor(provider).totals().reuses == 0


def test_many_connections_on_two_hosts_are_each_refreshed_once(made: World) -> None:
    """Two hosts that refresh the same sixteen rotating connections at once present no refresh token twice."""
    connections = made.imported("salesforce", 16)
    hosts = (made.one, made.two)

    def refresh(number: int) -> None:
        for connection in connections[number * 4 :] + connections[: number * 4]:
            made.refresh(connection, host=hosts[number % 2])

    together(4, refresh)
    totals = made.salesforce.totals()
    assert totals.reuses == 0
    assert totals.most_open >= 1
    presented = [request.refresh_sha256 for request in made.refreshes("salesforce")]
    assert len(presented) == len(set(presented)), "a refresh token was presented twice"
    for connection in connections:
        assert made.now(connection).health is Health.HEALTHY


def test_a_living_token_is_handed_out_while_a_refresh_hangs(made: World) -> None:
    """P2: a refresh that the provider does not answer holds up nobody who can be served without it."""
    connection = made.connected("salesforce")
    caller = made.caller()
    made.salesforce.misbehave("hang")
    future = made.one.refresher.ask(made.now(connection))
    assert made.one.issuer.issue(caller, connection.name).generation == connection.generation
    assert made.two.issuer.issue(caller, connection.name).generation == connection.generation
    made.salesforce.behave()
    future.result(PATIENCE)


def test_a_hanging_provider_takes_no_room_from_others(made: World) -> None:
    """P2: with every place for waiting taken, another connection's token still leaves at once."""
    dead, living = made.expired("hubspot"), made.connected("salesforce")
    caller = made.caller()
    made.hubspot.misbehave("hang", count=1)
    places = made.one.issuer.waiting()
    turned_away: list[RefreshInProgress] = []
    errors: list[Exception] = []

    def ask() -> None:
        try:
            made.one.issuer.issue(caller, dead.name, max_wait=PATIENCE)
        except Exception as error:  # noqa: BLE001 - looked at below
            errors.append(error)

    waiting = [threading.Thread(target=ask) for _ in range(places)]
    for thread in waiting:
        thread.start()
    while made.one.issuer.waiting():
        assert made.one.issuer.issue(caller, living.name).enabled
    try:
        made.one.issuer.issue(caller, dead.name, max_wait=0)
    except RefreshInProgress as error:
        turned_away.append(error)
    assert made.one.issuer.issue(caller, living.name).connection == living.name
    made.hubspot.behave()
    for thread in waiting:
        thread.join(PATIENCE)
    assert len(turned_away) == 1
    assert {type(error) for error in errors} <= {ProviderUnavailable, RefreshInProgress}


def test_a_hanging_introspection_keeps_nobody_waiting(made: World) -> None:
    """P2: the token is there as soon as it is stored; how long it lives is asked for behind the callers' backs."""
    connection = made.expired("salesforce")
    with paused(made.one.refresher, "learn_life") as pause:
        assert made.issue(connection, max_wait=5).generation == connection.generation + 1
        pause.wait()


def test_a_caller_waits_no_longer_than_it_said(made: World) -> None:
    """Without a token in the time the caller gives, it is told to come again."""
    connection = made.expired("hubspot")
    made.hubspot.misbehave("latency", delay=0.5)
    caller = made.caller()
    with pytest.raises(RefreshInProgress):
        made.one.issuer.issue(caller, connection.name, max_wait=0)
    assert made.one.issuer.issue(caller, connection.name).generation == connection.generation + 1


# Never stale


def test_no_token_leaves_with_less_than_asked(made: World) -> None:
    """P3: a living token that is too short for this caller is refreshed first; more than half a life is refused."""
    connection = made.connected("hubspot")
    life = connection.life_seconds
    assert life is not None
    caller = made.caller()
    with pytest.raises(InvalidRequest, match="at most 900"):
        made.one.issuer.issue(caller, connection.name, min_ttl=life / 2 + 1)
    made.jump(life * 0.6)
    assert made.one.issuer.issue(caller, connection.name, min_ttl=60).generation == connection.generation
    longer = made.one.issuer.issue(caller, connection.name, min_ttl=life / 2)
    assert longer.generation == connection.generation + 1
    assert longer.left(made.one.clock.timestamp()) >= life / 2


@pytest.mark.parametrize("unfit", [float("nan"), float("inf")])
def test_a_ttl_that_is_no_number_refreshes_nothing(made: World, unfit: float) -> None:
    """Not-a-number and infinity are refused before anything is spent."""
    connection = made.connected("hubspot")
    with pytest.raises(InvalidRequest):
        made.issue(connection, min_ttl=unfit)
    assert made.refreshes("hubspot", connection) == []


def test_dead_tokens_never_leave(made: World) -> None:
    """P3: threads that ask all the time while one short-lived token after another dies get only living ones."""
    made.hubspot.settings(token_lifetime=1)
    try:
        connection = made.connected("hubspot")
        caller = made.caller()
        hosts = (made.one, made.two)

        def ask(number: int) -> list[float]:
            host, left = hosts[number % 2], []
            generation = connection.generation
            while generation < connection.generation + 2:
                asked = host.clock.timestamp()
                token = host.issuer.issue(caller, connection.name, min_ttl=0.3)
                left.append(token.left(asked))
                generation = token.generation
            return left

        assert min(left for each in together(4, ask) for left in each) >= 0.3
    finally:
        made.hubspot.settings(token_lifetime=1800)


def test_a_token_that_dies_while_it_is_recorded_stays(made: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """P3: writing the record may take longer than the token lives; then the next one leaves, and it is recorded, too."""
    connection = made.connected("hubspot")
    real, records = made.one.access.record_all, []

    def slow(entries: Sequence[Entry]) -> None:
        real(entries)
        records.extend(entry.detail["generation"] for entry in entries if entry.detail)
        if len(records) == 1:
            made.jump(1800)

    monkeypatch.setattr(made.one.access, "record_all", slow)
    token = made.issue(connection)
    assert token.generation == connection.generation + 1
    assert records == [connection.generation, connection.generation + 1]


def test_of_hand_outs_in_company_only_those_leave_that_still_may(
    made: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P3 and P6 hold for each of them: one token dies while all are recorded, one caller loses its permission."""
    made.hubspot.settings(token_lifetime=600)
    try:
        dying = made.connected("hubspot")
    finally:
        made.hubspot.settings(token_lifetime=1800)
    living, caller, unlucky = made.connected("hubspot"), made.caller(), made.caller()
    made.jump(1)
    for connection in (dying, living):
        made.one.issuer.issue(caller, connection.name)
        made.one.issuer.issue(unlucky, connection.name)
    asked = [
        made.one.issuer.ready(*who)
        for who in ((caller, dying.name), (caller, living.name), (unlucky, living.name))
    ]
    real = made.one.access.record_all

    def slow(entries: Sequence[Entry]) -> None:
        real(entries)
        monkeypatch.setattr(made.one.access, "record_all", real)
        made.two.callers.deny(unlucky.name, Permission.parse("token:issue@*"))
        made.jump(700)
        made.one.epochs.look()
        made.one.issuer.issue(caller, living.name)  # what is known is known of the present epoch

    monkeypatch.setattr(made.one.access, "record_all", slow)
    ready = [one for one in asked if one is not None]
    assert len(ready) == 3
    handed = made.one.issuer.hand_out(ready)
    assert [token and token.connection for token in handed] == [None, living.name, None]


def test_nothing_is_ready_that_has_to_be_found_out(made: World) -> None:
    """What this process does not remember, or may not give, takes the way that can wait and refuse."""
    connection, caller = made.connected("hubspot"), made.caller()
    made.jump(1)
    ready = made.one.issuer.ready
    assert ready(caller, connection.name) is None
    made.one.issuer.issue(caller, connection.name)
    assert ready(caller, connection.name) is not None
    assert ready(caller, connection.name, min_ttl=10_000) is None
    assert ready(made.caller(), connection.name) is None
    made.jump(1750)
    made.one.issuer.issue(caller, connection.name, min_ttl=10)
    assert ready(caller, connection.name) is None
    assert ready(caller, connection.name, min_ttl=10) is not None


def test_a_permission_taken_away_while_it_is_recorded_counts(
    made: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P6: a record that takes seconds is followed by another look at the permission."""
    connection, caller = made.connected("hubspot"), made.caller()
    made.jump(1)
    made.one.issuer.issue(caller, connection.name)
    real = made.one.access.record_all

    def slow(entries: Sequence[Entry]) -> None:
        real(entries)
        made.two.callers.deny(caller.name, Permission.parse("token:issue@*"))
        made.jump(2)

    monkeypatch.setattr(made.one.access, "record_all", slow)
    with pytest.raises(Forbidden):
        made.one.issuer.issue(caller, connection.name)


# A token the provider refused


def test_a_rejected_token_is_refreshed_away_once(made: World) -> None:
    """Many callers report the same refused token at once: one refresh, and all get its successor."""
    connection = made.connected("salesforce")
    caller = made.caller()
    before = made.one.issuer.issue(caller, connection.name)
    hosts = (made.one, made.two)
    handed = together(
        24, lambda n: hosts[n % 2].issuer.issue(caller, connection.name, rejected=before.digest)
    )
    assert {token.generation for token in handed} == {before.generation + 1}
    assert len(made.refreshes("salesforce", connection)) == 1


def test_a_token_rejected_long_ago_changes_nothing(made: World) -> None:
    """A digest that is not the current token's gets the current token, unrefreshed."""
    connection = made.connected("hubspot")
    caller = made.caller()
    token = made.one.issuer.issue(caller, connection.name, rejected="ab" * 32)
    assert token.generation == connection.generation
    assert made.refreshes("hubspot", connection) == []


def test_refreshes_are_forced_at_most_every_thirty_seconds(made: World) -> None:
    """A second forced refresh soon after the first is told to wait, and may come when the time is over."""
    connection = made.connected("hubspot")
    caller = made.caller()
    first = made.one.issuer.issue(caller, connection.name)
    second = made.one.issuer.issue(caller, connection.name, rejected=first.digest)
    made.jump(2)
    with pytest.raises(RefreshInProgress) as caught:
        made.two.issuer.issue(caller, connection.name, rejected=second.digest)
    assert caught.value.retry_after is not None
    assert 1 <= caught.value.retry_after <= FORCED_EVERY - 2
    assert made.two.issuer.issue(caller, connection.name).generation == second.generation
    made.jump(FORCED_EVERY)
    third = made.two.issuer.issue(caller, connection.name, rejected=second.digest)
    assert third.generation == second.generation + 1
    assert len(made.refreshes("hubspot", connection)) == 2


def test_whoever_reports_again_is_told_what_has_become_of_the_connection(made: World) -> None:
    """Within the thirty seconds as well: 409 and not 503, for waiting would not help."""
    connection = made.connected("hubspot")
    caller = made.caller()
    token = made.one.issuer.issue(caller, connection.name)
    made.one.revoker.disable(connection.name)
    for _ in range(2):
        with pytest.raises(ConnectionDisabled):
            made.one.issuer.issue(caller, connection.name, rejected=token.digest)
    made.one.revoker.enable(connection.name)
    made.jump(FORCED_EVERY)
    write_direct(made.one.database, connection, health=Health.NEEDS_RECONNECT)
    for _ in range(2):
        with pytest.raises(NeedsReconnect):
            made.one.issuer.issue(caller, connection.name, rejected=token.digest)


# Answers that are none


@pytest.mark.parametrize(
    ("fault", "options", "error", "kind"),
    [
        ("status", {"status": 503}, ProviderUnavailable, "unavailable"),
        ("status", {"status": 429, "retry_after": 7}, ProviderRateLimited, "unavailable"),
        ("status", {"status": 500}, ProviderUnavailable, "unknown"),
        ("html", {"status": 200}, ProviderUnavailable, "unknown"),
        ("hang", {}, ProviderUnavailable, "unknown"),
        ("drop", {}, ProviderUnavailable, "unknown"),
        ("truncated", {}, ProviderUnavailable, "unknown"),
        ("no_access_token", {}, ProviderUnavailable, "unknown"),
        ("redirect", {"location": "/elsewhere"}, ProviderUnavailable, "unknown"),
    ],
)
def test_a_non_rotating_connection_recovers_from_every_fault(
    made: World, fault: str, options: dict[str, object], error: type[Exception], kind: str
) -> None:
    """HubSpot's faults cost a caller a 503 and nobody a connection: the next refresh after the pause succeeds."""
    connection = made.expired("hubspot")
    made.hubspot.misbehave(fault, count=1, **options)
    with pytest.raises(error):
        made.issue(connection)
    after = made.now(connection)
    assert (after.health, after.generation) == (Health.RETRYING, connection.generation)
    assert made.attempts(connection)[-1][0] == kind
    assert after.retry_at is not None
    made.jump(61)
    assert made.issue(connection).generation == connection.generation + 1
    assert made.now(connection).last_error is None


@pytest.mark.parametrize(
    ("fault", "options"),
    [
        ("hang", {}),
        ("hang", {"when": "after"}),
        ("drop", {"when": "after"}),
        ("status", {"status": 502, "when": "after"}),
        ("truncated", {"mode": "length"}),
        ("truncated", {"mode": "json"}),
        ("no_access_token", {}),
    ],
)
def test_a_lost_answer_is_not_asked_for_again_while_the_token_lives(
    made: World, fault: str, options: dict[str, object]
) -> None:
    """A rotating connection whose answer got lost hands out the living token, and tries once more when it is dead."""
    connection = made.connected("salesforce")
    made.salesforce.misbehave(fault, count=1, **options)
    made.refresh(connection)
    uncertain = made.now(connection)
    assert uncertain.health is Health.UNCERTAIN
    assert connection.life_seconds is not None
    for _ in range(3):
        made.jump(connection.life_seconds / 4)
        assert made.refresh(connection).kind is EndingKind.HELD
        assert made.issue(connection).generation == connection.generation
    assert len(made.refreshes("salesforce", connection)) == 1
    processed = made.grant_of(connection).rotations == 1
    made.jump(connection.life_seconds / 4 + 2)
    if not processed:
        assert made.issue(connection).generation == connection.generation + 1
        assert made.salesforce.totals().reuses == 0
        return
    with pytest.raises(NeedsReconnect):
        made.issue(connection)
    lost = made.now(connection)
    assert (lost.health, lost.last_error) == (Health.NEEDS_RECONNECT, "lost_answer")
    assert len(made.refreshes("salesforce", connection)) == 2
    assert made.findings() == ["needs_reconnect"]


def test_a_provider_that_is_away_hands_out_what_lives(made: World) -> None:
    """P2, P9: for as long as the token lives a caller notices nothing of an outage, and nothing is marked by it."""
    connection = made.connected("hubspot")
    made.hubspot.misbehave("status", status=503)
    for _ in range(6):
        made.jump(61)
        made.refresh(connection)
        assert made.issue(connection).generation == connection.generation
    assert made.now(connection).health is Health.RETRYING
    assert "provider_down" in made.findings()
    made.hubspot.behave()
    made.jump(61)
    assert made.refresh(connection).kind is EndingKind.REFRESHED
    assert made.findings() == []


def test_a_retry_after_is_obeyed(made: World) -> None:
    """Asked to stay away for 40 s the broker does, however often callers come; it tells them how long."""
    connection = made.expired("hubspot")
    made.hubspot.misbehave("status", status=429, retry_after=40, count=1)
    with pytest.raises(ProviderRateLimited) as caught:
        made.issue(connection)
    assert caught.value.retry_after is not None
    assert 30 < caught.value.retry_after <= 40
    made.jump(35)
    with pytest.raises(ProviderRateLimited):
        made.issue(connection)
    made.jump(6)
    assert made.issue(connection).generation == connection.generation + 1
    assert len(made.refreshes("hubspot", connection)) == 2


def test_rotation_is_learned_from_what_comes_back(made: World) -> None:
    """Salesforce counts as rotating until a refresh shows that it does not; once seen it stays seen."""
    rotating = made.expired("salesforce")
    assert made.now(rotating).rotation is Rotation.UNKNOWN
    made.issue(rotating)
    assert made.now(rotating).rotation is Rotation.SEEN
    made.salesforce.change_app(SALESFORCE, rotation=False)
    try:
        still = made.expired("salesforce")
        made.issue(still)
        assert made.now(still).rotation is Rotation.NOT_SEEN
        made.jump(7300)
        made.issue(rotating)
        assert made.now(rotating).rotation is Rotation.SEEN
    finally:
        made.salesforce.change_app(SALESFORCE, rotation=True)


# Refused


@pytest.mark.parametrize("provider", ["hubspot", "salesforce"])
def test_only_a_confirmed_refusal_ends_a_connection(made: World, provider: str) -> None:
    """P9: revoked at the provider: doubtful at the first refusal, lost at the second a lease later, told once."""
    connection = made.expired(provider)
    made.revoke_upstream(connection)
    with pytest.raises(ProviderUnavailable):
        made.issue(connection)
    assert made.now(connection).health is Health.DOUBTFUL
    made.jump(LEASE - 2)
    assert made.refresh(connection).kind is EndingKind.HELD
    assert made.notices() == []
    made.jump(3)
    with pytest.raises(NeedsReconnect):
        made.issue(connection)
    lost = made.now(connection)
    assert lost.health is Health.NEEDS_RECONNECT
    assert lost.refresh_at is None
    assert made.findings() == ["needs_reconnect"]
    assert made.notices() == [("connection.needs_reconnect", connection.name)]
    made.jump(3600)
    with pytest.raises(NeedsReconnect):
        made.issue(connection)
    assert len(made.refreshes(provider, connection)) == 2
    assert len(made.notices()) == 1


def test_a_lost_connection_hands_out_while_its_token_lives(made: World) -> None:
    """Refused for good, the access token that still lives goes on leaving until it is dead."""
    connection = made.connected("hubspot")
    made.revoke_upstream(connection, access_tokens=False)
    made.refresh(connection)
    made.jump(LEASE + 1)
    made.refresh(connection)
    assert made.now(connection).health is Health.NEEDS_RECONNECT
    assert made.issue(connection).generation == connection.generation
    made.jump(1800)
    with pytest.raises(NeedsReconnect):
        made.issue(connection)


def test_a_mass_refusal_is_held_until_one_of_them_is_refreshed(made: World) -> None:
    """P9: refused three at once and a fifth of the app's, nothing is marked; one success ends the hold."""
    connections = made.imported("hubspot", 5)
    made.hubspot.misbehave("error", error="BAD_REFRESH_TOKEN")
    for _ in range(3):
        for connection in connections:
            made.refresh(connection)
        made.jump(LEASE + 1)
    assert {made.now(connection).health for connection in connections} == {Health.DOUBTFUL}
    assert made.findings() == ["mass_refusal"]
    made.hubspot.behave()
    assert made.refresh(connections[0]).kind is EndingKind.REFRESHED
    assert made.findings() == []
    # The others really are refused: with the hold over, that counts.
    for connection in connections[1:]:
        made.revoke_upstream(connection)
        made.refresh(connection)
    assert {made.now(connection).health for connection in connections[1:]} == {Health.NEEDS_RECONNECT}


def test_a_mass_refusal_that_lasts_an_hour_is_believed(made: World) -> None:
    """After an hour of refusals all are marked, with one finding for the lot."""
    connections = made.imported("hubspot", 4)
    made.hubspot.misbehave("error", error="BAD_REFRESH_TOKEN")
    for pause in (LEASE + 1, LEASE + 1, 1800, 1800, LEASE + 1):
        for connection in connections:
            made.refresh(connection)
        made.jump(pause)
    assert {made.now(connection).health for connection in connections} == {Health.NEEDS_RECONNECT}
    assert made.findings().count("mass_refusal") == 1


def test_an_old_mass_refusal_does_not_disarm_the_hold_for_ever(made: World) -> None:
    """P9: what was believed weeks ago is no reason to believe the next mass refusal at once."""
    connections = made.imported("hubspot", 4)
    made.hubspot.misbehave("error", error="BAD_REFRESH_TOKEN")
    for pause in (LEASE + 1, LEASE + 1, 1800, 1800, 86_400 * 14):
        for connection in connections:
            made.refresh(connection)
        made.jump(pause)
    others = made.imported("hubspot", 5)
    for _ in range(3):
        for connection in others:
            made.refresh(connection)
        made.jump(LEASE + 1)
    assert {made.now(connection).health for connection in others} == {Health.DOUBTFUL}
    assert made.findings().count("mass_refusal") == 1


def test_two_refused_ones_are_no_crowd(made: World) -> None:
    """Two of many are judged each by itself."""
    connections = made.imported("hubspot", 12)
    for connection in connections[:2]:
        made.revoke_upstream(connection)
    for _ in range(2):
        for connection in connections[:2]:
            made.refresh(connection)
        made.jump(LEASE + 1)
    assert {made.now(connection).health for connection in connections[:2]} == {Health.NEEDS_RECONNECT}


# Our own registration


def test_a_refused_client_is_the_apps_trouble_alone(made: World) -> None:
    """P9: with every secret refused there is one finding, a pause for the whole app, and no connection marked."""
    connections = made.imported("hubspot", 3)
    made.hubspot.set_secrets("hubspot-client", ["another"])
    try:
        with pytest.raises(ProviderMisconfigured):
            made.issue(connections[0])
        for connection in connections[1:]:
            with pytest.raises(ProviderMisconfigured):
                made.issue(connection)
        assert len(made.refreshes("hubspot")) == 1, "the others were not even tried"
        assert made.findings() == ["app_misconfigured"]
        assert Health.NEEDS_RECONNECT not in {made.now(connection).health for connection in connections}
    finally:
        made.hubspot.set_secrets("hubspot-client", ["hubspot-secret"])
    made.jump(121)
    for connection in connections:
        assert made.issue(connection).generation == connection.generation + 1
    assert made.findings() == []


def test_a_breaker_of_one_app_leaves_the_other_alone(made: World) -> None:
    """HubSpot down for everybody is no reason to ask Salesforce later."""
    connections = made.imported("hubspot", 6)
    other = made.expired("salesforce")
    made.hubspot.misbehave("status", status=503)
    for connection in connections:
        made.refresh(connection)
    assert made.one.apps.breaker(connections[0].app_id) is not None
    before = len(made.hubspot.requests())
    with pytest.raises(ProviderUnavailable):
        made.issue(connections[5])
    assert len(made.hubspot.requests()) == before
    assert made.issue(other).generation == other.generation + 1


# What comes back with the token


def test_a_moved_instance_is_followed(made: World) -> None:
    """Salesforce names the API host with each refresh; the newest is handed out with the token."""
    connection = made.expired("salesforce")
    moved = f"{made.made.emulator.salesforce.url.replace('127.0.0.1', 'localhost')}"
    made.salesforce.change_account(connection.account_id, instance_url=moved)
    token = made.issue(connection)
    assert token.instance_url == moved
    assert made.now(connection).instance_url == moved


def test_another_account_at_refresh_ends_the_connection(made: World) -> None:
    """A sandbox copied anew keeps the grant and becomes another org: its token is never stored here."""
    connection = made.expired("salesforce")
    other = made.salesforce.grant(SALESFORCE)
    identity = f"{made.made.emulator.salesforce.url}/id/{other.account}/{other.user}"
    made.salesforce.misbehave("edit", set={"id": identity}, count=1)
    with pytest.raises(NeedsReconnect):
        made.issue(connection)
    after = made.now(connection)
    assert (after.generation, after.last_error) == (connection.generation, "refused:account_changed")


def test_salesforces_token_life_is_learned(made: World) -> None:
    """Nothing in the answer says how long the token lives; introspection does, once for each."""
    connection = made.connected("salesforce")
    assert connection.life_known
    assert connection.life_seconds == pytest.approx(7200, abs=5)
    made.salesforce.settings(token_lifetime=1200)
    try:
        made.jump(7201)
        token = made.issue(connection)
        assert token.generation == connection.generation + 1
        until(lambda: made.issue(connection).life == pytest.approx(1200, abs=5))
    finally:
        made.salesforce.settings(token_lifetime=7200)


def test_an_inactive_introspection_proves_nothing(made: World) -> None:
    """Where the life cannot be learned a cautious one is assumed, and the token is handed out."""
    made.salesforce.misbehave("inactive", endpoint="introspect")
    connection = made.connected("salesforce")
    assert (connection.life_seconds, connection.life_known) == (900.0, False)
    assert made.issue(connection).life == 900.0


def test_a_refusal_decided_about_a_connection_is_on_record_and_an_outage_is_not(made: World) -> None:
    """P5: lost, exported, switched off: each is on the trail under its code; a provider that is away needs no row."""
    away, lost, moved, off = (made.expired("hubspot") for _ in range(4))
    caller = made.caller()
    made.hubspot.misbehave("status", status=503, count=1)
    with pytest.raises(ProviderUnavailable):
        made.one.issuer.issue(caller, away.name)
    made.hubspot.behave()
    made.revoke_upstream(lost)
    made.refresh(lost)
    made.jump(LEASE + 1)
    with pytest.raises(NeedsReconnect):
        made.one.issuer.issue(caller, lost.name)
    with made.one.database.write() as transaction:
        assert made.one.store.mark_exported(transaction, made.now(moved), now=made.one.clock.now())
    made.one.revoker.disable(off.name)
    for connection in (moved, off):
        with pytest.raises(ConnectionDisabled):
            made.one.issuer.issue(caller, connection.name)
    assert refusals(made, caller.actor) == {
        (lost.name, "needs_reconnect"): 1,
        (moved.name, "connection_disabled"): 1,
        (off.name, "connection_disabled"): 1,
    }


def test_a_caller_in_a_loop_cannot_fill_the_disk_with_refusals(
    made: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same refusal gets five rows a second and is then counted, for lost and disabled connections alike."""
    lost, off = made.expired("hubspot"), made.connected("hubspot")
    caller = made.caller()
    made.revoke_upstream(lost)
    made.refresh(lost)
    made.jump(LEASE + 1)
    made.refresh(lost)
    made.one.revoker.disable(off.name)
    monkeypatch.setattr(made.one.denials, "_clock", StoppedClock())
    for _ in range(12):
        with pytest.raises(NeedsReconnect):
            made.one.issuer.issue(caller, lost.name)
        with pytest.raises(ConnectionDisabled):
            made.one.issuer.issue(caller, off.name)
    codes = {(lost.name, "needs_reconnect"), (off.name, "connection_disabled")}
    assert refusals(made, caller.actor) == dict.fromkeys(codes, 5)
    made.one.denials.flush()
    counted = [row for row in refused(made, caller.actor) if row.outcome == "counted"]
    assert {(row.target, (row.detail or {})["code"]) for row in counted} == codes
    assert [(row.detail or {})["count"] for row in counted] == [7, 7]


class StoppedClock(Clock):
    """A second that does not end."""

    def elapsed(self) -> float:
        """Elapsed seconds: none."""
        return 0.0


def refused(made: World, actor: str) -> Sequence[Found]:
    """The rows about tokens this caller did not get."""
    return made.one.trail.search(actor=actor, action=Event.TOKEN_REFUSED, limit=200).rows


def refusals(made: World, actor: str) -> Counter[tuple[str, str]]:
    """How many rows of its own each refusal has, by connection and outcome."""
    return Counter((row.target, row.outcome) for row in refused(made, actor) if row.outcome != "counted")


def test_nothing_is_refreshed_for_those_that_may_not(made: World) -> None:
    """A disabled connection is not refreshed, by nobody; switched on again it hands out what it has, unrefreshed."""
    connection = made.connected("hubspot")
    made.one.revoker.disable(connection.name)
    with pytest.raises(ConnectionDisabled):
        made.issue(connection)
    assert made.refresh(connection).kind is EndingKind.HELD
    made.one.revoker.enable(connection.name)
    assert made.issue(connection).generation == connection.generation
    assert made.refreshes("hubspot", connection) == []


def test_a_request_is_not_sent_when_the_lease_is_too_old(made: World) -> None:
    """A holder frozen between taking the lease and sending sends nothing, and the attempt is free again."""
    connection = made.connected("salesforce")
    with paused(made.one.refresher, "_present") as pause:
        future = made.one.refresher.ask(made.now(connection))
        pause.wait()
        made.jump(LEASE + 5)
        pause.let_go()
        future.result(PATIENCE)
    assert made.refreshes("salesforce", connection) == []
    after = made.now(connection)
    assert (after.open_attempt, after.health) == (None, Health.RETRYING)
    assert made.attempts(connection) == [("not_sent", "abandoned")]
    made.jump(5)
    assert made.refresh(connection).kind is EndingKind.REFRESHED
    assert made.now(connection).last_refresh_at is not None
