"""Answers of token endpoints and what each of them means."""

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from requests.structures import CaseInsensitiveDict

from app.http_client import Answer
from app.oauth2.outcomes import (
    EXPLANATIONS,
    MAX_RETRY_AFTER,
    Granted,
    Misconfigured,
    Outcome,
    Refused,
    Unavailable,
    Unknown,
    classify,
    retry_after,
)
from app.oauth2.provider import Provider, TokenRequest
from app.providers import discover
from app.secret import Secret

SENT = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
JSON = {"Content-Type": "application/json"}
TOKEN = {"access_token": "abc", "token_type": "bearer", "expires_in": 1800}


def answer(status: int, body: Any = b"", headers: dict[str, str] | None = None) -> Answer:
    """Build a complete HTTP answer; a dict becomes JSON."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Answer(status=status, headers=CaseInsensitiveDict(headers or JSON), body=raw, sent_at=SENT)


def provider(name: str) -> Provider:
    """Return a discovered provider."""
    return discover()[name]


def error(code: str, description: str = "", **more: str) -> dict[str, str]:
    """Build an RFC 6749 error body."""
    return {"error": code, "error_description": description, **more}


PLAIN: list[tuple[int, Any, Outcome]] = [
    (400, error("invalid_grant"), Refused("invalid_grant")),
    (400, error("INVALID_GRANT"), Refused("invalid_grant")),
    (401, error("invalid_client"), Misconfigured("invalid_client")),
    (400, error("invalid_client"), Misconfigured("invalid_client")),
    (400, error("unauthorized_client"), Misconfigured("unauthorized_client")),
    (400, error("unsupported_grant_type"), Misconfigured("unsupported_grant_type", whole_app=False)),
    (400, error("invalid_scope"), Misconfigured("invalid_scope", whole_app=False)),
    (400, error("invalid_request"), Misconfigured("invalid_request", whole_app=False)),
    (403, error("access_denied"), Misconfigured("access_denied", whole_app=False)),
    (400, error("never_heard_of"), Misconfigured("unrecognised_error", whole_app=False)),
    (400, {}, Misconfigured("unrecognised_error", whole_app=False)),
    (400, {"error": ["invalid_grant"]}, Misconfigured("unrecognised_error", whole_app=False)),
    (400, {"error": None, "access_token": "abc"}, Misconfigured("unrecognised_error", whole_app=False)),
    (400, error("temporarily_unavailable"), Unavailable("temporarily_unavailable")),
    (400, error("server_error"), Unknown("server_error")),
    (400, b"<html>", Unknown("not_json")),
    (403, b"", Unknown("not_json")),
    (400, b'["invalid_grant"]', Unknown("not_json")),
    (404, b"<html>", Misconfigured("wrong_endpoint")),
    (405, b"", Misconfigured("wrong_endpoint")),
    (408, error("invalid_grant"), Unknown("no_answer")),
    (429, b"slow", Unavailable("rate_limited", rate_limited=True)),
    (429, error("invalid_grant"), Unavailable("rate_limited", rate_limited=True)),
    (503, b"<html>", Unavailable("temporarily_unavailable")),
    (500, error("invalid_grant"), Unknown("http_error")),
    (502, b"<html>", Unknown("http_error")),
    (504, b"", Unknown("http_error")),
    (521, b"", Unknown("http_error")),
    (301, b"", Unknown("redirect")),
    (302, TOKEN, Unknown("redirect")),
    (307, error("invalid_grant"), Unknown("redirect")),
    (100, b"", Unknown("unexpected_status")),
    (200, b"", Unknown("not_json")),
    (200, b"<html>hello</html>", Unknown("not_json")),
    (200, b'{"access_token": "ab', Unknown("not_json")),
    (200, b"[" * 100_000, Unknown("not_json")),
    (200, b'{"expires_in": ' + b"9" * 10_000 + b"}", Unknown("not_json")),
    (200, b"\xff\xfe", Unknown("not_json")),
    (200, {}, Unknown("no_token")),
    (200, error("invalid_grant"), Unknown("no_token")),
    (200, {"access_token": ""}, Unknown("no_token")),
    (200, {"access_token": "  "}, Unknown("no_token")),
    (200, {"access_token": None}, Unknown("no_token")),
    (200, {"access_token": 7}, Unknown("no_token")),
    (200, {"access_token": "a\nb"}, Unknown("no_token")),
    (200, {"access_token": "\ud800"}, Unknown("no_token")),
    (200, {**TOKEN, "token_type": "mac"}, Unknown("token_type")),
    (200, {**TOKEN, "token_type": None}, Unknown("token_type")),
]


@pytest.mark.parametrize(("status", "body", "expected"), PLAIN)
def test_plain_server_table(status: int, body: Any, expected: Outcome) -> None:
    """Each answer of a plain RFC 6749 server means exactly one thing."""
    assert classify(answer(status, body)) == expected


HUBSPOT: list[tuple[int, Any, Outcome]] = [
    (400, error("invalid_grant", status="BAD_REFRESH_TOKEN"), Refused("bad_refresh_token")),
    (400, {"status": "BAD_REFRESH_TOKEN", "message": "m"}, Refused("bad_refresh_token")),
    (400, error("access_denied", status="BAD_HUB"), Refused("account_gone")),
    (403, {"status": "BAD_HUB", "message": "missing or unknown hub id"}, Refused("account_gone")),
    (
        400,
        error("invalid_grant", status="MISMATCH_REFRESH_TOKEN_CLIENT"),
        Misconfigured("token_of_another_client", whole_app=False),
    ),
    (400, error("invalid_client", status="BAD_CLIENT_ID"), Misconfigured("client_id_unknown")),
    (400, error("invalid_client", status="BAD_CLIENT_SECRET"), Misconfigured("client_secret_refused")),
    (400, {"status": "BAD_CLIENT_SECRET"}, Misconfigured("client_secret_refused")),
    (400, error("invalid_client", status="BAD_REFRESH_TOKEN"), Misconfigured("invalid_client")),
    (400, error("invalid_grant", status="BAD_REDIRECT_URI"), Misconfigured("redirect_uri_mismatch")),
    (
        400,
        error("invalid_grant", status="BAD_AUTH_CODE"),
        Misconfigured("unrecognised_error", whole_app=False),
    ),
    (400, error("invalid_grant", status="SOMETHING_NEW"), Refused("invalid_grant")),
    (400, {"status": "SOMETHING_NEW", "message": "m"}, Misconfigured("unrecognised_error", whole_app=False)),
    (400, {"status": "error", "message": "m"}, Misconfigured("unrecognised_error", whole_app=False)),
    (400, {"status": "error", "correctHublet": "eu1"}, Unavailable("wrong_hublet", whole_app=False)),
    (429, {"status": "error", "errorType": "RATE_LIMIT"}, Unavailable("rate_limited", rate_limited=True)),
    (477, b"", Unavailable("migrating", whole_app=False)),
]


@pytest.mark.parametrize(("status", "body", "expected"), HUBSPOT)
def test_hubspot_table(status: int, body: Any, expected: Outcome) -> None:
    """HubSpot's `error` decides, its `status` refines, old bodies have the latter alone."""
    assert provider("hubspot").classify(answer(status, body)) == expected


BUSY = Unavailable("busy", whole_app=False)
LATE = Refused("expired_code")
SALESFORCE: list[tuple[str, str, Outcome]] = [
    ("invalid_grant", "expired access/refresh token", Refused("expired_token")),
    ("invalid_grant", "token request is already being processed", BUSY),
    ("invalid_grant", "Token request is already being processed", BUSY),
    (
        "invalid_grant",
        "expired authorization code",
        Unavailable("expired_authorization_code", then=LATE, whole_app=False),
    ),
    ("invalid_grant", "authentication failure", Refused("authentication_failure")),
    ("invalid_grant", "Audience validation failed", Misconfigured("wrong_audience", whole_app=False)),
    (
        "invalid_grant",
        "user hasn't approved this consumer",
        Misconfigured("user_not_approved", whole_app=False),
    ),
    ("invalid_grant", "ip restricted", Misconfigured("ip_restricted", whole_app=False)),
    ("invalid_grant", "inactive user", Misconfigured("inactive_user", whole_app=False)),
    ("invalid_grant", "inactive organization", Misconfigured("inactive_org", whole_app=False)),
    ("invalid_grant", "something new", Refused("unrecognised_refusal")),
    ("invalid_grant", "", Refused("unrecognised_refusal")),
    ("invalid_client", "invalid client credentials", Misconfigured("invalid_client")),
    ("invalid_client_id", "client identifier invalid", Misconfigured("client_id_unknown")),
    (
        "unsupported_grant_type",
        "grant type not supported",
        Misconfigured("unsupported_grant_type", whole_app=False),
    ),
    ("redirect_uri_mismatch", "", Misconfigured("redirect_uri_mismatch")),
    ("inactive_user", "", Misconfigured("inactive_user", whole_app=False)),
    ("OAUTH_APP_BLOCKED", "this app is blocked by admin", Misconfigured("app_blocked", whole_app=False)),
    ("rate_limit_exceeded", "", Unavailable("rate_limited", rate_limited=True)),
    ("invalid_scope", "", Misconfigured("invalid_scope", whole_app=False)),
    ("unknown_error", "retry your request", Misconfigured("unrecognised_error", whole_app=False)),
]


@pytest.mark.parametrize(("code", "description", "expected"), SALESFORCE)
def test_salesforce_table(code: str, description: str, expected: Outcome) -> None:
    """At Salesforce `invalid_grant` means many things; the description tells them apart whatever its case."""
    assert provider("salesforce").classify(answer(400, error(code, description))) == expected


def test_expired_code_at_the_exchange_is_final() -> None:
    """A code that came too late is refused at once; only a refresh gives the words a second meaning."""
    late = answer(400, error("invalid_grant", "expired authorization code"))
    assert provider("salesforce").classify(late, request="authorization_code") == LATE


def test_hubspot_complaint_about_a_code_is_a_refusal_only_at_the_exchange() -> None:
    """BAD_AUTH_CODE refuses a code and can never refuse a refresh token."""
    bad = answer(400, error("invalid_grant", status="BAD_AUTH_CODE"))
    outcome = provider("hubspot").classify(bad, request="authorization_code")
    assert outcome == Refused("bad_code")


@pytest.mark.parametrize(
    ("raw", "life"),
    [
        (1800, 1800.0),
        (1800.5, 1800.5),
        ("1800", 1800.0),
        (" 3600 ", 3600.0),
        (0, 1.0),
        (-5, 1.0),
        ("-5", 1.0),
        (10**30, 315_360_000.0),
        (True, None),
        ("soon", None),
        ("1e9", None),
        ("١٢", None),
        (None, None),
        ([60], None),
        (float("nan"), None),
        (float("inf"), None),
    ],
)
def test_life_that_makes_no_sense_counts_as_untold(raw: object, life: float | None) -> None:
    """`expires_in` is read from numbers and digits within bounds; rubbish never costs the token beside it."""
    outcome = classify(answer(200, {"access_token": "abc", "expires_in": raw}))
    assert isinstance(outcome, Granted)
    assert outcome.expires_in == life


def test_granted_holds_everything_and_prints_nothing() -> None:
    """Tokens come as secrets, scopes as a tuple, the rest as extras without tokens."""
    body = {
        **TOKEN,
        "token_type": "BEARER",
        "refresh_token": "r",
        "scope": "a b",
        "hub_id": 7,
        "id_token": "x.y.z",
    }
    outcome = classify(answer(200, body))
    assert outcome == Granted(
        Secret("abc"),
        Secret("r"),
        expires_in=1800.0,
        scopes=("a", "b"),
        sent_at=SENT,
        extras={"token_type": "BEARER", "expires_in": 1800, "scope": "a b", "hub_id": 7},
    )
    assert "x.y.z" not in repr(outcome)
    assert "hub_id" not in repr(outcome)


def test_hubspot_scopes_come_as_a_list() -> None:
    """HubSpot's token answer lists what was granted."""
    outcome = provider("hubspot").classify(answer(200, {**TOKEN, "scopes": ["oauth", "tickets", 7]}))
    assert isinstance(outcome, Granted)
    assert outcome.scopes == ("oauth", "tickets")


@pytest.mark.parametrize(
    ("raw", "date", "seconds"),
    [
        ("120", None, 120.0),
        ("0", None, 0.0),
        ("86400", None, MAX_RETRY_AFTER),
        (format_datetime(SENT + timedelta(seconds=90), usegmt=True), None, 90.0),
        (format_datetime(SENT + timedelta(seconds=90), usegmt=True), SENT + timedelta(seconds=30), 60.0),
        (format_datetime(SENT - timedelta(seconds=90), usegmt=True), None, 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", None, MAX_RETRY_AFTER),
        ("-3", None, None),
        ("soon", None, None),
        ("", None, None),
        ("nan", None, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(raw: str, date: datetime | None, seconds: float | None) -> None:
    """`Retry-After` is understood in both forms, measured on the provider's clock, and capped."""
    headers = {"Retry-After": raw} | ({"Date": format_datetime(date, usegmt=True)} if date else {})
    assert retry_after(answer(503, b"", headers)) == seconds


def codes_in(outcome: Outcome) -> set[str]:
    """Return every code an outcome carries."""
    if isinstance(outcome, Granted):
        return set()
    then = {outcome.then.code} if isinstance(outcome, Unavailable) and outcome.then else set()
    return {outcome.code} | then


def test_every_code_is_a_short_word_with_an_explanation() -> None:
    """Whatever code an operator meets, there is a sentence for it."""
    tables = [
        (provider("hubspot"), [row[2] for row in [*HUBSPOT, *PLAIN]]),
        (provider("salesforce"), [row[2] for row in [*SALESFORCE, *PLAIN]]),
    ]
    for vendor, outcomes in tables:
        for code in set().union(*map(codes_in, outcomes)):
            assert code.isidentifier()
            assert len(code) <= 32
            assert vendor.explain(code), code
        for code in [*vendor.explanations, *EXPLANATIONS]:
            assert len(code) <= 32


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
words = st.sampled_from(
    ["invalid_grant", "invalid_client", "access_denied", "server_error", "BAD_REFRESH_TOKEN", "BAD_HUB",
     "BAD_AUTH_CODE", "error", "expired authorization code", "inactive user", "abc", ""]
)  # fmt: skip
KNOWN = [
    "error",
    "error_description",
    "status",
    "message",
    "access_token",
    "refresh_token",
    "token_type",
    "expires_in",
    "scope",
    "scopes",
    "id",
    "instance_url",
    "hub_id",
]
fields = st.fixed_dictionaries({}, optional=dict.fromkeys(KNOWN, words | anything))
bodies = (
    st.binary(max_size=200)
    | anything.map(lambda data: json.dumps(data).encode())
    | fields.map(lambda data: json.dumps(data).encode())
)
statuses = st.sampled_from([200, 201, 302, 400, 401, 403, 404, 408, 429, 477, 500, 502, 503]) | st.integers(
    100, 999
)
some_headers = st.dictionaries(
    st.sampled_from(["Retry-After", "Date", "Content-Type"]),
    st.text()
    | st.sampled_from(["1", "9" * 400, "Mon, 00 Jan 0000 99:99:99 GMT", "Sat, 31 Dec 9999 23:59:59 -2359"]),
)
requests_of = st.sampled_from(["authorization_code", "refresh_token", "jwt_bearer", "client_credentials"])
EXPLICIT = {
    b"invalid_grant",
    b"invalid_token",
    b"BAD_REFRESH_TOKEN",
    b"BAD_HUB",
    b"BAD_AUTH_CODE",
    b"EXPIRED_AUTH_CODE",
}
PROVIDERS = [*discover().values(), Provider()]


@given(statuses, bodies, some_headers, requests_of)
@example(503, b"", {"Retry-After": "Sat, 31 Dec 9999 23:59:59 -2359"}, "refresh_token")
def test_no_answer_is_too_strange(
    status: int, body: bytes, headers: dict[str, str], request: TokenRequest
) -> None:
    """Whatever comes back: no exception, no grant without a token, no refusal without the word for it."""
    for vendor in PROVIDERS:
        strange = answer(status, body, headers)
        outcome = vendor.classify(strange, request=request)
        if isinstance(outcome, Granted):
            assert 200 <= status < 300
            assert outcome.access_token.reveal() == json.loads(body)["access_token"] != ""
            assert outcome.expires_in is None or outcome.expires_in > 0
        if isinstance(outcome, Refused):
            assert 400 <= status < 500
            assert any(word.lower() in body.lower() for word in EXPLICIT)
        if isinstance(outcome, Unavailable) and outcome.retry_after is not None:
            assert 0 <= outcome.retry_after <= MAX_RETRY_AFTER
