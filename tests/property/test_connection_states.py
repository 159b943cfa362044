"""The states of a connection walked at random: what may be asked of the provider when, and what becomes of each answer."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from app.broker.connection import (
    AdminState,
    AppTrouble,
    Connection,
    ConnectionId,
    Crowd,
    Health,
    Rhythm,
    Rotation,
    Settled,
    Tokens,
    may_refresh,
    next_look,
    settle,
)
from app.oauth2.outcomes import Granted, Misconfigured, NotSent, Outcome, Refused, Unavailable, Unknown
from app.secret import Secret

START = datetime(2026, 1, 1, tzinfo=UTC)
LEASE = 40.0
RHYTHM = Rhythm(lease=LEASE, ahead=300.0, assumed_life=900.0)
CERTAIN = ("no_refresh_token", "account_changed")

codes = st.sampled_from(["invalid_grant", "account_gone", "http_error", "dns", "busy"])
innocent_codes = st.sampled_from(["invalid_grant", "account_gone"])
lives = st.one_of(st.none(), st.floats(1, 86_400))
waits = st.one_of(st.none(), st.floats(0, 3600))
faultless = st.one_of(
    st.builds(NotSent, codes),
    st.builds(Unavailable, codes, waits, rate_limited=st.booleans()),
    st.builds(Misconfigured, codes, whole_app=st.booleans()),
    st.builds(Unknown, codes),
)
excuses = st.builds(
    Unavailable, st.just("expired_authorization_code"), then=st.just(Refused("invalid_grant"))
)
refusals = st.builds(Refused, st.one_of(innocent_codes, st.sampled_from(CERTAIN)))
crowds = st.builds(
    Crowd,
    refused=st.integers(1, 50),
    total=st.integers(1, 200),
    held_since=st.none(),
    spent=st.booleans(),
)


def a_connection(**changes: object) -> Connection:
    """A healthy connection with a token that lives for half an hour."""
    fresh = Connection(
        id=ConnectionId("c1"),
        name="one",
        provider="salesforce",
        app_id="app",
        grant_type="authorization_code",
        account_id="00D",
        user_id="005",
        identity="00D:005",
        generation=1,
        obtained_at=START,
        expires_at=START + timedelta(seconds=1800),
        life_seconds=1800.0,
        life_known=True,
        created_at=START,
        connected_at=START,
    )
    return replace(fresh, **changes)  # type: ignore[arg-type]


def tokens_of(number: int) -> Tokens:
    """The tokens of one generation."""
    return Tokens(access_token=Secret(f"access-{number}"), refresh_token=Secret(f"refresh-{number}"))


def settled(
    connection: Connection, outcome: Outcome, *, now: datetime = START, crowd: Crowd | None = None
) -> Settled:
    """What the outcome makes of it."""
    return settle(connection, outcome, now=now, rhythm=RHYTHM, tokens=tokens_of(0), crowd=crowd or Crowd())


class Walk(RuleBasedStateMachine):
    """A holder that refreshes as the protocol allows, may die at any moment, and gets any answer there is."""

    def __init__(self) -> None:
        super().__init__()
        self.now = START
        self.connection = a_connection()
        self.tokens = tokens_of(1)
        self.presented = 0  # times the present refresh token may have reached the provider
        self.unclear = False  # an answer to one of those may have been lost
        self.refused_at: list[datetime] = []
        self.asking = False

    @initialize(
        rotation=st.sampled_from(Rotation),
        grant=st.sampled_from(["authorization_code", "jwt_bearer", "client_credentials"]),
    )
    def begin_with(self, rotation: Rotation, grant: str) -> None:
        self.connection = replace(self.connection, rotation=rotation, grant_type=grant)

    @rule(seconds=st.one_of(st.floats(0, 90), st.floats(0, 4000)))
    def time_passes(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    @precondition(lambda self: not self.asking)
    @rule()
    def take_the_lease(self) -> None:
        """As `Refresher` does: what the row forbids is not asked, nor before the back-off is over."""
        before = self.connection
        held = before.retry_at is not None and before.retry_at > self.now
        if not may_refresh(before, self.now) or held:
            return
        assert before.admin_state is AdminState.ENABLED
        assert before.health is not Health.NEEDS_RECONNECT
        assert before.exported_at is None
        if self.unclear and before.may_rotate:
            assert not before.alive(self.now), "a living token was put at risk by a second presentation"
        self.connection = replace(
            before,
            lease_until=self.now + timedelta(seconds=LEASE),
            open_attempt="attempt",
            last_try=before.last_try or (before.open_attempt is not None and before.may_rotate),
        )
        self.asking = True

    @precondition(lambda self: self.asking)
    @rule()
    def the_holder_dies(self) -> None:
        self.asking = False
        self.presented += 1
        self.unclear = True

    @precondition(lambda self: self.asking)
    @rule(life=lives, rotates=st.booleans(), jitter=st.floats(0, 1, exclude_max=True))
    def it_is_granted(self, life: float | None, rotates: bool, jitter: float) -> None:
        before = self.connection
        number = before.generation + 1
        new = Secret(f"refresh-{number}") if rotates else None
        outcome = Granted(Secret(f"access-{number}"), new, expires_in=life, sent_at=self.now)
        result = settle(
            before,
            outcome,
            now=self.now,
            rhythm=replace(RHYTHM, jitter=jitter),
            tokens=self.tokens,
            crowd=Crowd(),
        )
        after = result.connection
        assert result.tokens is not None
        assert after.generation == before.generation + 1
        assert after.health is Health.HEALTHY
        assert not after.last_try
        assert after.open_attempt is after.lease_until is after.retry_at is after.last_error is None
        assert result.tokens.access_token == outcome.access_token
        assert result.tokens.refresh_token == (new or self.tokens.refresh_token)
        assert result.rotated == (new is not None)
        assert after.expires_at is not None
        assert after.expires_at > self.now
        if before.rotation is Rotation.SEEN or rotates:
            assert after.rotation is Rotation.SEEN
        self.tokens = result.tokens
        self._enter(after)

    @precondition(lambda self: self.asking)
    @rule(outcome=st.one_of(faultless, excuses, refusals), crowd=crowds)
    def it_is_not_granted(self, outcome: Outcome, crowd: Crowd) -> None:
        before = self.connection
        result = settle(before, outcome, now=self.now, rhythm=RHYTHM, tokens=self.tokens, crowd=crowd)
        after = result.connection
        assert result.tokens is None
        assert after.generation == before.generation
        assert after.lease_until is after.open_attempt is None
        assert after.expires_at == before.expires_at
        assert after.last_error is not None
        excused = isinstance(outcome, Unavailable) and outcome.then is not None
        if isinstance(outcome, Unknown):
            self.presented, self.unclear = self.presented + 1, True
            if before.may_rotate:
                assert after.health is Health.UNCERTAIN
                assert after.last_try
        counts = isinstance(outcome, Refused) or (
            excused and before.last_error == "unavailable:expired_authorization_code"
        )
        if counts:
            self.refused_at.append(self.now)
        self._judge(before, outcome, result, counts=counts, crowd=crowd)
        self.connection, self.asking = after, False

    def _judge(
        self, before: Connection, outcome: Outcome, result: Settled, *, counts: bool, crowd: Crowd
    ) -> None:
        after = result.connection
        assert result.lost == (after.health is Health.NEEDS_RECONNECT)
        if not result.lost:
            assert after.retry_at is not None
            assert after.retry_at > self.now
            assert after.refresh_at == after.retry_at, "the worker comes back by itself"
            return
        assert counts, f"{outcome} is nobody's refusal of this grant"
        assert after.refresh_at is after.retry_at is None
        if isinstance(outcome, Refused) and outcome.code in CERTAIN:
            return
        if after.last_error == "lost_answer":
            assert before.last_try
            assert self.unclear
            assert before.may_rotate
            assert not before.alive(self.now)
            return
        assert self.refused_at[-1] - self.refused_at[0] >= timedelta(seconds=LEASE)
        assert not crowd.holds(self.now)

    @precondition(lambda self: not self.asking)
    @rule()
    def an_admin_installs_it_anew(self) -> None:
        number = self.connection.generation + 1
        self.tokens = tokens_of(number)
        self._enter(
            a_connection(
                generation=number,
                rotation=self.connection.rotation,
                grant_type=self.connection.grant_type,
                obtained_at=self.now,
                expires_at=self.now + timedelta(seconds=1800),
                admin_state=self.connection.admin_state,
            )
        )

    @rule(state=st.sampled_from([AdminState.ENABLED, AdminState.DISABLED]))
    def an_admin_switches_it(self, state: AdminState) -> None:
        self.connection = replace(self.connection, admin_state=state)

    @invariant()
    def a_lost_one_is_left_alone_for_ever(self) -> None:
        if self.connection.health is Health.NEEDS_RECONNECT:
            assert not may_refresh(self.connection, self.now + timedelta(days=365))

    @invariant()
    def nobody_else_refreshes_under_a_lease(self) -> None:
        until = self.connection.lease_until
        if until is not None and until > self.now:
            assert not may_refresh(self.connection, self.now)

    def _enter(self, fresh: Connection) -> None:
        self.connection, self.asking = fresh, False
        self.presented, self.unclear, self.refused_at = 0, False, []


Walk.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestWalk = Walk.TestCase


# The diagram, arrow by arrow


@pytest.mark.parametrize(
    ("outcome", "trouble"),
    [
        (NotSent("dns"), AppTrouble.DOWN),
        (Unavailable("http_error"), AppTrouble.DOWN),
        (Unavailable("rate_limited", 17.0, rate_limited=True), AppTrouble.DOWN),
        (Misconfigured("invalid_client"), AppTrouble.MISCONFIGURED),
        (Misconfigured("inactive_user", whole_app=False), AppTrouble.NONE),
    ],
)
def test_failures_that_are_not_the_grants_lead_to_retrying(outcome: Outcome, trouble: AppTrouble) -> None:
    """Healthy becomes retrying, and the app is told only of what concerns it."""
    result = settled(a_connection(), outcome)
    assert result.connection.health is Health.RETRYING
    assert result.trouble is trouble
    assert settled(result.connection, outcome).connection.health is Health.RETRYING


@given(outcomes=st.lists(faultless, max_size=60), rotation=st.sampled_from(Rotation))
@settings(deadline=None, max_examples=60)
def test_no_outage_however_long_marks_a_connection(outcomes: list[Outcome], rotation: Rotation) -> None:
    """Any number of outages, rate limits, refused clients and lost answers leaves it within reach of a grant."""
    connection, now = a_connection(rotation=rotation), START
    for outcome in outcomes:
        connection = settled(connection, outcome, now=now).connection
        assert connection.health is not Health.NEEDS_RECONNECT
        assert connection.retry_at is not None
        now = connection.retry_at
        assert may_refresh(connection, now)


@given(failures=st.integers(0, 2000), retry_after=waits)
def test_back_off_has_bounds(failures: int, retry_after: float | None) -> None:
    """The nth failure waits 1, 2, 4 … 60 seconds, longer only where the provider says so, and never overflows."""
    result = settled(a_connection(failures=failures), Unavailable("http_error", retry_after))
    assert result.connection.retry_at is not None
    wait = (result.connection.retry_at - START).total_seconds()
    assert wait == pytest.approx(max(min(2.0 ** min(failures, 10), 60.0), retry_after or 0.0))
    assert result.connection.failures == failures + 1


def test_one_refusal_is_only_a_doubt() -> None:
    """The first refusal on a generation waits a lease; a second one sooner than that still does not count."""
    first = settled(a_connection(), Refused("invalid_grant"))
    assert first.connection.health is Health.DOUBTFUL
    assert first.connection.retry_at == START + timedelta(seconds=LEASE)
    sooner = settled(first.connection, Refused("invalid_grant"), now=START + timedelta(seconds=LEASE - 1))
    assert sooner.connection.health is Health.DOUBTFUL
    assert sooner.connection.refused_at == START
    second = settled(sooner.connection, Refused("invalid_grant"), now=START + timedelta(seconds=LEASE))
    assert (second.lost, second.connection.last_error) == (True, "refused:invalid_grant")


def test_a_refusal_of_an_older_generation_counts_for_nothing() -> None:
    """What was refused before the last grant does not confirm what is refused after it."""
    old = a_connection(generation=7, refused_generation=6, refused_at=START - timedelta(hours=1))
    result = settled(old, Refused("invalid_grant"))
    assert (result.connection.health, result.connection.refused_at) == (Health.DOUBTFUL, START)


def test_doubt_survives_an_outage_in_between() -> None:
    """Refused, unreachable, refused again: the outage neither confirms nor clears the doubt."""
    doubtful = settled(a_connection(), Refused("invalid_grant")).connection
    later = START + timedelta(seconds=LEASE)
    away = settled(doubtful, NotSent("dns"), now=later).connection
    assert away.health is Health.DOUBTFUL
    assert settled(away, Refused("invalid_grant"), now=later + timedelta(seconds=1)).lost


def test_an_excuse_holds_once() -> None:
    """An answer that may mean busy is believed once; coming again on the same generation it is a refusal."""
    excuse = Unavailable("expired_authorization_code", then=Refused("invalid_grant"))
    first = settled(a_connection(), excuse)
    assert (first.connection.health, first.trouble) == (Health.RETRYING, AppTrouble.NONE)
    second = settled(first.connection, excuse)
    assert second.connection.health is Health.DOUBTFUL
    assert not second.lost


@pytest.mark.parametrize("code", CERTAIN)
def test_what_we_found_out_ourselves_needs_no_second_look(code: str) -> None:
    """No refresh token at all, or another account's: asking again would change nothing."""
    assert settled(a_connection(), Refused(code)).lost


def test_a_lost_answer_keeps_the_living_token_and_then_tries_once() -> None:
    """Unknown on a token that may rotate: not presented again while the access token lives, then once, then final."""
    connection = a_connection()
    uncertain = settled(connection, Unknown("read_timeout")).connection
    assert uncertain.health is Health.UNCERTAIN
    assert connection.expires_at is not None
    assert uncertain.retry_at == connection.expires_at
    assert not may_refresh(uncertain, connection.expires_at - timedelta(microseconds=1))
    assert may_refresh(uncertain, connection.expires_at)
    final = settled(uncertain, Refused("invalid_grant"), now=connection.expires_at)
    assert (final.lost, final.connection.last_error) == (True, "lost_answer")


def test_a_grant_refused_before_an_answer_was_lost_is_not_a_lost_answer() -> None:
    """The refusal came first: what was lost after it cannot have held a newer token."""
    connection = a_connection()
    assert connection.expires_at is not None
    doubtful = settled(connection, Refused("invalid_grant")).connection
    uncertain = settled(doubtful, Unknown("read_timeout"), now=START + timedelta(seconds=LEASE)).connection
    assert (uncertain.health, uncertain.last_try) == (Health.UNCERTAIN, True)
    final = settled(uncertain, Refused("invalid_grant"), now=connection.expires_at)
    assert (final.lost, final.connection.last_error) == (True, "refused:invalid_grant")


def test_an_open_attempt_is_not_overtaken_because_its_lease_ran_out() -> None:
    """A holder that went silent may have rotated: others wait for the access token's end, not for the lease's."""
    silent = a_connection(open_attempt="gone", lease_until=START)
    assert silent.expires_at is not None
    assert not may_refresh(silent, START + timedelta(seconds=60))
    assert may_refresh(silent, silent.expires_at)
    assert may_refresh(replace(silent, rotation=Rotation.NOT_SEEN), START + timedelta(seconds=60))


def test_where_nothing_rotates_an_unknown_outcome_is_just_tried_again() -> None:
    """A refresh token that stays the same may be presented twice."""
    result = settled(a_connection(rotation=Rotation.NOT_SEEN), Unknown("read_timeout"))
    assert (result.connection.health, result.connection.last_try) == (Health.RETRYING, False)
    assert may_refresh(result.connection, START + timedelta(seconds=1))


@given(refused=st.integers(1, 100), total=st.integers(1, 300))
def test_a_crowd_is_three_and_a_fifth(refused: int, total: int) -> None:
    """Verdicts are held back from 3 connections and 20 % on, and not after one of them was refreshed."""
    assume(refused <= total)
    assert Crowd(refused=refused, total=total).holds(START) == (refused >= 3 and refused * 5 >= total)
    assert not Crowd(refused=refused, total=total, spent=True).holds(START)


def test_a_crowd_holds_for_an_hour() -> None:
    """Held back, the connection stays in doubt and the app's trouble is told; an hour later the verdict falls."""
    doubtful = settled(a_connection(), Refused("invalid_grant")).connection
    later = START + timedelta(seconds=LEASE)
    crowd = Crowd(refused=3, total=10, held_since=START)
    held = settled(doubtful, Refused("invalid_grant"), now=later, crowd=crowd)
    assert (held.connection.health, held.trouble) == (Health.DOUBTFUL, AppTrouble.CROWD)
    over = settled(held.connection, Refused("invalid_grant"), now=START + timedelta(hours=1), crowd=crowd)
    assert over.lost


@given(
    life=st.floats(1, 86_400 * 30),
    ahead=st.floats(0, 86_400),
    jitter=st.floats(0, 1, exclude_max=True),
    used=st.floats(0, 86_399),
)
def test_the_worker_comes_before_the_window_and_never_in_the_first_half(
    life: float, ahead: float, jitter: float, used: float
) -> None:
    """A connection in use is looked at between half its token's life and the moment it grows stale."""
    rhythm = Rhythm(lease=LEASE, ahead=ahead, assumed_life=900.0, jitter=jitter)
    expires_at = START + timedelta(seconds=life)
    connection = a_connection(
        expires_at=expires_at, life_seconds=life, last_used_at=START - timedelta(seconds=used)
    )
    look = next_look(connection, now=START, rhythm=rhythm)
    assert look is not None
    hair = timedelta(microseconds=2)
    assert START + timedelta(seconds=life / 2) - hair <= look
    assert look <= expires_at - timedelta(seconds=rhythm.window(life)) + hair


@given(idle=st.floats(86_401, 86_400 * 365), jitter=st.floats(0, 1, exclude_max=True))
def test_an_idle_connection_is_only_kept_alive(idle: float, jitter: float) -> None:
    """Nobody asked for a day: refreshed when asked, and in any case well inside Salesforce's thirty days."""
    connection = a_connection(last_used_at=START - timedelta(seconds=idle))
    look = next_look(connection, now=START, rhythm=replace(RHYTHM, jitter=jitter))
    assert look is not None
    assert timedelta(days=17) < look - START <= timedelta(days=20)
    minted = replace(connection, grant_type="jwt_bearer")
    assert next_look(minted, now=START, rhythm=RHYTHM) is None


@given(life=lives, known=lives)
def test_an_expiry_counts_from_sending_and_falls_back_with_care(
    life: float | None, known: float | None
) -> None:
    """The life is the answer's, else the one learned before, else the assumed one; slow answers gain no time by it."""
    sent = START - timedelta(seconds=15)
    before = a_connection(life_seconds=known, life_known=known is not None)
    outcome = Granted(Secret("a"), None, expires_in=life, sent_at=sent)
    after = settled(before, outcome).connection
    assert after.obtained_at == sent
    assert after.expires_at == sent + timedelta(seconds=life or known or RHYTHM.assumed_life)
    assert after.life_known == (life is not None or known is not None)


def test_the_admin_sees_one_word() -> None:
    """The admin state goes before the health, unless it is enabled."""
    lost = a_connection(health=Health.NEEDS_RECONNECT)
    assert lost.state == "needs_reconnect"
    assert replace(lost, admin_state=AdminState.DISCONNECTING).state == "disconnecting"


@given(st.sampled_from(["busy", "migrating", "wrong_hublet"]), st.booleans())
def test_what_concerns_one_grant_does_not_pause_the_app(code: str, whole_app: bool) -> None:
    """P9: an account on the move or a token that is in use elsewhere is no trouble of the app's other connections."""
    result = settled(a_connection(), Unavailable(code, whole_app=whole_app))
    assert result.trouble is (AppTrouble.DOWN if whole_app else AppTrouble.NONE)
    assert result.connection.health is Health.RETRYING
