"""Redaction: no form of secret survives in text, whatever stands around it; ordinary words do."""

import base64
import json
import string
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from enum import IntEnum, StrEnum
from pathlib import Path
from urllib.parse import quote, urlencode
from uuid import UUID

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from app.errors import NotFound
from app.secret import Secret
from app.telemetry import scrub
from app.telemetry.redaction import REDACTED, fault, presentable

URL_SAFE = string.ascii_letters + string.digits + "-_"
HEX = "0123456789abcdef"


def text_of(alphabet: str, least: int, most: int) -> st.SearchStrategy[str]:
    return st.text(st.sampled_from(alphabet), min_size=least, max_size=most)


def uuids() -> st.SearchStrategy[str]:
    return st.uuids().map(str)


hublets = st.sampled_from(["na1", "na2", "eu1", "ap1"])
jwts = st.tuples(text_of(URL_SAFE, 8, 60), text_of(URL_SAFE, 8, 60), text_of(URL_SAFE, 0, 60)).map(
    lambda parts: "eyJ" + ".".join(parts)
)
hubspot_refresh = st.tuples(hublets, uuids()).map("-".join)
hubspot_private = st.tuples(hublets, uuids()).map(lambda parts: "pat-" + "-".join(parts))
salesforce_access = st.tuples(
    text_of(string.ascii_letters + string.digits, 12, 12), text_of(string.ascii_letters + "._", 10, 90)
).map(lambda parts: f"00D{parts[0]}!{parts[1]}")
salesforce_refresh = text_of(string.ascii_letters + string.digits + "._", 40, 80).map(
    lambda tail: f"5Aep{tail}"
)
salesforce_secret = text_of("0123456789ABCDEF", 64, 64)
ours = st.binary(min_size=32, max_size=32).map(lambda raw: base64.urlsafe_b64encode(raw).decode().rstrip("="))
keks = st.binary(min_size=32, max_size=32).map(lambda raw: base64.b64encode(raw).decode())
long_hex = text_of(HEX, 33, 80)

TOKENS = {
    "jwt": jwts,
    "hubspot refresh token": hubspot_refresh,
    "hubspot private app token": hubspot_private,
    "hubspot client secret": uuids(),
    "salesforce access token": salesforce_access,
    "salesforce refresh token": salesforce_refresh,
    "salesforce consumer secret": salesforce_secret,
    "caller secret": ours,
    "long hex": long_hex,
}


@pytest.mark.parametrize("form", TOKENS)
@given(data=st.data(), before=st.text(max_size=60), after=st.text(max_size=60))
def test_a_token_in_any_text_does_not_survive(
    form: str, data: st.DataObject, before: str, after: str
) -> None:
    """Neither as it is nor percent-encoded, whatever touches it."""
    token = data.draw(TOKENS[form])
    assume(not looks_like_words(token))
    assert token not in scrub(f"{before}{token}{after}")
    assert quote(token) not in scrub(f"{before}{quote(token)}{after}")
    assert token not in scrub(f"{before} {json.dumps({'value': token})} {after}")


@pytest.mark.parametrize(
    "token",
    ["na1-1a2b3c4d", "eu1-1a2b3c4d-5e6f", "pat-na1-12345678", "abcdefab-abcd-abcd-abcd-abcdefabcdef"],
)
def test_a_vendors_form_is_known_even_when_it_is_short_or_reads_like_words(token: str) -> None:
    """Samples of HubSpot's; a UUID can be all letters."""
    for text in (token, f"x{token}", f"refreshing {token}.", f"/tokens/{token}/info"):
        assert token not in scrub(text)


def looks_like_words(token: str) -> bool:
    return not any(map(str.isdigit, token)) and not any(map(str.isupper, token))


@given(keks)
def test_a_key_in_base64_does_not_survive(key: str) -> None:
    """A key encryption key has `/` and `+` in it, which file paths have too."""
    assume(any(map(str.isdigit, key)) and any(map(str.isupper, key)) and any(map(str.islower, key)))
    for text in (key, f"key {key} end", f'{{"k1":"{key}"}}', f"k1={key}"):
        assert key.rstrip("=") not in scrub(text)


short_secrets = text_of(string.ascii_letters + string.digits + "._~!*", 8, 24)
NAMES = [
    "client_secret",
    "refresh_token",
    "access_token",
    "code",
    "assertion",
    "client_assertion",
    "code_verifier",
    "password",
    "clientSecret",
    "subject_token",
    "hapikey",
]


@given(
    secret=short_secrets, name=st.sampled_from(NAMES), before=st.text(max_size=30), after=st.text(max_size=30)
)
def test_a_short_secret_under_its_name_does_not_survive(
    secret: str, name: str, before: str, after: str
) -> None:
    """In a form, a URL, JSON, Python's repr and JSON inside JSON; the name is what gives it away."""
    assume(secret not in before and secret not in after and secret not in f"{name}{REDACTED}&a=b")
    texts = [
        f"{before}{name}={secret}&{after}",
        f"{before}?{urlencode({'a': 'b', name: secret, 'c': 'd'})} {after}",
        f"{before}{json.dumps({name: secret})}{after}",
        f"{before}{json.dumps({name: secret}, separators=(',', ':'))}{after}",
        f"{before}{ {name: secret}!r}{after}",
        f"{before}{json.dumps(json.dumps({name: secret}))}{after}",
        f"{before}next=%2Fcb%3F{quote(name)}%3D{secret}%26x{after}",
    ]
    for text in texts:
        assert secret not in scrub(text), text


@given(secret=text_of(string.ascii_letters + string.digits + "._~+/-", 8, 40), before=st.text(max_size=30))
def test_authorization_values_do_not_survive(secret: str, before: str) -> None:
    """Bearer and Basic wherever they stand, and whole header lines of any scheme."""
    for text in (
        f"{before}Bearer {secret}",
        f"{before}Authorization: Basic {secret}==",
        f"{before}authorization: Sesame {secret}\r\nX: y",
        f"{before}{{'Authorization': 'Bearer {secret}'}}",
        f"{before}Cookie: session={secret}; other=1",
    ):
        assume(
            secret not in before and secret.lower() not in "authorization: bearer basic sesame cookie session"
        )
        assert secret not in scrub(text), text


@given(
    local=text_of(string.ascii_letters + string.digits + "._+-", 1, 64),
    domain=text_of(string.ascii_lowercase, 2, 20),
    before=st.text(max_size=30),
    after=st.text(max_size=30),
)
def test_an_address_of_a_person_does_not_survive(local: str, domain: str, before: str, after: str) -> None:
    """Written out or percent-encoded as HubSpot sends it in a query."""
    for at in ("@", "%40"):
        address = f"{local}{at}{domain}.example"
        assert address not in scrub(f"{before} {address} {after}")
        assert address not in scrub(f"{before}userEmail={address}&{after}")


@given(
    password=text_of(string.ascii_letters + string.digits + "!$%^*()_+-=:/?#@", 1, 40),
    user=text_of(string.ascii_lowercase, 1, 10),
)
@example(password="p@ss/w:rd", user="u")
def test_the_password_of_a_database_does_not_survive(password: str, user: str) -> None:
    """Also one with the characters that should have been percent-encoded."""
    got = scrub(f"cannot connect to postgresql+psycopg://{user}:{password}@db.internal:5432/drawbridge now")
    assert got == f"cannot connect to postgresql+psycopg://{REDACTED}@db.internal:5432/drawbridge now"


def test_a_private_key_does_not_survive() -> None:
    """Whole or with its end cut off."""
    lines = "\n".join(["MIIEvQIBADANBg"] * 3)
    for kind in ("", "RSA ", "EC ", "ENCRYPTED "):
        key = f"-----BEGIN {kind}PRIVATE KEY-----\n{lines}\n-----END {kind}PRIVATE KEY-----"
        assert scrub(f"a {key} b") == f"a {REDACTED} b"
        assert "MIIE" not in scrub(key[:60])


@pytest.mark.parametrize(
    "text",
    [
        "The database did not answer within 5 seconds.",
        "connection hubspot-1234567 generation 12 attempt 0123456789abcdef0123456789abcdef",
        "GET /v1/connections/hubspot-123/token?min_ttl=60 200",
        "relation ix_connections_next_refresh_at_and_state already exists",
        "UPDATE connections SET generation=%(generation)s WHERE connections.id = %(id)s",
        "app/broker/refresh.py:120 _present",
        "/usr/local/lib/python/site-packages/sqlalchemy/engine/default.py",
        "Running upgrade  -> 0001, first schema",
        "https://api.hubapi.com/oauth/2026-03/token",
        "2026-11-22T13:17:59.123456Z",
        "status 503, Retry-After 12",
        "drawbridge_hand_outs_total 17.0",
    ],
)
def test_what_an_operator_reads_stays(text: str) -> None:
    """A redaction that hides the cause is switched off by the first person on call."""
    assert scrub(text) == text


@given(st.text(max_size=300))
def test_scrubbing_twice_changes_nothing(text: str) -> None:
    """Lines pass it more than once on their way."""
    once = scrub(text)
    assert scrub(once) == once


@settings(deadline=None)
@given(st.integers(0, 3_000))
def test_a_long_text_is_cut_without_leaving_half_a_token(offset: int) -> None:
    """The cut falls at white space: the first half of a token looks like nothing."""
    token = "na1-5ecret00-1111-2222-3333-444455556666"
    text = "word " * 3_100 + "x" * (offset % 7) + " " + f"{token} " * 100
    got = scrub(text)
    assert "5ecret" not in got
    assert len(got) < 17_000
    assert scrub("x" * 40_000) == " […]"


@pytest.mark.parametrize(
    "text",
    ["a" * 16_000, "@" * 16_000, "secret" * 2_500, '\\"' * 8_000, "a@" * 8_000, "eyJ" * 5_000, "://" * 5_000],
)
def test_no_text_makes_the_patterns_crawl(text: str) -> None:
    """A stranger chooses what stands in a header; a pattern that backtracks without end would hang here for
    hours.
    """
    assert len(scrub(text)) <= len(text) * 3


# -- values


class _Colour(StrEnum):
    RED = "red"


class _Number(IntEnum):
    ONE = 1


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, None),
        (True, True),
        (7, 7),
        (1.5, 1.5),
        (float("nan"), "nan"),
        ("text", "text"),
        (_Colour.RED, "red"),
        (_Number.ONE, 1),
        (Secret("hunter2"), "Secret(…)"),
        (b"hunter2", "<7 bytes>"),
        (bytearray(b"hunter2"), "<7 bytes>"),
        (datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02T00:00:00+00:00"),
        (timedelta(seconds=90), 90.0),
        (UUID(int=1), "0" * 31 + "1"),
        (Path("/var/x.db"), "/var/x.db"),
        ([1, Secret("hunter2")], [1, "Secret(…)"]),
        (
            {"a": b"x", "client_secret": "hunter2", 5: 1},
            {"a": "<1 bytes>", "client_secret": REDACTED, "<int>": 1},
        ),
        (object(), "<object>"),
        ([[[[[[1]]]]]], [[[["<list>"]]]]),
    ],
)
def test_values_are_shown_by_their_type(value: object, shown: object) -> None:
    """Numbers as they are, text scrubbed, everything else as what it is."""
    assert presentable(value) == shown


def test_a_foreign_exception_shows_its_class_and_place_and_never_its_message() -> None:
    """SQLAlchemy quotes parameters, requests quotes URLs, and neither knows what is secret."""
    local = "hunter2"

    def fail() -> None:
        try:
            raise KeyError(local)
        except KeyError as error:
            raise ValueError(f"bad {local}") from error

    told = caught(fail)
    assert told["type"] == "ValueError"
    assert told["from"] == ["KeyError"]
    assert told["at"][-1].endswith(" fail")
    assert "test_telemetry_redaction.py" in told["at"][-1]
    assert "hunter2" not in json.dumps(told)


def caught(fail: Callable[[], None]) -> dict[str, object]:
    try:
        fail()
    except Exception as error:  # noqa: BLE001 - whatever it is
        return fault(error)
    raise AssertionError("it did not fail")


def test_an_exception_of_ours_shows_its_code_and_detail() -> None:
    """They are written for operators and hold no secret; they are scrubbed all the same."""
    told = presentable(NotFound("There is no connection a@b.example."))
    assert told["code"] == "not_found"
    assert told["detail"] == f"There is no connection {REDACTED}."


def test_an_operating_system_error_shows_its_number() -> None:
    """Disk full and permission denied must be told apart."""
    assert presentable(OSError(28, "No space left", "/secret/path"))["errno"] == 28


def test_a_chain_of_exceptions_that_bites_its_tail_ends() -> None:
    """Frameworks make such chains."""
    first, second = ValueError("a"), KeyError("b")
    first.__cause__, second.__cause__ = second, first
    assert fault(first)["from"] == ["KeyError", "ValueError"]
