"""The doctor over every state and error there is: an answer each time, the right one blamed, every cause within reach."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.broker.connection import AdminState, Connection, ConnectionId, Health, Rotation
from app.broker.doctor import (
    AppFacts,
    Condition,
    Diagnosis,
    Facts,
    HouseFacts,
    Reason,
    Try,
    diagnose,
    diagnose_finding,
    vitals,
)
from app.broker.findings import FindingKind
from app.oauth2.causes import BEHIND, FAULTS, REMEDIES, Cause, Fault
from app.oauth2.outcomes import EXPLANATIONS
from app.oauth2.provider import Provider
from app.providers import discover

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
VENDORS = discover()
HUBSPOT, SALESFORCE = VENDORS["hubspot"], VENDORS["salesforce"]
KINDS = ("refused", "misconfigured", "unavailable", "rate_limited", "unknown", "not_sent")
CODES = sorted({*EXPLANATIONS, *BEHIND, *HUBSPOT.explanations, *SALESFORCE.explanations, "lost_answer"})


class Plain(Provider):
    """A plain RFC 6749 server, as a provider file of a dozen lines makes one."""

    name = "plain"
    title = "Plain"


def a_connection(vendor: Provider = SALESFORCE, **changes: Any) -> Connection:
    """A healthy connection, refreshed an hour ago."""
    fresh = Connection(
        id=ConnectionId("c1"),
        name="one",
        provider=vendor.name,
        app_id="app",
        grant_type="authorization_code",
        account_id="00D",
        user_id="005",
        identity="00D:005",
        generation=7,
        expires_at=NOW + HOUR,
        life_seconds=7200.0,
        connected_at=NOW - 90 * DAY,
        last_refresh_at=NOW - HOUR,
    )
    return replace(fresh, **changes)


def a_try(outcome: str | None, code: str | None = None, **changes: Any) -> Try:
    """An attempt on the tokens of `a_connection`."""
    ended = None if outcome is None else NOW - HOUR
    made = Try(
        began=NOW - HOUR,
        ended=ended,
        generation=7,
        host="web-3",
        process="p9",
        journal="p9.journal",
        outcome=outcome,
        code=code,
    )
    return replace(made, **changes)


def found(vendor: Provider = SALESFORCE, error: str | None = None, **told: Any) -> Diagnosis:
    """What the doctor says of a connection with this error; `told` are fields of the connection or of the facts."""
    facts = {name: told.pop(name) for name in ("tries", "approvals", "app", "house") if name in told}
    if error is not None:
        lost = error.startswith("refused:") or error == "lost_answer"
        health = Health.NEEDS_RECONNECT if lost else Health.RETRYING
        told = {"last_error": error, "last_error_at": NOW, "failures": 2, "health": health} | told
    return diagnose(Facts(connection=a_connection(vendor, **told), vendor=vendor, now=NOW, **facts))


CROWD = AppFacts(alike=5, total=20)
LOST = (a_try("refused", "expired_token"), a_try("unknown", "read_timeout"))


def reached() -> Iterator[tuple[Reason, Diagnosis]]:
    """Every reason with the facts that lead to it."""
    # connection
    yield Cause.APP_UNINSTALLED, found(HUBSPOT, "refused:bad_refresh_token", rotation=Rotation.NOT_SEEN)
    yield Cause.GRANT_REVOKED, found(SALESFORCE, "refused:expired_token", approvals=1)
    yield Cause.USER_INACTIVE, found(SALESFORCE, "misconfigured:inactive_user")
    yield Cause.ACCOUNT_INACTIVE, found(SALESFORCE, "misconfigured:inactive_org")
    yield Cause.ACCOUNT_GONE, found(HUBSPOT, "refused:account_gone")
    moving = (a_try("refused", "account_gone"), a_try("unavailable", "migrating"))
    yield Cause.ACCOUNT_MOVED, found(HUBSPOT, "refused:account_gone", tries=moving)
    yield Cause.ACCOUNT_CHANGED, found(SALESFORCE, "refused:account_changed")
    yield Cause.APPROVALS_EXCEEDED, found(SALESFORCE, "refused:expired_token", approvals=5)
    yield Cause.IDLE_EXPIRED, found(SALESFORCE, "refused:expired_token", last_refresh_at=NOW - 43 * DAY)
    same = NOW - DAY
    yield (
        Cause.TOKEN_POLICY,
        found(SALESFORCE, "refused:expired_token", last_refresh_at=same, connected_at=same),
    )
    yield Cause.CREDENTIALS_CHANGED, found(SALESFORCE, "refused:authentication_failure")
    yield Cause.LOST_ANSWER, found(SALESFORCE, "lost_answer", tries=LOST, rotation=Rotation.SEEN)
    busy = (a_try("unavailable", "busy"),) * 3
    yield Cause.USED_ELSEWHERE, found(SALESFORCE, "unavailable:busy", tries=busy)
    yield Cause.OTHER_CLIENT, found(HUBSPOT, "misconfigured:token_of_another_client")
    yield Cause.USER_NOT_APPROVED, found(SALESFORCE, "misconfigured:user_not_approved")
    yield Cause.RUN_AS_USER, found(SALESFORCE, "refused:run_as_refused", grant_type="client_credentials")
    yield Cause.ADDRESS_NOT_ALLOWED, found(SALESFORCE, "misconfigured:ip_restricted")
    yield Cause.APP_BLOCKED, found(SALESFORCE, "misconfigured:app_blocked")
    yield Cause.ACCESS_DENIED, found(Plain(), "misconfigured:access_denied")
    yield Cause.NO_REFRESH_TOKEN, found(HUBSPOT, "refused:no_refresh_token")
    yield Cause.KEY_UNUSABLE, found(SALESFORCE, "misconfigured:assertion_failed", grant_type="jwt_bearer")
    yield Cause.UNRECOGNISED, found(HUBSPOT, "misconfigured:unrecognised_error")
    # app
    yield Cause.CLIENT_SECRET_REFUSED, found(HUBSPOT, "misconfigured:client_secret_refused")
    yield Cause.CLIENT_UNKNOWN, found(SALESFORCE, "misconfigured:client_id_unknown")
    yield Cause.CLIENT_SWAPPED, found(HUBSPOT, "misconfigured:token_of_another_client", app=CROWD)
    yield Cause.APP_TOKENS_REVOKED, found(SALESFORCE, "refused:expired_token", app=CROWD, approvals=1)
    yield Cause.REDIRECT_MISMATCH, found(SALESFORCE, "misconfigured:redirect_uri_mismatch")
    yield Cause.GRANT_TYPE_OFF, found(SALESFORCE, "misconfigured:unsupported_grant_type")
    yield Cause.SCOPE_REFUSED, found(HUBSPOT, "misconfigured:invalid_scope")
    yield Cause.REQUEST_REFUSED, found(Plain(), "misconfigured:invalid_request")
    yield Cause.VERIFIER_REFUSED, found(HUBSPOT, "misconfigured:code_verifier_refused")
    yield Cause.CERTIFICATE_REFUSED, found(SALESFORCE, "refused:assertion_refused", grant_type="jwt_bearer")
    yield Cause.WRONG_AUDIENCE, found(SALESFORCE, "misconfigured:wrong_audience", grant_type="jwt_bearer")
    yield Cause.MY_DOMAIN_REQUIRED, found(SALESFORCE, "misconfigured:my_domain_required")
    yield Cause.WRONG_ENDPOINT, found(HUBSPOT, "misconfigured:wrong_endpoint")
    yield Cause.UNRECOGNISED_ALIKE, found(HUBSPOT, "misconfigured:unrecognised_error", app=CROWD)
    # outage
    yield Cause.PROVIDER_DOWN, found(HUBSPOT, "unavailable:temporarily_unavailable")
    yield Cause.PROVIDER_UNREACHABLE, found(HUBSPOT, "not_sent:dns", house=HouseFacts(elsewhere_answered=4))
    yield Cause.RATE_LIMITED, found(HUBSPOT, "rate_limited:rate_limited")
    yield Cause.ANSWER_MISSING, found(HUBSPOT, "unknown:read_timeout")
    yield Cause.ANSWER_UNREADABLE, found(HUBSPOT, "unknown:not_json")
    yield Cause.ACCOUNT_MOVING, found(HUBSPOT, "unavailable:migrating")
    yield Cause.BUSY, found(SALESFORCE, "unavailable:busy")
    mass = AppFacts(finding=FindingKind.MASS_REFUSAL, finding_error="bad_refresh_token", alike=5, total=20)
    doubtful = {"health": Health.DOUBTFUL, "app": mass}
    yield Cause.MASS_REFUSAL, found(HUBSPOT, "refused:bad_refresh_token", **doubtful)
    # own
    silence = HouseFacts(elsewhere_failed=4)
    yield Cause.NETWORK_BLOCKED, found(HUBSPOT, "not_sent:connect_timeout", house=silence)
    yield Cause.TLS_INTERCEPTED, found(HUBSPOT, "not_sent:tls_untrusted")
    yield Cause.ADDRESS_FORBIDDEN, found(HUBSPOT, "not_sent:address_not_allowed")
    yield Cause.EGRESS_CHANGED, found(SALESFORCE, "misconfigured:ip_restricted", app=CROWD)
    yield Cause.CLOCK_WRONG, found(house=HouseFacts(skewed=(("web-1", 9.0),)))
    yield Cause.TOO_SLOW, found(HUBSPOT, "not_sent:abandoned")
    yield Cause.PROGRAM_FAULT, found(HUBSPOT, "unknown:internal")
    # ours, whatever the provider says
    yield Condition.HEALTHY, found()
    under_way = {"open_attempt": "a", "lease_until": NOW + HOUR}
    yield Condition.REFRESHING, found(**under_way)
    yield Condition.UNTRIED, found(last_refresh_at=None)
    yield Condition.DISABLED, found(admin_state=AdminState.DISABLED)
    yield Condition.DISCONNECTING, found(HUBSPOT, "revoke_failed", admin_state=AdminState.DISCONNECTING)
    yield Condition.EXPORTED, found(exported_at=NOW)
    yield Condition.ADOPTION_NEEDED, found(house=HouseFacts(held="It may be a copy."))
    yield Condition.KEYRING_LACKS_KEY, found(house=HouseFacts(keyless=("web-2",)))
    yield Condition.CLIENT_UNDEFINED, found(app=AppFacts(defined=False))
    yield Condition.DISK_FULL, found(house=HouseFacts(disk="No space left on device"))
    yield Condition.HOLDER_DIED, found(open_attempt="a", lease_until=NOW - HOUR, tries=(a_try(None),))
    yield Condition.NO_WORKER, found(refresh_at=NOW - HOUR, house=HouseFacts(worker=False))
    gave_up = diagnose_finding(HUBSPOT, FindingKind.REVOKE_GAVE_UP, "one", now=NOW)
    yield Condition.REVOKE_GAVE_UP, gave_up


REACHED = list(reached())


@pytest.mark.parametrize(("reason", "diagnosis"), REACHED, ids=[reason.value for reason, _ in REACHED])
def test_every_cause_is_reached(reason: Reason, diagnosis: Diagnosis) -> None:
    """With the facts that speak for it each cause comes first, under the fault that is its own."""
    assert diagnosis.cause == reason.value
    if isinstance(reason, Cause):
        assert diagnosis.fault is FAULTS[reason]
    assert diagnosis.cause not in {other.cause for other in diagnosis.others}


def test_no_cause_is_out_of_reach() -> None:
    """The table above leaves none out, and each has a fault and a remedy."""
    assert {reason for reason, _ in REACHED} == {*Cause, *Condition}
    assert set(FAULTS) == set(REMEDIES) == set(Cause)


errors = st.one_of(
    st.none(),
    st.builds(lambda kind, code: f"{kind}:{code}", st.sampled_from(KINDS), st.sampled_from(CODES)),
    st.sampled_from(["lost_answer", "revoke_failed", "refresh_under_way"]),
    st.text(max_size=64),
)
moments = st.one_of(st.none(), st.timedeltas(-1500 * DAY, 1500 * DAY).map(lambda since: NOW + since))
numbers = st.integers(0, 50)
hosts = st.lists(st.sampled_from(["web-1", "web-2"]), max_size=2).map(tuple)
connections = st.builds(
    a_connection,
    vendor=st.sampled_from([*VENDORS.values(), Plain()]),
    admin_state=st.sampled_from(AdminState),
    health=st.sampled_from(Health),
    rotation=st.sampled_from(Rotation),
    grant_type=st.sampled_from(["authorization_code", "jwt_bearer", "client_credentials"]),
    expires_at=moments,
    life_seconds=st.one_of(st.none(), st.floats(1, 86_400)),
    lease_until=moments,
    open_attempt=st.one_of(st.none(), st.just("a")),
    refused_at=moments,
    failures=numbers,
    retry_at=moments,
    refresh_at=moments,
    last_refresh_at=moments,
    connected_at=moments,
    last_error=errors,
    last_error_at=moments,
    exported_at=moments,
)
tries = st.builds(
    a_try,
    outcome=st.sampled_from([None, "granted", "superseded", *KINDS]),
    code=st.one_of(st.none(), st.sampled_from(CODES)),
    generation=st.sampled_from([6, 7]),
)
apps = st.builds(
    AppFacts,
    defined=st.booleans(),
    finding=st.one_of(st.none(), st.sampled_from(FindingKind)),
    finding_error=errors,
    alike=st.integers(1, 50),
    total=st.integers(1, 200),
    granted_since=st.booleans(),
)
houses = st.builds(
    HouseFacts,
    held=st.one_of(st.none(), st.just("It may be a copy.")),
    keyless=hosts,
    disk=st.one_of(st.none(), st.just("No space left on device")),
    skewed=hosts.map(lambda names: tuple((name, 8.0) for name in names)),
    worker=st.booleans(),
    elsewhere_failed=numbers,
    elsewhere_answered=numbers,
    reached_from=hosts,
)


def vendor_of(connection: Connection) -> Provider:
    """The connection's provider."""
    return VENDORS.get(connection.provider) or Plain()


all_facts = st.builds(
    lambda connection, **more: Facts(connection=connection, vendor=vendor_of(connection), now=NOW, **more),
    connections,
    tries=st.lists(tries, max_size=4).map(tuple),
    approvals=st.one_of(st.none(), st.integers(0, 9)),
    app=apps,
    house=houses,
)


@given(all_facts)
def test_there_is_always_an_answer(facts: Facts) -> None:
    """Whatever is known: whose fault, why, who and how, in whole sentences, and nothing twice."""
    diagnosis = diagnose(facts)
    causes = [diagnosis.cause, *(other.cause for other in diagnosis.others)]
    assert len(set(causes)) == len(causes)
    for said in (diagnosis, *diagnosis.others):
        assert said.sentence.endswith(".")
        assert said.who
        assert said.how.endswith(".")
        assert not {"{", "}"} & set(said.sentence + said.who + said.how)
        assert all(line.endswith(".") for line in said.evidence)
    assert diagnosis.healthy == (diagnosis.cause in ("healthy", "refreshing", "untried"))


@given(all_facts)
def test_nobody_healthy_is_lost_and_nobody_lost_is_healthy(facts: Facts) -> None:
    """What needs to be reconnected is never called well."""
    if facts.connection.health in (Health.NEEDS_RECONNECT, Health.DOUBTFUL, Health.UNCERTAIN):
        assert not diagnose(facts).healthy


@given(
    st.sampled_from([HUBSPOT, SALESFORCE, Plain()]),
    st.sampled_from([*FindingKind, None]),
    errors.map(lambda error: error or ""),
)
@example(SALESFORCE, FindingKind.MASS_REFUSAL, "expired_token")
def test_every_finding_has_its_sentence(vendor: Provider, kind: FindingKind | None, error: str) -> None:
    """Also one of a kind that only a newer version knows."""
    assert diagnose_finding(vendor, kind, error, now=NOW).sentence.endswith(".")


OUTAGES = ("temporarily_unavailable", "http_error", "server_error", "read_timeout", "no_answer", "not_json")
REGISTRATION = ("invalid_client", "client_secret_refused", "client_id_unknown", "unsupported_grant_type")


@given(all_facts, st.sampled_from(OUTAGES), st.sampled_from(REGISTRATION))
def test_outages_and_our_registration_are_never_the_connections_fault(
    facts: Facts, outage: str, registration: str
) -> None:
    """P9: a retrying connection is not blamed for the provider's trouble, nor for a refused client."""
    plain = replace(
        facts.connection,
        admin_state=AdminState.ENABLED,
        health=Health.RETRYING,
        exported_at=None,
        open_attempt=None,
    )
    well = HouseFacts()
    for error, fault in ((f"unknown:{outage}", Fault.OUTAGE), (f"misconfigured:{registration}", Fault.APP)):
        connection = replace(plain, last_error=error)
        judged = diagnose(replace(facts, connection=connection, house=well, app=AppFacts()))
        assert judged.fault is fault


def test_what_the_evidence_rules_out_is_not_named() -> None:
    """Refreshed an hour before the refusal and every attempt answered: neither idle nor lost."""
    judged = found(
        SALESFORCE, "refused:expired_token", tries=(a_try("refused", "expired_token"),), approvals=1
    )
    causes = {judged.cause, *(other.cause for other in judged.others)}
    assert not causes & {"idle_expired", "lost_answer", "holder_died"}
    assert {"grant_revoked", "approvals_exceeded", "token_policy", "credentials_changed"} <= causes
    assert judged.sentence.startswith("Most likely: ")


def test_a_lost_answer_names_the_host_and_its_journal() -> None:
    """So that somebody can look there before the account is connected again."""
    judged = found(SALESFORCE, "lost_answer", tries=LOST, rotation=Rotation.SEEN)
    assert any("host web-3, process p9, journal p9.journal" in line for line in judged.evidence)
    died = (a_try("refused", "expired_token"), a_try("unknown", "holder_died"))
    judged = found(SALESFORCE, "lost_answer", tries=died, rotation=Rotation.SEEN)
    assert (judged.fault, judged.cause) == (Fault.OWN, "holder_died")
    assert "lost_answer" in {other.cause for other in judged.others}


def test_an_attempt_on_older_tokens_is_no_evidence() -> None:
    """What was lost a generation ago has been made good since."""
    old = (a_try("unknown", "read_timeout", generation=6),)
    assert found(SALESFORCE, "refused:expired_token", tries=old).cause != "lost_answer"


def test_an_apps_trouble_speaks_for_connections_that_were_not_tried() -> None:
    """With every secret refused all of the app's connections say so, but for one whose own user is inactive."""
    refused = "misconfigured:client_secret_refused"
    app = AppFacts(finding=FindingKind.APP_MISCONFIGURED, finding_error=refused)
    assert found(HUBSPOT, app=app).cause == "client_secret_refused"
    assert found(SALESFORCE, "misconfigured:inactive_user", app=app).cause == "user_inactive"
    held = AppFacts(finding=FindingKind.MASS_REFUSAL)
    assert found(HUBSPOT, app=held).healthy, "one that was not refused is none of the crowd"


@given(st.floats(0, 60 * 86_400), st.integers(0, 9), st.sampled_from([HUBSPOT, SALESFORCE, Plain()]))
def test_vitals_count_what_applies(ago: float, approvals: int, vendor: Provider) -> None:
    """Idle days fall from 30 to 0 and approvals warn near five at Salesforce; elsewhere neither is told."""
    connection = a_connection(vendor, last_refresh_at=NOW - timedelta(seconds=ago))
    told = vitals(connection, vendor, now=NOW, approvals=approvals)
    assert told.rotation == "unknown"
    if vendor is not SALESFORCE:
        assert (told.idle_days_left, told.approvals_known, told.approvals_warning) == (None, None, None)
        return
    assert told.idle_days_left == pytest.approx(max(0.0, 30 - ago / 86_400), abs=0.051)
    assert (told.approvals_known, told.approvals_limit) == (approvals, 5)
    assert (told.approvals_warning is not None) == (approvals >= 4)


def test_minted_tokens_have_neither_rotation_nor_approvals() -> None:
    """Nothing of theirs is presented twice, and nothing of theirs idles."""
    connection = a_connection(grant_type="jwt_bearer", life_known=True)
    told = vitals(connection, SALESFORCE, now=NOW, approvals=0)
    assert (told.rotation, told.idle_days_left, told.approvals_known) == (None, None, None)
    assert (told.life_seconds, told.life_measured) == (7200.0, True)
